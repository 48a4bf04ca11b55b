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
func TestFeudWithAProgramThatRepeatsItself(t *testing.T) {
	f := feud{maxTruce: maxTruce}
	now := time.Now()
	begin := now
	var waits []time.Duration
	repairs := 0
	for tick := range 120 { // taken away now
		if f.due(now).After(now) {
			now = now.Add(time.Second)
			continue
		}
		if tick > 0 {
			waits = append(waits, now.Sub(f.last))
		}
		f.note(now, "add it", nil)
		repairs++
		if got, want := f.problem(now) != "", repairs > patienceOfFeud; got != want {
			t.Errorf("repair %d: a problem: %t, want %t", repairs, got, want)
		}
		now = now.Add(time.Second)
	}
	if limit := 4 + int(now.Sub(begin)/maxTruce) + patienceOfFeud; repairs > limit {
		t.Errorf("%d repairs in %v, want at most %d; the waits were %v", repairs, now.Sub(begin),
			limit, waits)
	}
	if last := waits[len(waits)-1]; last != maxTruce {
		t.Errorf("the last wait was %v, want %v", last, maxTruce)
	}
	if until := f.until(now); !until.Equal(f.last.Add(peace)) {
		t.Errorf("the problem lasts until %v, want %v", until.Sub(begin),
			f.last.Add(peace).Sub(begin))
	}
	now = f.last.Add(peace)
	if f.problem(now) != "" || f.due(now).After(now) {
		t.Errorf("after %v: problem %q, next repair at %v", peace, f.problem(now), f.due(now))
	}
	if f.note(now, "add it", nil); f.problem(now) != "" {
		t.Error("one more repair is a problem at once")
	}
}

// What cannot be put back is tried again, less and less often, and is a problem
// until it is there.
func TestFeudWithoutSuccess(t *testing.T) {
	f := feud{maxTruce: maxTruce}
	now := time.Now()
	for _, want := range []time.Duration{1, 2, 4, 8, 10, 10} {
		f.note(now, "", errors.New("no memory"))
		if got := f.due(now).Sub(now); got != want*time.Second {
			t.Errorf("tried again after %v, want %v", got, want*time.Second)
		}
		if f.problem(now) == "" {
			t.Error("no problem")
		}
		now = now.Add(time.Hour) // failures do not age
	}
	f.settled()
	if f.problem(now) != "" || f.due(now).After(now) {
		t.Errorf("after somebody else did it: problem %q, next repair at %v", f.problem(now),
			f.due(now))
	}
	f.note(now, "", errors.New("no memory"))
	if f.note(now, "add it", nil); f.problem(now) != "" {
		t.Errorf("after success: problem %q", f.problem(now))
	}
}

// Without rules and routes packets leave in the clear: these do not stay away
// for long, whatever takes them.
func TestTruces(t *testing.T) {
	for _, tt := range []struct {
		kind string
		err  error
		want time.Duration
	}{
		{kindRule, nil, leakTruce},
		{kindRoute, nil, leakTruce},
		{kindTable, nil, leakTruce},
		{kindLink, nil, leakTruce},
		{kindAddress, nil, leakTruce},
		{kindMTU, nil, maxTruce},
		{kindSysctl, nil, maxTruce},
		{kindRule, errors.New("no memory"), maxTruce},
	} {
		t.Run(fmt.Sprint(tt.kind, ", ", tt.err), func(t *testing.T) {
			f := feud{maxTruce: truceFor(tt.kind, tt.err)}
			now := time.Now()
			for range 50 {
				f.note(now, "add it", tt.err)
			}
			if got := f.due(now).Sub(now); got != tt.want {
				t.Errorf("the pause is %v, want %v", got, tt.want)
			}
		})
	}
}
