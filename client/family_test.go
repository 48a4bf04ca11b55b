package client

import (
	"bytes"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// In a full tunnel, the accepted routes of a family without an address are held
// in the tunnel. The log and the status name the family, the log once.
func TestHoldMissingFamily(t *testing.T) {
	both := prefixes("0.0.0.0/0", "::/0")
	for name, tc := range map[string]struct {
		cfg                 Config
		routes, addrs, want []netip.Prefix
		held                string // family that the warning calls unreachable
		outside             string // family that the warning finds outside the tunnel
	}{
		"both families": {Config{Accept: both}, both, prefixes("10.77.0.2/32", "fd77::2/128"),
			both, "", ""},
		"IPv4 alone": {Config{Accept: both}, prefixes("0.0.0.0/0"), prefixes("10.77.0.2/32"),
			both, "IPv6", ""},
		"IPv6 alone": {Config{Accept: both}, prefixes("::/0"), prefixes("fd77::2/128"),
			prefixes("::/0", "0.0.0.0/0"), "IPv4", ""},
		"advertised anyway": {Config{Accept: both}, both, prefixes("10.77.0.2/32"), both,
			"IPv6", ""},
		"IPv6 not advertised": {Config{Accept: both}, prefixes("0.0.0.0/0"),
			prefixes("10.77.0.2/32", "fd77::2/128"),
			prefixes("0.0.0.0/0"), "", "IPv6"},
		"IPv6 not accepted": {Config{Accept: prefixes("0.0.0.0/0")}, prefixes("0.0.0.0/0"),
			prefixes("10.77.0.2/32"), prefixes("0.0.0.0/0"), "", ""},
		"split": {Config{Accept: both}, prefixes("192.0.2.0/24"), prefixes("10.77.0.2/32"),
			prefixes("192.0.2.0/24"), "", ""},
		"all but a part": {Config{Accept: both},
			prefixes("0.0.0.0/2", "64.0.0.0/2", "128.0.0.0/2"), prefixes("10.77.0.2/32"),
			prefixes("0.0.0.0/2", "64.0.0.0/2", "128.0.0.0/2", "::/0"), "IPv6", ""},
		"half": {Config{Accept: both}, prefixes("0.0.0.0/1"), prefixes("10.77.0.2/32"),
			prefixes("0.0.0.0/1"), "", ""},
		"most of IPv6 accepted": {Config{Accept: prefixes("0.0.0.0/0", "2000::/3")},
			prefixes("0.0.0.0/0"), prefixes("10.77.0.2/32"),
			prefixes("0.0.0.0/0", "2000::/3"), "IPv6", ""},
		"gateway": {Config{Accept: both, AdvertiseRoutes: prefixes("10.1.0.0/24")},
			prefixes("0.0.0.0/0"), prefixes("10.77.0.2/32"),
			prefixes("0.0.0.0/0"), "", "IPv6"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			tc.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			c := &Client{cfg: tc.cfg, notices: make(map[string]notice),
				changed: make(chan struct{})}
			s := &session{c: c}
			for range 3 {
				if got := s.holdMissingFamily(slices.Clone(tc.routes), tc.addrs); !slices.Equal(got,
					tc.want) {
					t.Errorf("got routes %v, want %v", got, tc.want)
				}
			}
			switch lines := strings.Count(log.String(), "\n"); {
			case tc.held+tc.outside == "" && lines != 0, tc.held+tc.outside != "" && lines != 1,
				tc.held != "" && !strings.Contains(log.String(), "family="+tc.held):
				t.Errorf("got log\n%s", log.String())
			}
			want := ""
			switch {
			case tc.held != "":
				want = tc.held + " is unreachable: all traffic goes through the tunnel"
			case tc.outside != "":
				want = tc.outside + " leaves this host outside the tunnel"
			}
			if got := strings.Join(c.status.Warnings, "\n"); (got == "") != (want == "") ||
				!strings.HasPrefix(got, want) {
				t.Errorf("got warnings %q, want %q", got, want)
			}
		})
	}
}
