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
	// maxBatch is the maximum number of packets in a batch. The device
	// coalesces at most this many into one.
	maxBatch = 64

	// maxInline is the number of packets up to which flush writes a batch
	// itself. Waking another goroutine would take longer.
	maxInline = 4

	// packetRoom is the room in a batch for one packet, in bytes. It is enough
	// for the headroom and the longest packet, because the device may append
	// the segments that follow.
	packetRoom = tun.Headroom + 1<<16

	// batchWait limits the time for which a connection waits for a batch.
	// Batches come back sooner unless the device is too slow.
	batchWait = 20 * time.Millisecond
)

// inbox collects packets of the peer and writes them to the device in batches,
// so that the device can coalesce the segments of a flow. One goroutine fills a
// batch while another one writes the previous batch.
//
// All connections share the batches, so no peer may be able to hold them for
// long. The following rules ensure that:
//
//   - A connection's goroutine holds at most one batch, and only while it
//     processes the packets that have already arrived: it flushes the inbox of
//     one stream before it fills the inbox of another.
//   - A goroutine that holds a batch waits only for the writer of the same
//     stream. The writer holds at most one batch and waits only for the device.
//   - A goroutine waits for a batch only if it holds none, and for no longer
//     than batchWait. After that it writes packets one by one.
type inbox struct {
	conn *Conn
	size int // maximum number of packets in a batch

	// filled passes full batches, and with them their ownership, to deliver.
	filled chan *batch

	done <-chan struct{} // closed when conn ends

	pending atomic.Int32 // batches given to deliver and not written yet

	// mu guards the following fields. It is locked by the connection's
	// goroutine and by close.
	mu sync.Mutex

	batch *batch // batch that is being filled; nil: none

	// starved means that no batch became free in time. takeBatch then does not
	// wait again before the next flush.
	starved bool
}

func newInbox(c *Conn) *inbox {
	return &inbox{conn: c, size: min(maxBatch, c.cfg.Device.BatchSize()),
		filled: make(chan *batch), done: c.ctx.Done()}
}

// HandleDatagram processes one HTTP Datagram, starting with the context ID. It
// may modify b and does not retain it. It blocks while the device is too slow:
// packets are then dropped at the socket, where that costs least. The calling
// goroutine must call FlushDatagrams before it does anything that may take
// long.
func (in *inbox) HandleDatagram(b []byte) {
	defer rescue.Catch(in.conn.panicked) // QUIC's goroutine must survive
	in.mu.Lock()
	defer in.mu.Unlock()
	in.conn.handleDatagram(b, in)
}

// FlushDatagrams writes the collected packets, or gives them to deliver.
func (in *inbox) FlushDatagrams() {
	defer rescue.Catch(in.conn.panicked)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.flush()
	in.starved = false
}

// push implements packetWriter. in.mu is held.
func (in *inbox) push(pkt []byte) bool {
	if in.batch == nil {
		in.conn.inboxBusy.Begin()
	}
	if in.batch == nil && !in.takeBatch() {
		defer in.conn.inboxBusy.End()
		return unbatched{in.conn, &in.conn.writers.quic}.push(pkt)
	}
	in.batch.add(pkt)
	return in.batch.n < in.size || in.flush()
}

// takeBatch takes a batch from the pool and reports whether it got one. in.mu
// is held.
func (in *inbox) takeBatch() bool {
	select {
	case <-in.done:
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
	case <-in.done:
	case <-timeout.C:
		in.starved = true
	}
	return false
}

// flush writes the batch, or gives it to deliver. Either way the inbox no
// longer owns it. It returns false if the Conn has ended. in.mu is held.
func (in *inbox) flush() bool {
	b := in.batch
	if b == nil {
		return true
	}
	in.batch = nil
	defer in.conn.inboxBusy.End()
	switch {
	case b.n <= maxInline && in.pending.Load() == 0:
		in.conn.write(b, &in.conn.writers.quic)
	default:
		in.pending.Add(1)
		select {
		case in.filled <- b:
		case <-in.done:
			b.free()
			return false
		}
	}
	return true
}

// close returns an unwritten batch to the pool. The Conn has ended.
func (in *inbox) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.batch != nil {
		in.batch.free()
		in.batch = nil
	}
}

// unbatched writes each packet to the device of conn in a call of its own.
type unbatched struct {
	conn *Conn
	busy *Busy // the calling goroutine's entry in conn.writers
}

// maxUnbatched is the maximum length in bytes of a packet for which there are
// pooled buffers. Longer ones arrive in capsules only.
const maxUnbatched = 2048

var unbatchedBuffers = sync.Pool{New: func() any { return new([tun.Headroom + maxUnbatched]byte) }}

// push implements packetWriter.
func (u unbatched) push(pkt []byte) bool {
	if u.conn.ctx.Err() != nil {
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

// queuedDatagrams is the time for which receive takes datagrams from the stream
// although the connection's goroutine passes new ones to the inbox. The stream
// may still hold earlier ones.
const queuedDatagrams = time.Second

// receive handles the datagrams that the stream queues, until the stream or the
// Conn ends. If the connection's goroutine passes datagrams to the inbox, it
// returns after queuedDatagrams.
func (c *Conn) receive() {
	ctx := c.ctx
	if c.datagrams.isDirect() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, queuedDatagrams)
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

// deliver writes filled batches to the device until the Conn ends. It is not a
// worker.Worker, because starting a goroutine for each batch costs a few
// percent of throughput.
func (in *inbox) deliver() {
	for {
		select {
		case <-in.done:
			return
		case b := <-in.filled:
			in.conn.write(b, &in.conn.writers.inbox)
			in.pending.Add(-1)
		}
	}
}

// write writes b to the device and returns it to the pool. busy is the calling
// goroutine's entry in c.writers.
func (c *Conn) write(b *batch, busy *Busy) {
	defer b.free()
	busy.Begin()
	defer busy.End()
	if wrote, err := c.cfg.Device.Write(b.bufs[:b.n], tun.Headroom); err != nil {
		c.cfg.Stats.Receive.DropMany(DropDevice, b.n-wrote)
	}
}

// batch contains the packets of one call of Device.Write. It has one owner at a
// time: the pool batches, an inbox, or a goroutine in Conn.write.
type batch struct {
	// slab is the memory of bufs, packetRoom bytes for each. Most of it is
	// never touched, so the kernel does not allocate it.
	slab []byte

	// bufs[:n] are the packets, each with tun.Headroom bytes in front.
	bufs [maxBatch][]byte
	n    int
}

// batches is the pool of free batches of all connections: two for each
// processor, one to fill and one to write.
var batches = func() chan *batch {
	n := 2 * runtime.GOMAXPROCS(0)
	c := make(chan *batch, n)
	for range n {
		c <- new(batch)
	}
	return c
}()

// add appends a copy of pkt.
func (b *batch) add(pkt []byte) {
	if b.slab == nil {
		b.slab = make([]byte, maxBatch*packetRoom)
	}
	buf := b.slab[b.n*packetRoom : (b.n+1)*packetRoom : (b.n+1)*packetRoom]
	b.bufs[b.n] = buf[:tun.Headroom+copy(buf[tun.Headroom:], pkt)]
	b.n++
}

// free empties b and returns it to the pool.
func (b *batch) free() {
	b.n = 0
	batches <- b
}
