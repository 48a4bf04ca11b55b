package proxy

import (
	"sync/atomic"
	"time"
)

const (
	// slack is how much of its rate a pacer keeps for later, as time: sleepers
	// wake late.
	slack = 20 * time.Millisecond
	// turn is how much of a rate is sent at once, as time: what was taken from
	// a queue to be sent is past what keeps it fair.
	turn = 2 * time.Millisecond
	// fullPacket is the size that turns are counted in, in bytes.
	fullPacket = 1400
)

// began is what pacers count time from.
var began = time.Now()

// pacer holds those who share it to a rate: a token bucket that is one number
// (GCRA), so that they share it without a lock. Each waits first, then sends
// what is there then, and says how much it was. The zero value holds nobody.
type pacer struct {
	rate atomic.Int64 // bits per second, 0 for no limit
	due  atomic.Int64 // when what was sent so far has taken its time, in nanoseconds
}

func (p *pacer) limited() bool { return p.rate.Load() > 0 }

// behind returns how long it takes until something may be sent.
func (p *pacer) behind() time.Duration {
	if !p.limited() {
		return 0
	}
	return max(0, time.Duration(p.due.Load())-time.Since(began))
}

// wait returns when something may be sent, or done is closed.
func (p *pacer) wait(done <-chan struct{}) {
	for d := p.behind(); d > 0; d = p.behind() {
		t := time.NewTimer(d)
		select {
		case <-done:
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// packets returns how many may be sent at once, at most limit.
func (p *pacer) packets(limit int) int {
	rate := p.rate.Load()
	if rate == 0 {
		return limit
	}
	n := rate / (fullPacket * 8) * int64(turn) / int64(time.Second)
	return int(min(max(n, 1), int64(limit)))
}

// spend notes that so many bytes were sent.
func (p *pacer) spend(bytes int) {
	rate := p.rate.Load()
	if rate == 0 {
		return
	}
	cost := int64(float64(bytes) * 8 / float64(rate) * float64(time.Second))
	from := int64(time.Since(began) - slack)
	for {
		due := p.due.Load()
		if p.due.CompareAndSwap(due, max(due, from)+cost) {
			return
		}
	}
}
