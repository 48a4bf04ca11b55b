// Package worker runs functions in goroutines that exist only while there is
// work. A waiting goroutine takes some 3 KB, and a proxy with thousands of idle
// sessions would have several in each. Starting a goroutine takes no longer
// than waking one.
package worker

import "sync/atomic"

// closed is added to Worker.pending by Close. It exceeds any possible number of
// calls of Wake.
const closed = 1 << 62

// Worker runs a function in its own goroutine each time it is woken. Runs do
// not overlap.
type Worker struct {
	do func()

	// run is w.work, stored in a field so that starting it does not allocate.
	run func()

	// pending counts calls of Wake since the goroutine started. It is 0 while
	// there is no goroutine, and at least closed after Close.
	pending atomic.Int64

	// ended is closed by the goroutine that ends after Close.
	ended chan struct{}
}

// New returns a Worker for do. Each run of do must do all the work there is.
func New(do func()) *Worker {
	w := &Worker{do: do, ended: make(chan struct{})}
	w.run = w.work
	return w
}

// Wake makes sure that a run of do begins after this call. It neither waits for
// the run nor takes a lock. It does nothing after Close.
func (w *Worker) Wake() {
	if w.pending.Add(1) == 1 {
		go w.run()
	}
}

// work runs do until no more calls of Wake are pending.
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

// Idle reports whether a run of do that began after the last Wake has returned.
func (w *Worker) Idle() bool { return w.pending.Load() == 0 }

// Close prevents further runs of do and waits for a running one. It must not be
// called twice.
func (w *Worker) Close() {
	if w.pending.Add(closed) != closed {
		<-w.ended
	}
}
