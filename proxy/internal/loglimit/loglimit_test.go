package loglimit

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLogIsBounded checks that the number of lines of a message is bounded, and
// that a later line has the number of lines that were left out.
func TestLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := New(slog.New(slog.NewTextHandler(&out, nil)))
		session := log.With("session", 1).WithGroup("g")
		for range 10 * messageBurst {
			log.Info("request refused", "reason", "no")
			session.Info("session ended")
		}
		if n := strings.Count(out.String(), "\n"); n != 2*messageBurst {
			t.Errorf("%d lines, want %d", n, 2*messageBurst)
		}
		out.Reset()
		time.Sleep(time.Second)
		for range 10 * messageBurst {
			log.Info("request refused")
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if want := fmt.Sprintf("left_out_before=%d", 9*messageBurst); len(lines) != messageRate ||
			!strings.Contains(lines[0], want) || strings.Contains(lines[1], "left_out") {
			t.Errorf("%d lines, the first %q, want %d with %s", len(lines), lines[0],
				messageRate, want)
		}
	})
}

// TestLogOfOthers checks that a flood from one source hides no line of another
// source, whether the source is a user, an address or a network.
func TestLogOfOthers(t *testing.T) {
	for _, tc := range []struct {
		name           string
		flood, another func(*slog.Logger)
	}{
		{"user", func(l *slog.Logger) {
			l.With("user", "mallory").Warn("m", "who", "flood")
		}, func(l *slog.Logger) { l.With("user", "alice").Warn("m", "who", "other") }},
		{"address", func(l *slog.Logger) {
			l.Warn("m", "remote", "192.0.2.1:1", "who", "flood")
		}, func(l *slog.Logger) { l.Warn("m", "remote", "192.0.2.2:1", "who", "other") }},
		{"network", func(l *slog.Logger) {
			l.Warn("m", "remote", "[2001:db8::1]:1", "who", "flood")
		}, func(l *slog.Logger) { l.Warn("m", "remote", "[2001:db8:0:1::1]:1", "who", "other") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				log := New(slog.New(slog.NewTextHandler(&out, nil)))
				const seconds = 100
				for range seconds {
					for range messageBurst {
						tc.flood(log)
					}
					tc.another(log)
					time.Sleep(time.Second)
				}
				if got := strings.Count(out.String(), "who=other"); got != seconds {
					t.Errorf("%d lines of another client, want %d", got, seconds)
				}
				if got, most := strings.Count(out.String(), "who=flood"),
					sourceBurst+seconds*sourceRate; got > most {
					t.Errorf("%d lines of the flood, want %d at most", got, most)
				}
			})
		})
	}
}

// TestLogSourcesAreBounded checks that the number of remembered sources is
// bounded.
func TestLogSourcesAreBounded(t *testing.T) {
	k := newLimits()
	for i := range 10 * maxSources {
		k.allow(cause{"m", fmt.Sprint(i)})
	}
	if n := len(k.recent) + len(k.older); n > 2*maxSources {
		t.Errorf("%d sources are kept, want %d at most", n, 2*maxSources)
	}
}
