package routing

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// An object that is removed every second is repaired immediately a few times
// and then less and less often. This is a problem until the object was left
// alone for stableTime.
func TestBackoffAfterRepeatedChanges(t *testing.T) {
	b := backoff{maxDelay: maxDelay}
	now := time.Now()
	start := now
	var waits []time.Duration
	repairs := 0
	for tick := range 120 { // the object is removed
		if b.due(now).After(now) {
			now = now.Add(time.Second)
			continue
		}
		if tick > 0 {
			waits = append(waits, now.Sub(b.last))
		}
		b.record(now, "add it", nil)
		repairs++
		if got, want := b.problem(now) != "", repairs > immediateRepairs; got != want {
			t.Errorf("repair %d: a problem: %t, want %t", repairs, got, want)
		}
		now = now.Add(time.Second)
	}
	if limit := 4 + int(now.Sub(start)/maxDelay) + immediateRepairs; repairs > limit {
		t.Errorf("%d repairs in %v, want at most %d; the waits were %v", repairs, now.Sub(start),
			limit, waits)
	}
	if last := waits[len(waits)-1]; last != maxDelay {
		t.Errorf("the last wait was %v, want %v", last, maxDelay)
	}
	if until := b.clearsAt(now); !until.Equal(b.last.Add(stableTime)) {
		t.Errorf("the problem lasts until %v, want %v", until.Sub(start),
			b.last.Add(stableTime).Sub(start))
	}
	now = b.last.Add(stableTime)
	if b.problem(now) != "" || b.due(now).After(now) {
		t.Errorf("after %v: problem %q, next repair at %v", stableTime, b.problem(now), b.due(now))
	}
	if b.record(now, "add it", nil); b.problem(now) != "" {
		t.Error("one more repair is a problem at once")
	}
}

// A failed repair is tried again, less and less often. It is a problem until it
// succeeds or another program makes the repair.
func TestBackoffAfterFailures(t *testing.T) {
	b := backoff{maxDelay: maxDelay}
	now := time.Now()
	for _, want := range []time.Duration{1, 2, 4, 8, 10, 10} {
		b.record(now, "", errors.New("no memory"))
		if got := b.due(now).Sub(now); got != want*time.Second {
			t.Errorf("tried again after %v, want %v", got, want*time.Second)
		}
		if b.problem(now) == "" {
			t.Error("no problem")
		}
		now = now.Add(time.Hour) // time does not reset the delay of a failure
	}
	b.resolved()
	if b.problem(now) != "" || b.due(now).After(now) {
		t.Errorf("after another program made the repair: problem %q, next repair at %v",
			b.problem(now), b.due(now))
	}
	b.record(now, "", errors.New("no memory"))
	if b.record(now, "add it", nil); b.problem(now) != "" {
		t.Errorf("after success: problem %q", b.problem(now))
	}
}

// Packets leave outside the tunnel while rules and routes are missing, so the
// delay for them is short.
func TestLongestDelays(t *testing.T) {
	for _, tt := range []struct {
		kind string
		err  error
		want time.Duration
	}{
		{kindRule, nil, leakDelay},
		{kindRoute, nil, leakDelay},
		{kindTable, nil, leakDelay},
		{kindLink, nil, leakDelay},
		{kindAddress, nil, leakDelay},
		{kindMTU, nil, maxDelay},
		{kindSysctl, nil, maxDelay},
		{kindRule, errors.New("no memory"), maxDelay},
	} {
		t.Run(fmt.Sprint(tt.kind, ", ", tt.err), func(t *testing.T) {
			b := backoff{maxDelay: maxDelayOf(tt.kind, tt.err)}
			now := time.Now()
			for range 50 {
				b.record(now, "add it", tt.err)
			}
			if got := b.due(now).Sub(now); got != tt.want {
				t.Errorf("the delay is %v, want %v", got, tt.want)
			}
		})
	}
}
