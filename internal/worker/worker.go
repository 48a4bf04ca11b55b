// Package worker has goroutines that exist only while there is something to do. One that waits costs some 3 KB, of which a proxy with
// thousands of idle sessions would have several in each; to start one takes as long as to wake one.
package worker

import "sync/atomic"

// closed is added to Worker.pending by Close. Nobody wakes a Worker so often.
const closed = 1 << 62

// Worker does something whenever it is woken, in a goroutine of its own, never twice at the same time.
type Worker struct {
	do      func()
	run     func() // a field, so that starting it allocates nothing
	pending atomic.Int64
	ended   chan struct{} // closed by the last of its goroutines, when Close waits for it
}

// New returns a Worker that calls do, which does all that there is to do.
func New(do func()) *Worker {
	w := &Worker{do: do, ended: make(chan struct{})}
	w.run = w.work
	return w
}

// Wake has do called, once at least from now on. It does not wait for it, and takes no lock. It does nothing after Close.
func (w *Worker) Wake() {
	if w.pending.Add(1) == 1 {
		go w.run()
	}
}

func (w *Worker) work() {
	for {
		n := w.pending.Load()
		if n >= closed {
			close(w.ended)
			return
		}
		w.do()
		if w.pending.CompareAndSwap(n, 0) {
			return
		}
	}
}

// Idle reports whether do has returned since the last call of Wake.
func (w *Worker) Idle() bool { return w.pending.Load() == 0 }

// Close has do not called any more, and waits until it has returned. It may be called once.
func (w *Worker) Close() {
	if w.pending.Add(closed) != closed {
		<-w.ended
	}
}
