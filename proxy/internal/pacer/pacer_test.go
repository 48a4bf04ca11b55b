package pacer

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestPacer checks that senders send at the rate together, and each a fair
// share.
func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const senders, size, rate, seconds = 4, 1000, 800_000, 10 // 100 packets a second
		var p Pacer
		p.SetRate(rate)
		p.due.Store(int64(time.Since(epoch))) // epoch is outside of the bubble
		done := make(chan struct{})
		var sent [senders]int
		var wg sync.WaitGroup
		for i := range senders {
			wg.Go(func() {
				for {
					p.Wait(done)
					select {
					case <-done:
						return
					default:
					}
					sent[i]++
					p.Spend(size)
				}
			})
		}
		time.Sleep(seconds * time.Second)
		close(done)
		wg.Wait()
		total := 0
		for i, n := range sent {
			total += n
			if n < rate/8/size*seconds/senders/2 {
				t.Errorf("sender %d sent %d packets, all sent %v", i, n, sent)
			}
		}
		// Each sender may be one packet early, and the slack is available at
		// the start.
		if want := rate / 8 / size * seconds; total < want || total > want+senders+3 {
			t.Errorf("%d packets in %d seconds, want %d", total, seconds, want)
		}
	})
}

func TestPacerWithoutRate(t *testing.T) {
	var p Pacer
	p.Spend(1 << 30)
	p.Wait(nil)
	if p.Delay() != 0 || p.Limited() || p.Batch(16) != 16 {
		t.Error("the zero value limits senders")
	}
}

func TestBatch(t *testing.T) {
	const limit = 16
	for rate, want := range map[int64]int{64_000: 1, 10_000_000: 1, 20_000_000: 3,
		1_000_000_000: limit} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			var p Pacer
			p.SetRate(rate)
			if got := p.Batch(limit); got != want {
				t.Errorf("at %d bits per second: got %d packets, want %d", rate, got, want)
			}
		})
	}
}

func TestWaitUntilDone(t *testing.T) {
	done := make(chan struct{})
	close(done)
	var p Pacer
	p.SetRate(64_000)
	p.Spend(1 << 30)
	p.Wait(done)
}
