//go:build quicpatch

package proxy

import "github.com/quic-go/quic-go"

// awaitAdmission has a connection with c begin with few streams and short
// queues.
func awaitAdmission(c *quic.Config) {
	c.AwaitAdmission, c.MaxIncomingStreams = true, pendingStreams
}

// admit gives c the streams and queues of a connection with sessions.
func admit(c *quic.Conn) { c.Admit(maxStreams) }
