package routing

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// Something that is taken away once a second is put back at once a few times,
// then less and less often, and that is a problem as long as it goes on; when
// it has lasted, all is as at the start.
func TestBackoffAfterRepeatedChanges(t *testing.T) {
	b := backoff{maxDelay: maxDelay}
	now := time.Now()
	begin := now
	var waits []time.Duration
	repairs := 0
	for tick := range 120 { // taken away now
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
	if limit := 4 + int(now.Sub(begin)/maxDelay) + immediateRepairs; repairs > limit {
		t.Errorf("%d repairs in %v, want at most %d; the waits were %v", repairs, now.Sub(begin),
			limit, waits)
	}
	if last := waits[len(waits)-1]; last != maxDelay {
		t.Errorf("the last wait was %v, want %v", last, maxDelay)
	}
	if until := b.clearsAt(now); !until.Equal(b.last.Add(stableTime)) {
		t.Errorf("the problem lasts until %v, want %v", until.Sub(begin),
			b.last.Add(stableTime).Sub(begin))
	}
	now = b.last.Add(stableTime)
	if b.problem(now) != "" || b.due(now).After(now) {
		t.Errorf("after %v: problem %q, next repair at %v", stableTime, b.problem(now), b.due(now))
	}
	if b.record(now, "add it", nil); b.problem(now) != "" {
		t.Error("one more repair is a problem at once")
	}
}

// What cannot be put back is tried again, less and less often, and is a problem
// until it is there.
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
		now = now.Add(time.Hour) // failures do not age
	}
	b.resolved()
	if b.problem(now) != "" || b.due(now).After(now) {
		t.Errorf("after somebody else did it: problem %q, next repair at %v", b.problem(now),
			b.due(now))
	}
	b.record(now, "", errors.New("no memory"))
	if b.record(now, "add it", nil); b.problem(now) != "" {
		t.Errorf("after success: problem %q", b.problem(now))
	}
}

// Without rules and routes packets leave in the clear: these do not stay away
// for long, whatever takes them.
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
				t.Errorf("the pause is %v, want %v", got, tt.want)
			}
		})
	}
}
