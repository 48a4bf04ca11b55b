// Package auththrottle delays the answers to failed attempts to authenticate,
// so that guessing is slow.
//
// A failure belongs to one or more keys, such as the address of the client and
// the name of the user. Each key may fail a number of times without delay.
// Later failures wait longer and longer, up to a bound. Successful attempts are
// not delayed, even if they share a key with a guesser.
package auththrottle

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// Burst is the number of failures of one key that are answered at once.
	Burst = 20

	// failureRate is the number of failures of one key that are answered per
	// second after that.
	failureRate = 1

	// maxDelay is the longest delay of one answer.
	maxDelay = 5 * time.Second

	// maxWaiting is the number of answers that may wait at the same time.
	maxWaiting = 1024

	// maxKeys is the number of keys in each of the two maps of a Throttle.
	maxKeys = 4096

	// forgetAfter is the time after which a key without failures has its full
	// burst again, so that it need not be remembered.
	forgetAfter = Burst / failureRate * time.Second
)

// Throttle counts failures by key. The zero value is ready to use. Its methods
// may be called concurrently.
type Throttle struct {
	now func() time.Time // nil: time.Now

	mu sync.Mutex // guards the fields below

	// recent holds the keys with failures since the time since. The map before
	// it is older; dropping that map forgets its keys without visiting each.
	recent, older map[string]*rate.Limiter
	since         time.Time

	waiting int // answers between Begin and End
}

// Begin counts a failure of each key that is not empty, and returns the delay
// before the answer. The caller calls End after the delay. If ok is false, too
// many answers wait already: the caller gives up this one and does not call
// End.
func (t *Throttle) Begin(keys ...string) (delay time.Duration, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.now != nil {
		now = t.now()
	}
	for _, key := range keys {
		if key != "" {
			delay = max(delay, t.count(key, now))
		}
	}
	if t.waiting >= maxWaiting {
		return 0, false
	}
	t.waiting++
	return delay, true
}

// End ends the wait of an answer.
func (t *Throttle) End() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting--
}

// count counts a failure of key and returns its delay. t.mu is held.
func (t *Throttle) count(key string, now time.Time) time.Duration {
	if len(t.recent) >= maxKeys || now.Sub(t.since) >= forgetAfter {
		t.recent, t.older, t.since = make(map[string]*rate.Limiter), t.recent, now
	}
	l := t.recent[key]
	if l == nil {
		if l = t.older[key]; l == nil {
			l = rate.NewLimiter(failureRate, Burst)
		}
		t.recent[key] = l
	}
	r := l.ReserveN(now, 1)
	d := r.DelayFrom(now)
	if d > maxDelay {
		r.CancelAt(now) // otherwise the debt would grow without bound
		d = maxDelay
	}
	return d
}
