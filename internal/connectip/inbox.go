package connectip

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxBatch is how many packets go to the device at once: as many as it merges into one.
	maxBatch = 64
	// maxInline is how many packets are written at once by who brings them: waking another goroutine takes longer.
	maxInline = 4
	// mergedPacket is the room for the longest packet, and its headroom, on its way to the device: the device may append the
	// segments that follow.
	mergedPacket = Headroom + 1<<16
)

// inbox collects the packets of the peer and hands them to the device in batches, which lets the device merge the segments of a
// flow into a single write. One goroutine fills a batch while another one writes the last.
type inbox struct {
	conn  *Conn
	size  int // of a batch
	full  chan *batch
	ended <-chan struct{}

	waiting atomic.Int32 // batches handed over and not written yet

	mu    sync.Mutex // hardly ever contended: nearly all packets come from one goroutine
	batch *batch     // that is being filled, nil for none
}

func newInbox(c *Conn) *inbox {
	return &inbox{conn: c, size: min(maxBatch, c.cfg.Device.BatchSize()), full: make(chan *batch), ended: c.life.Done()}
}

// HandleDatagram takes one HTTP Datagram, context ID first, and does not keep it. It waits while the device does not keep up:
// packets are then dropped where it costs least, at the socket.
func (in *inbox) HandleDatagram(b []byte) {
	in.mu.Lock()
	in.conn.handleDatagram(b, in)
	in.mu.Unlock()
}

// FlushDatagrams hands over what there is.
func (in *inbox) FlushDatagrams() {
	in.mu.Lock()
	in.flush()
	in.mu.Unlock()
}

// push adds a packet, of which it makes a copy. It returns false when nobody will take the packet any more.
func (in *inbox) push(pkt []byte) bool {
	select {
	case <-in.ended:
		return false
	default:
	}
	if in.batch == nil {
		select {
		case <-in.ended:
			return false
		case in.batch = <-batches:
		}
	}
	in.batch.add(pkt)
	return in.batch.n < in.size || in.flush()
}

// flush returns false when nobody takes packets any more.
func (in *inbox) flush() bool {
	b := in.batch
	in.batch = nil
	switch {
	case b == nil:
	case b.n <= maxInline && in.waiting.Load() == 0:
		in.conn.write(b)
	default:
		in.waiting.Add(1)
		select {
		case in.full <- b:
		case <-in.ended:
			b.free()
			return false
		}
	}
	return true
}

// close gives back what nobody will write any more. The inbox has ended then.
func (in *inbox) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.batch != nil {
		in.batch.free()
		in.batch = nil
	}
}

// straggling is how long datagrams come by way of the stream although they are handled directly: those that came before.
const straggling = time.Second

// receive takes the datagrams that come by way of the stream, until that or c.life ends or none come that way any more.
func (c *Conn) receive(in *inbox) {
	ctx := c.life
	if c.datagrams.isDirect() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, straggling)
		defer cancel()
	}
	for {
		b, err := c.str.ReceiveDatagram(ctx)
		if err != nil {
			return
		}
		in.HandleDatagram(b)
		in.FlushDatagrams()
	}
}

// deliver writes batches to the device until the inbox has ended. It is no worker: with a new goroutine for each batch, throughput is some
// percent less.
func (in *inbox) deliver() {
	for {
		select {
		case <-in.ended:
			return
		case b := <-in.full:
			in.conn.write(b)
			in.waiting.Add(-1)
		}
	}
}

// write gives b to the device.
func (c *Conn) write(b *batch) {
	if wrote, err := c.cfg.Device.Write(b.bufs[:b.n], Headroom); err != nil {
		c.cfg.Stats.Receive.DropMany(DropDevice, b.n-wrote)
	}
	b.free()
}

// batch is the packets of one write to a device. Untouched memory costs nothing, so the room to merge is cheap.
type batch struct {
	slab []byte
	bufs [maxBatch][]byte
	n    int
}

// batches are all there are: two for each that can be worked on at once.
var batches = func() chan *batch {
	n := 2 * runtime.GOMAXPROCS(0)
	c := make(chan *batch, n)
	for range n {
		c <- new(batch)
	}
	return c
}()

// add copies pkt behind those that are there.
func (b *batch) add(pkt []byte) {
	if b.slab == nil {
		b.slab = make([]byte, maxBatch*mergedPacket)
	}
	buf := b.slab[b.n*mergedPacket : (b.n+1)*mergedPacket : (b.n+1)*mergedPacket]
	b.bufs[b.n] = buf[:Headroom+copy(buf[Headroom:], pkt)]
	b.n++
}

// free gives b back.
func (b *batch) free() {
	b.n = 0
	batches <- b
}
