//go:build quicpatch

package proxy

import "github.com/quic-go/quic-go"

// awaitAdmission makes a connection with the configuration c begin with few
// streams and short queues, until admit is called.
func awaitAdmission(c *quic.Config) {
	c.AwaitAdmission, c.MaxIncomingStreams = true, pendingStreams
}

// admit raises the limits of c for a connection with sessions.
func admit(c *quic.Conn) { c.Admit(maxStreams) }
