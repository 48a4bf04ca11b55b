package connectip

import (
	"context"
	"runtime"
)

const (
	// inboxLen is how many packets wait between QUIC and the device, at most: what goes to the device in one batch.
	inboxLen = 128
	// mergedPacket is the room for the longest packet, and its headroom, on its way to the device: the device may append the
	// segments that follow.
	mergedPacket = Headroom + 1<<16
)

// inbox takes packets from QUIC one by one and hands them to the device in batches, which lets the device merge the
// segments of a flow into a single write.
type inbox struct {
	packets chan []byte
	ended   <-chan struct{}
}

// push queues a packet, which belongs to the inbox from then on. While the device does not keep up it waits, and packets queue up
// in QUIC. It returns false when nobody will take the packet any more.
func (in inbox) push(pkt []byte) bool {
	select {
	case in.packets <- pkt:
		return true
	case <-in.ended:
		return false
	}
}

// receive moves datagrams into in until the stream or ctx ends.
func (c *Conn) receive(ctx context.Context, in inbox) {
	for {
		b, err := c.str.ReceiveDatagram(ctx)
		if err != nil {
			return
		}
		c.handleDatagram(b, in)
	}
}

// deliver writes the packets of in and of long to the device until ctx ends.
func (c *Conn) deliver(ctx context.Context, in, long inbox) {
	for {
		var pkt []byte
		select {
		case <-ctx.Done():
			return
		case pkt = <-in.packets:
		case pkt = <-long.packets:
		}
		b := <-batches
		n := b.fill(pkt, in, c.cfg.Device.BatchSize())
		if wrote, err := c.cfg.Device.Write(b.bufs[:n], Headroom); err != nil {
			for range n - wrote {
				c.cfg.Stats.Receive.Drop(DropDevice)
			}
		}
		batches <- b
	}
}

// batch is the buffers of one write to a device. Untouched memory costs nothing, so the room to merge is cheap.
// More than can be written at once would only wait for each other, so there are not more.
type batch struct {
	slab []byte
	bufs [][]byte
}

var batches = func() chan *batch {
	n := runtime.GOMAXPROCS(0) + 1
	c := make(chan *batch, n)
	for range n {
		c <- new(batch)
	}
	return c
}()

// fill copies pkt and what in holds, up to limit packets, and returns their number.
func (b *batch) fill(pkt []byte, in inbox, limit int) int {
	if len(b.bufs) < limit {
		b.slab = make([]byte, limit*mergedPacket)
		b.bufs = make([][]byte, limit)
	}
	for n := 0; ; {
		buf := b.slab[n*mergedPacket : (n+1)*mergedPacket : (n+1)*mergedPacket]
		b.bufs[n] = buf[:Headroom+copy(buf[Headroom:], pkt)]
		n++
		if n == limit {
			return n
		}
		select {
		case pkt = <-in.packets:
		default:
			return n
		}
	}
}
