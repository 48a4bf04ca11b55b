//go:build !quicpatch

package connectip

import "time"

// This file replaces direct.go in builds with the stock quic-go, which passes
// all datagrams through queues.

// ready returns false, because the stock quic-go does not report whether its
// queue has room.
func (d *datagrams) ready() bool { return false }

// isDirect returns false: all datagrams arrive through Stream.ReceiveDatagram.
func (d *datagrams) isDirect() bool { return false }

// direct does nothing.
func (d *datagrams) direct(*inbox) (stop func()) { return func() {} }

// oldestReceived returns 0, because the stock quic-go does not report it.
func (d *datagrams) oldestReceived() time.Duration { return 0 }

// sendNow sends a frame and may block. It is not called while ready returns
// false.
func (d *datagrams) sendNow(frame []byte) error { return d.conn.SendDatagram(frame) }
