//go:build !quicpatch

package proxy

import "github.com/quic-go/quic-go"

// awaitAdmission does nothing: stock quic-go cannot raise limits later. The
// queues of stock quic-go are short, and connlimit limits the bytes of a
// pending client in any case.
func awaitAdmission(*quic.Config) {}

// admit does nothing.
func admit(*quic.Conn) {}
