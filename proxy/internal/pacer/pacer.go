// Package pacer holds several senders together to one rate.
//
// A sender calls [Pacer.Wait], sends at most [Pacer.Batch] packets, and reports
// their size with [Pacer.Spend]. Senders that are late may catch up by a few
// milliseconds.
package pacer

import (
	"sync/atomic"
	"time"
)

const (
	// slack is the time that senders may catch up: a sleeping goroutine wakes
	// late.
	slack = 20 * time.Millisecond

	// turn is the time that a batch takes at the rate. Batches are short
	// because packets taken from a fair queue no longer give way to others.
	turn = 2 * time.Millisecond

	// fullPacket is the size in bytes of the packets that Batch counts.
	fullPacket = 1400
)

// epoch is the zero of all times in a Pacer. Differences to it are monotonic.
var epoch = time.Now()

// Pacer is a token bucket in the form of a single time (GCRA), so that senders
// share it without a lock. The zero value has no limit. Its methods may be
// called concurrently.
type Pacer struct {
	// rate is in bits per second. 0 means no limit.
	rate atomic.Int64

	// due is the time at which the bytes spent so far are sent at the rate, in
	// nanoseconds since epoch.
	due atomic.Int64
}

// SetRate sets the rate in bits per second. 0 means no limit.
func (p *Pacer) SetRate(rate int64) { p.rate.Store(rate) }

// Rate returns the rate in bits per second. 0 means no limit.
func (p *Pacer) Rate() int64 { return p.rate.Load() }

// Limited reports whether there is a rate.
func (p *Pacer) Limited() bool { return p.Rate() > 0 }

// Due returns the time at which the bytes spent so far are sent at the rate. It
// is in the past if senders use less than the rate.
func (p *Pacer) Due() time.Time { return epoch.Add(time.Duration(p.due.Load())) }

// Delay returns the time until a sender may send.
func (p *Pacer) Delay() time.Duration {
	if !p.Limited() {
		return 0
	}
	return max(0, time.Until(p.Due()))
}

// Wait returns when the caller may send or done is closed.
func (p *Pacer) Wait(done <-chan struct{}) {
	for d := p.Delay(); d > 0; d = p.Delay() {
		t := time.NewTimer(d)
		select {
		case <-done:
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// Batch returns the number of packets to send after one Wait, from 1 to limit.
func (p *Pacer) Batch(limit int) int {
	rate := p.Rate()
	if rate == 0 {
		return limit
	}
	n := rate / (fullPacket * 8) * int64(turn) / int64(time.Second)
	return int(min(max(n, 1), int64(limit)))
}

// Spend notes that the caller sends the given number of bytes.
func (p *Pacer) Spend(bytes int) {
	rate := p.Rate()
	if rate == 0 {
		return
	}
	cost := int64(float64(bytes) * 8 / float64(rate) * float64(time.Second))
	earliest := int64(time.Since(epoch) - slack)
	for {
		due := p.due.Load()
		if p.due.CompareAndSwap(due, max(due, earliest)+cost) {
			return
		}
	}
}
