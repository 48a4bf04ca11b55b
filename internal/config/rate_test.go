package config

import (
	"testing"
	"time"
)

func TestRates(t *testing.T) {
	for s, want := range map[string]int64{
		"64kbit": 64_000, "20Mbit": 20_000_000, "2.5gbit": 2_500_000_000, "1 Tbit": 0,
		"1000Gbit": 1_000_000_000_000, "1001Gbit": 0,
		"": 0, "20": 0, "Mbit": 0, "20M": 0, "20Mbps": 0, "20MByte": 0, "-20Mbit": 0, "1e3Mbit": 0,
		"0x10Mbit": 0, "infMbit": 0, "nanMbit": 0, "0Mbit": 0,
	} {
		t.Run(s, func(t *testing.T) {
			got, err := ParseRate(s)
			if got != want || (err == nil) != (want > 0) {
				t.Errorf("%q: %d, %v, want %d", s, got, err, want)
			}
			if again, err := ParseRate(FormatRate(want)); want > 0 &&
				(again != want || err != nil) {
				t.Errorf("%d: written as %s, read as %d, %v", want, FormatRate(want), again, err)
			}
		})
	}
}

// A date means its beginning in UTC. Empty routes permit nothing, missing
// routes permit everything.
func TestUserLimits(t *testing.T) {
	u, err := ParseUsers("users.toml",
		[]byte("[[user]]\nname = \"a\"\nexpires = 2026-12-31\nroutes = []\n[[user]]\nname = \"b\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	a, b := u.All()[0], u.All()[1]
	if want := time.Date(2026, 12, 31, 0, 0, 0, 0, time.UTC); !a.Expires.Equal(want) ||
		!b.Expires.IsZero() {
		t.Errorf("expire %v and %v, want %v and never", a.Expires, b.Expires, want)
	}
	if a.Routes == nil || len(a.Routes) > 0 || b.Routes != nil {
		t.Errorf("routes %#v and %#v", a.Routes, b.Routes)
	}
}
