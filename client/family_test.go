package client

import (
	"bytes"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestWholeTunnel(t *testing.T) {
	both := prefixes("0.0.0.0/0", "::/0")
	for name, tc := range map[string]struct {
		cfg                 Config
		routes, addrs, want []netip.Prefix
		family              string // that is unreachable
		beside              string // that leaves outside the tunnel
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
		"not everything": {Config{Accept: both}, prefixes("192.0.2.0/24"), prefixes("10.77.0.2/32"),
			prefixes("192.0.2.0/24"), "", ""},
		"everything but a part": {Config{Accept: both},
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
				if got := s.holdMissingFamily(slices.Clone(tc.routes), tc.addrs); !slices.Equal(got, tc.want) {
					t.Errorf("%v, want %v", got, tc.want)
				}
			}
			switch lines := strings.Count(log.String(), "\n"); {
			case tc.family+tc.beside == "" && lines != 0, tc.family+tc.beside != "" && lines != 1,
				tc.family != "" && !strings.Contains(log.String(), "family="+tc.family):
				t.Errorf("the log has\n%s", log.String())
			}
			want := ""
			switch {
			case tc.family != "":
				want = tc.family + " is unreachable: all traffic goes through the tunnel"
			case tc.beside != "":
				want = tc.beside + " leaves this host outside the tunnel"
			}
			if said := strings.Join(c.status.Warnings, "\n"); (said == "") != (want == "") ||
				!strings.HasPrefix(said, want) {
				t.Errorf("the warnings are %q, want %q", said, want)
			}
		})
	}
}
