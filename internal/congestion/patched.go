//go:build quicpatch

package congestion

import "github.com/quic-go/quic-go"

// Selectable reports whether this build supports Inner, because it uses the
// edited quic-go.
const Selectable = true

// Control permanently enables QUIC's congestion control on c.
func Control(c *quic.Conn) { c.ControlCongestion() }

// Apply configures c for m.
func (m Mode) Apply(c *quic.Config) { c.Uncontrolled = m == Inner }
