package proxy

import (
	"sync"
	"sync/atomic"

	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/tun"
)

// rateLimitedDevice limits the packets that one session writes to the device to
// the rate of the session's user. Packets above the rate wait in a queue, and a
// goroutine of the rateLimitedDevice writes them: the callers of Write run the
// QUIC connection and must not wait. While the user has no limit, Write writes
// directly.
type rateLimitedDevice struct {
	connectip.Device
	ss *sessionBase

	// queue is nil before the first packet of a user with a limit. It is stored
	// with mu held and loaded without.
	queue atomic.Pointer[flowqueue.Queue]

	mu     sync.Mutex
	closed bool // guarded by mu

	sending sync.WaitGroup // the goroutine that runs send
	writing connectip.Busy // busy while that goroutine writes to Device
}

// Write implements connectip.Device. It may be called concurrently, and returns
// at once.
func (d *rateLimitedDevice) Write(bufs [][]byte, offset int) (int, error) {
	if !d.ss.userState.up.Limited() {
		return d.Device.Write(bufs, offset)
	}
	queue := d.open()
	if queue == nil {
		return len(bufs), nil // the session has ended
	}
	var batch [sendBatch]*flowqueue.Packet
	packets := batch[:0]
	for _, b := range bufs {
		if len(b)-offset > flowqueue.MaxSize { // received in a capsule
			d.writeLong(b, offset)
			continue
		}
		p := flowqueue.Get()
		p.Size = copy(p.Buffer()[tun.Headroom:], b[offset:])
		if packets = append(packets, p); len(packets) == len(batch) {
			d.ss.stats.Receive.DropMany(connectip.DropQueueFull, queue.Push(packets))
			packets = batch[:0]
		}
	}
	d.ss.stats.Receive.DropMany(connectip.DropQueueFull, queue.Push(packets))
	return len(bufs), nil
}

// writeLong writes a packet that is too long for the queue, or drops it if the
// user's rate does not allow it now.
func (d *rateLimitedDevice) writeLong(buf []byte, offset int) {
	up := &d.ss.userState.up
	if up.Delay() > 0 {
		d.ss.stats.Receive.Drop(connectip.DropQueueFull)
		return
	}
	up.Spend(len(buf) - offset)
	if _, err := d.Device.Write([][]byte{buf}, offset); err != nil {
		d.ss.stats.Receive.Drop(connectip.DropDevice)
	}
}

// open returns the queue, and creates it if necessary. It returns nil after
// close.
func (d *rateLimitedDevice) open() *flowqueue.Queue {
	if q := d.queue.Load(); q != nil {
		return q
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	q := d.queue.Load()
	if q == nil {
		q = flowqueue.New()
		d.sending.Go(d.ss.guarded(func() { d.send(q) }))
		d.queue.Store(q)
	}
	return q
}

// send writes the queued packets at the rate of the user, until the queue is
// closed.
func (d *rateLimitedDevice) send(queue *flowqueue.Queue) {
	var batch [sendBatch]*flowqueue.Packet
	var bufs [sendBatch][]byte
	up, count := &d.ss.userState.up, &d.ss.stats.Receive
	for {
		up.Wait(d.ss.ctx.Done())
		n, late := queue.Pop(batch[:up.Batch(sendBatch)])
		count.DropMany(connectip.DropQueueDelay, late)
		if n == 0 {
			return
		}
		bytes := 0
		for i, p := range batch[:n] {
			bufs[i] = p.Bytes()
			bytes += p.Size
		}
		up.Spend(bytes)
		d.writing.Begin()
		if wrote, err := d.Device.Write(bufs[:n], tun.Headroom); err != nil {
			count.DropMany(connectip.DropDevice, n-wrote)
		}
		d.writing.End()
		for _, p := range batch[:n] {
			p.Free()
		}
	}
}

// addAges notes in a how long packets have been written to the device. Packets
// in the queue do not count: the user's rate delays them on purpose.
func (d *rateLimitedDevice) addAges(a *connectip.Ages) {
	a.Note(connectip.StageDeviceWrite, d.writing.Age())
}

// close drops the queued packets and waits for the goroutine that runs send.
// The session has ended.
func (d *rateLimitedDevice) close() {
	d.mu.Lock()
	d.closed = true
	if q := d.queue.Load(); q != nil {
		q.Close()
	}
	d.mu.Unlock()
	d.sending.Wait()
}
