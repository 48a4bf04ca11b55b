package worker

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestWake checks that a run of do begins after each Wake and that runs do not
// overlap.
func TestWake(t *testing.T) {
	var todo, done, running atomic.Int64
	w := New(func() {
		if running.Add(1) != 1 {
			t.Error("two runs of do overlap")
		}
		done.Add(todo.Swap(0))
		running.Add(-1)
	})
	const wakers, each = 4, 10_000
	var wg sync.WaitGroup
	for range wakers {
		wg.Go(func() {
			for range each {
				todo.Add(1)
				w.Wake()
			}
		})
	}
	wg.Wait()
	for !w.Idle() {
		runtime.Gosched()
	}
	if n := done.Load(); n != wakers*each {
		t.Errorf("%d of %d tasks are done when the Worker is idle", n, wakers*each)
	}
	w.Close()
}

// TestIdle checks that an idle Worker has no goroutine.
func TestIdle(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 100 {
		w := New(func() {})
		w.Wake()
		for !w.Idle() {
			runtime.Gosched()
		}
	}
	for runtime.NumGoroutine() > before {
		runtime.Gosched()
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		proceed := make(chan struct{})
		w := New(func() {
			calls++
			<-proceed
		})
		w.Wake()
		synctest.Wait()
		if w.Idle() {
			t.Error("Idle() = true while do runs")
		}
		w.Wake()
		closed := make(chan struct{})
		go func() {
			w.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close did not wait for the running do")
		default:
		}
		close(proceed)
		<-closed
		w.Wake()
		synctest.Wait()
		if calls != 1 {
			t.Errorf("do ran %d times, want 1, because no run begins after Close", calls)
		}

		w = New(func() { t.Error("do ran after Close") })
		w.Close() // does not wait
		w.Wake()
		synctest.Wait()
	})
}

func TestAllocations(t *testing.T) {
	w := New(func() {})
	if n := testing.AllocsPerRun(100, func() {
		w.Wake()
		for !w.Idle() {
			runtime.Gosched()
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkWake(b *testing.B) {
	w := New(func() {})
	for b.Loop() {
		w.Wake()
		for !w.Idle() {
			runtime.Gosched()
		}
	}
}
