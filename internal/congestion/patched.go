//go:build quicpatch

package congestion

import "github.com/quic-go/quic-go"

// Selectable reports whether this build can leave congestion control to what is inside: whether its quic-go is the edited one.
const Selectable = true

// Control turns QUIC's own congestion control on, for good, on a connection that may be without.
func Control(c *quic.Conn) { c.ControlCongestion() }

// Apply sets m in c.
func (m Mode) Apply(c *quic.Config) { c.Uncontrolled = m == Inner }
