//go:build !quicpatch

package proxy

import "github.com/quic-go/quic-go"

// awaitAdmission does nothing: stock quic-go cannot raise limits later. Its
// queues are short, and how much a client sends is looked at all the same.
func awaitAdmission(*quic.Config) {}

func admit(*quic.Conn) {}
