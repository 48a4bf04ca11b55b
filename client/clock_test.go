package client

import (
	"crypto/tls"
	"testing"
	"time"
)

// Certificates are verified for the host's time, but never for a time before
// the program was built.
func TestNotBefore(t *testing.T) {
	built := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct{ now, built, want time.Time }{
		"right":              {built.Add(time.Hour), built, built.Add(time.Hour)},
		"behind":             {time.Unix(0, 0), built, built},
		"unknown build time": {time.Unix(0, 0), time.Time{}, time.Unix(0, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			if got := notBefore(tc.now, tc.built); !got.Equal(tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

// A configured clock takes precedence over the host's clock and counts as
// synchronised.
func TestConfiguredClock(t *testing.T) {
	at := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	c := newClock(&tls.Config{Time: func() time.Time { return at }})
	if !c.now().Equal(at) || !c.synchronised() {
		t.Errorf("now %v, synchronised %t", c.now(), c.synchronised())
	}
	if now := newClock(nil).now(); now.Before(time.Now().Add(-time.Minute)) {
		t.Errorf("the clock without a configuration is at %v", now)
	}
}
