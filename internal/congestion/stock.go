//go:build !quicpatch

package congestion

import "github.com/quic-go/quic-go"

// Selectable reports whether this build can leave congestion control to what is inside: whether its quic-go is the edited one.
const Selectable = false

// Control turns QUIC's own congestion control on; stock quic-go always has it on.
func Control(*quic.Conn) {}

// Apply does nothing: stock quic-go always controls congestion itself.
func (m Mode) Apply(*quic.Config) {}
