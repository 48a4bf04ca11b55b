//go:build !quicpatch

package connectip

import "time"

// ready cannot tell: all packets go by way of a queue.
func (d *datagrams) ready() bool { return false }

// isDirect reports that direct does nothing: all datagrams come by way of the
// stream.
func (d *datagrams) isDirect() bool { return false }

func (d *datagrams) direct(*inbox) (stop func()) { return func() {} }

// oldestReceived cannot tell.
func (d *datagrams) oldestReceived() time.Duration { return 0 }

// sendNow is send: nobody calls it, because ready never reports that there is
// room.
func (d *datagrams) sendNow(frame []byte) error { return d.conn.SendDatagram(frame) }
