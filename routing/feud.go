package routing

import (
	"fmt"
	"time"
)

const (
	// patienceOfFeud is how often something is restored at once; others may
	// have several reasons to change it once.
	patienceOfFeud = 5
	// firstTruce and maxTruce are how long something stays as it is then,
	// before it is restored again.
	firstTruce = time.Second
	maxTruce   = 10 * time.Second
	// leakTruce is that of things without which packets leave in the clear.
	leakTruce = 250 * time.Millisecond
	// peace is how long something has to last to count as restored for good.
	peace = 30 * time.Second
)

// feud is the history of one kind of thing that this process restores and that
// another program may take away again each time.
type feud struct {
	maxTruce time.Duration
	attempts int       // in a row, without peace in between
	last     time.Time // time of the last repair
	what     string    // was done last
	err      error     // error of the last attempt
}

// due returns when the next attempt may be made.
func (f *feud) due(now time.Time) time.Time {
	if f.attempts == 0 || f.over(now) {
		return now
	}
	return f.last.Add(f.truce())
}

// truce is how long to wait after the last attempt.
func (f *feud) truce() time.Duration {
	n := f.attempts - patienceOfFeud
	if f.err != nil {
		n = f.attempts // nothing suggests that the next one goes better
	}
	if n <= 0 {
		return 0
	}
	return min(firstTruce<<min(n-1, 16), f.maxTruce)
}

// note notes an attempt.
func (f *feud) note(now time.Time, what string, err error) {
	if f.over(now) || f.err != nil && err == nil {
		f.attempts = 0
	}
	f.attempts++
	f.last, f.what, f.err = now, what, err
}

// settled notes that there is nothing to restore: where an attempt failed,
// somebody else has.
func (f *feud) settled() {
	if f.err != nil {
		f.err, f.attempts = nil, 0
	}
}

// over says whether what was restored has lasted.
func (f *feud) over(now time.Time) bool { return f.err == nil && now.Sub(f.last) >= peace }

// contested says whether another program takes away what was restored, again
// and again.
func (f *feud) contested(now time.Time) bool {
	return f.err == nil && f.attempts > patienceOfFeud && !f.over(now)
}

// problem says what is wrong and what to do, "" when nothing is.
func (f *feud) problem(now time.Time) string {
	switch {
	case f.err != nil:
		return fmt.Sprintf("another program changed this host's network, and it cannot be put right: %v", f.err)
	case f.contested(now):
		return fmt.Sprintf("another program undoes what the tunnel needs, again and again: stop it (put right last: %s)", f.what)
	}
	return ""
}

// until returns when the problem is gone if nothing happens any more; the zero
// time when there is none, or when it does not go away by itself.
func (f *feud) until(now time.Time) time.Time {
	if f.contested(now) {
		return f.last.Add(peace)
	}
	return time.Time{}
}
