//go:build !quicpatch

package congestion

import "github.com/quic-go/quic-go"

// Selectable reports whether this build supports Inner, because it uses the
// edited quic-go.
const Selectable = false

// Control does nothing, because congestion control is always enabled in stock
// quic-go.
func Control(*quic.Conn) {}

// Apply does nothing, because stock quic-go always controls congestion.
func (m Mode) Apply(*quic.Config) {}
