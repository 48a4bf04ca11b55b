package connectip

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"masquevpn/internal/rescue"
	"masquevpn/tun"
)

const (
	// maxBatch is how many packets go to the device at once: as many as it
	// merges into one.
	maxBatch = 64
	// maxInline is how many packets are written at once by who brings them:
	// waking another goroutine takes longer.
	maxInline = 4
	// mergedPacket is the room for the longest packet, and its headroom, on its
	// way to the device: the device may append the segments that follow.
	mergedPacket = tun.Headroom + 1<<16
	// batchWait is how long a connection waits for a batch. All come back
	// sooner unless the device does not keep up.
	batchWait = 20 * time.Millisecond
)

// inbox collects the packets of the peer and hands them to the device in
// batches, which lets the device merge the segments of a flow into a single
// write. One goroutine fills a batch while another one writes the last.
//
// All connections share the batches, so they have to come back whatever a peer
// does. The goroutine of a connection holds one at most, because it flushes the
// inbox of one stream before it fills that of another, and it holds it for a
// run of packets that are at hand. While it holds one, it waits for nothing but
// the writer of the same stream, which holds one at most, and waits for the
// device alone. It waits for a batch only while it holds none, and not for
// long: after that it writes packets one by one.
type inbox struct {
	conn  *Conn
	size  int // packets per batch
	full  chan *batch
	ended <-chan struct{}

	waiting atomic.Int32 // batches handed over and not written yet

	mu      sync.Mutex // held by the connection's goroutine and by close
	batch   *batch     // that is being filled, nil for none
	starved bool       // no batch came back in time; until the next flush nobody waits for one
}

func newInbox(c *Conn) *inbox {
	return &inbox{conn: c, size: min(maxBatch, c.cfg.Device.BatchSize()), full: make(chan *batch),
		ended: c.life.Done()}
}

// HandleDatagram takes one HTTP Datagram, context ID first, and does not keep
// it. It waits while the device does not keep up: packets are then dropped
// where it costs least, at the socket. The goroutine that calls it calls
// FlushDatagrams before it does anything else that may take long.
func (in *inbox) HandleDatagram(b []byte) {
	defer rescue.Catch(in.conn.panicked) // QUIC's goroutine must survive
	in.mu.Lock()
	defer in.mu.Unlock()
	in.conn.handleDatagram(b, in)
}

// FlushDatagrams hands over what there is.
func (in *inbox) FlushDatagrams() {
	defer rescue.Catch(in.conn.panicked)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.flush()
	in.starved = false
}

// push adds a packet, of which it makes a copy. It returns false when nobody
// will take the packet any more.
func (in *inbox) push(pkt []byte) bool {
	if in.batch == nil {
		in.conn.filling.Begin()
	}
	if in.batch == nil && !in.take() {
		defer in.conn.filling.End()
		return unbatched{in.conn, &in.conn.writers.quic}.push(pkt)
	}
	in.batch.add(pkt)
	return in.batch.n < in.size || in.flush()
}

// take takes a batch to fill and reports whether there is one.
func (in *inbox) take() bool {
	select {
	case <-in.ended:
		return false
	default:
	}
	select {
	case in.batch = <-batches:
		return true
	default:
	}
	if in.starved {
		return false
	}
	timeout := time.NewTimer(batchWait)
	defer timeout.Stop()
	select {
	case in.batch = <-batches:
		return true
	case <-in.ended:
	case <-timeout.C:
		in.starved = true
	}
	return false
}

// flush returns false when nobody takes packets any more.
func (in *inbox) flush() bool {
	b := in.batch
	if b == nil {
		return true
	}
	in.batch = nil
	defer in.conn.filling.End()
	switch {
	case b.n <= maxInline && in.waiting.Load() == 0:
		in.conn.write(b, &in.conn.writers.quic)
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

// unbatched writes packets to the device of conn one by one, in a buffer of
// their own.
type unbatched struct {
	conn *Conn
	busy *Busy // since when the goroutine has been writing
}

// maxUnbatched is the longest packet for which there are buffers, in bytes;
// longer ones come in capsules only.
const maxUnbatched = 2048

var unbatchedBuffers = sync.Pool{New: func() any { return new([tun.Headroom + maxUnbatched]byte) }}

// push writes a packet, of which it makes a copy. It returns false when nobody
// will take the packet any more.
func (u unbatched) push(pkt []byte) bool {
	if u.conn.life.Err() != nil {
		return false
	}
	var buf []byte
	if len(pkt) <= maxUnbatched {
		pooled := unbatchedBuffers.Get().(*[tun.Headroom + maxUnbatched]byte)
		defer unbatchedBuffers.Put(pooled)
		buf = pooled[:tun.Headroom+len(pkt)]
	} else {
		buf = make([]byte, tun.Headroom+len(pkt))
	}
	copy(buf[tun.Headroom:], pkt)
	u.busy.Begin()
	defer u.busy.End()
	if _, err := u.conn.cfg.Device.Write([][]byte{buf}, tun.Headroom); err != nil {
		u.conn.cfg.Stats.Receive.Drop(DropDevice)
	}
	return true
}

// straggling is how long datagrams come by way of the stream although they are
// handled directly: those that came before.
const straggling = time.Second

// receive takes the datagrams that come by way of the stream, until that or
// c.life ends or none come that way any more.
func (c *Conn) receive() {
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
		c.handleDatagram(b, unbatched{c, &c.writers.stream})
	}
}

// deliver writes batches to the device until the inbox has ended. It is no
// worker: with a new goroutine for each batch, throughput is some percent less.
func (in *inbox) deliver() {
	for {
		select {
		case <-in.ended:
			return
		case b := <-in.full:
			in.conn.write(b, &in.conn.writers.inbox)
			in.waiting.Add(-1)
		}
	}
}

// write gives b to the device. busy is the calling goroutine's.
func (c *Conn) write(b *batch, busy *Busy) {
	defer b.free()
	busy.Begin()
	defer busy.End()
	if wrote, err := c.cfg.Device.Write(b.bufs[:b.n], tun.Headroom); err != nil {
		c.cfg.Stats.Receive.DropMany(DropDevice, b.n-wrote)
	}
}

// batch is the packets of one write to a device. Untouched memory costs
// nothing, so the room to merge is cheap.
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
	b.bufs[b.n] = buf[:tun.Headroom+copy(buf[tun.Headroom:], pkt)]
	b.n++
}

// free gives b back.
func (b *batch) free() {
	b.n = 0
	batches <- b
}
