package proxy

import (
	"sync"
	"sync/atomic"

	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/tun"
)

// uplink is the device as one session writes to it. What the session's user
// sends above the rate waits in a queue of its own: those who write run QUIC's
// connection and must not wait. Users without a rate do not notice it.
type uplink struct {
	connectip.Device
	ss *session

	queue   atomic.Pointer[flowqueue.Queue] // nil until it is needed
	mu      sync.Mutex
	closed  bool
	sending sync.WaitGroup
	writing connectip.Busy // since when the sending goroutine has been writing
}

// Write implements connectip.Device. It may be called by several goroutines,
// and returns at once.
func (u *uplink) Write(bufs [][]byte, offset int) (int, error) {
	if !u.ss.userState.up.Limited() {
		return u.Device.Write(bufs, offset)
	}
	queue := u.open()
	if queue == nil {
		return len(bufs), nil // the session has ended
	}
	var room [sendBatch]*flowqueue.Packet
	packets := room[:0]
	for _, b := range bufs {
		if len(b)-offset > flowqueue.MaxSize { // it came in a capsule
			u.writeLong(b, offset)
			continue
		}
		p := flowqueue.Get()
		p.Size = copy(p.Buffer()[tun.Headroom:], b[offset:])
		if packets = append(packets, p); len(packets) == len(room) {
			u.ss.stats.Receive.DropMany(connectip.DropQueueFull, queue.Push(packets))
			packets = room[:0]
		}
	}
	u.ss.stats.Receive.DropMany(connectip.DropQueueFull, queue.Push(packets))
	return len(bufs), nil
}

// writeLong writes a packet that is too long to be queued, if the rate allows
// it now.
func (u *uplink) writeLong(buf []byte, offset int) {
	up := &u.ss.userState.up
	if up.Delay() > 0 {
		u.ss.stats.Receive.Drop(connectip.DropQueueFull)
		return
	}
	up.Spend(len(buf) - offset)
	if _, err := u.Device.Write([][]byte{buf}, offset); err != nil {
		u.ss.stats.Receive.Drop(connectip.DropDevice)
	}
}

// open returns the queue, nil when it is closed.
func (u *uplink) open() *flowqueue.Queue {
	if q := u.queue.Load(); q != nil {
		return q
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	q := u.queue.Load()
	if q == nil {
		q = flowqueue.New()
		u.sending.Go(u.ss.guarded(func() { u.send(q) }))
		u.queue.Store(q)
	}
	return q
}

// send writes what is queued at the rate of the user, until the queue is
// closed.
func (u *uplink) send(queue *flowqueue.Queue) {
	var batch [sendBatch]*flowqueue.Packet
	var bufs [sendBatch][]byte
	up, count := &u.ss.userState.up, &u.ss.stats.Receive
	for {
		up.Wait(u.ss.ctx.Done())
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
		u.writing.Begin()
		if wrote, err := u.Device.Write(bufs[:n], tun.Headroom); err != nil {
			count.DropMany(connectip.DropDevice, n-wrote)
		}
		u.writing.End()
		for _, p := range batch[:n] {
			p.Free()
		}
	}
}

// addAges takes into account in a what is being written. What waits because of
// the user's rate is late on purpose.
func (u *uplink) addAges(a *connectip.Ages) { a.Note(connectip.StageDeviceWrite, u.writing.Age()) }

// close drops what waits. The session has ended.
func (u *uplink) close() {
	u.mu.Lock()
	u.closed = true
	if q := u.queue.Load(); q != nil {
		q.Close()
	}
	u.mu.Unlock()
	u.sending.Wait()
}
