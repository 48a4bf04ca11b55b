package routing

import (
	"fmt"
	"time"
)

const (
	// immediateRepairs is the number of repairs in a row that are made without
	// delay. Another program may have several reasons to make a change once.
	immediateRepairs = 5

	// firstDelay and maxDelay are the first and the longest delay of later
	// repairs.
	firstDelay = time.Second
	maxDelay   = 10 * time.Second

	// leakDelay replaces maxDelay for objects without which packets leave
	// outside the tunnel.
	leakDelay = 250 * time.Millisecond

	// stableTime is the time after which a repair counts as lasting.
	stableTime = 30 * time.Second
)

// backoff delays the repairs of one kind of object when another program undoes
// each of them, or when they fail.
type backoff struct {
	maxDelay time.Duration

	attempts int       // in a row
	last     time.Time // time of the last attempt
	change   string    // last repair
	err      error     // error of the last attempt
}

// due returns the time of the next attempt.
func (b *backoff) due(now time.Time) time.Time {
	if b.attempts == 0 || b.expired(now) {
		return now
	}
	return b.last.Add(b.delay())
}

// delay returns the time between the last attempt and the next one.
func (b *backoff) delay() time.Duration {
	n := b.attempts - immediateRepairs
	if b.err != nil {
		n = b.attempts // an immediate retry would probably fail too
	}
	if n <= 0 {
		return 0
	}
	return min(firstDelay<<min(n-1, 16), b.maxDelay)
}

// record records an attempt.
func (b *backoff) record(now time.Time, change string, err error) {
	if b.expired(now) || b.err != nil && err == nil {
		b.attempts = 0
	}
	b.attempts++
	b.last, b.change, b.err = now, change, err
}

// resolved records that no repair is needed. If the last attempt failed,
// another program has made the repair.
func (b *backoff) resolved() {
	if b.err != nil {
		b.err, b.attempts = nil, 0
	}
}

// expired reports whether the last repair has lasted.
func (b *backoff) expired(now time.Time) bool {
	return b.err == nil && now.Sub(b.last) >= stableTime
}

// contested reports whether another program undoes each repair.
func (b *backoff) contested(now time.Time) bool {
	return b.err == nil && b.attempts > immediateRepairs && !b.expired(now)
}

// problem returns a text for Health.Problem, or "".
func (b *backoff) problem(now time.Time) string {
	switch {
	case b.err != nil:
		return fmt.Sprintf("another program changed this host's network, and it cannot be put right: %v", b.err)
	case b.contested(now):
		return fmt.Sprintf("another program undoes what the tunnel needs, again and again: stop it (put right last: %s)", b.change)
	}
	return ""
}

// clearsAt returns the time at which the problem disappears if no repair is
// needed until then. It is zero if there is no problem or if it does not
// disappear by itself.
func (b *backoff) clearsAt(now time.Time) time.Time {
	if b.contested(now) {
		return b.last.Add(stableTime)
	}
	return time.Time{}
}
