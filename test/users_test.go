package test

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
)

// editUser replaces from by to in the users file, which has one user.
func (p *pair) editUser(from, to string) {
	p.t.Helper()
	path := filepath.Join(p.dir, "users.toml")
	b, err := os.ReadFile(path)
	check(p.t, err)
	if !strings.Contains(string(b), from) {
		p.t.Fatalf("%q is not in the users file:\n%s", from, b)
	}
	check(p.t, os.WriteFile(path+".new", []byte(strings.Replace(string(b), from, to, 1)), 0o600))
	check(p.t, os.Rename(path+".new", path))
}

// user returns the fields of the only user in the output of `user list`.
func (p *pair) user() (u struct {
	Expired   bool
	Connected *int
}) {
	p.t.Helper()
	list := []any{&u}
	check(p.t, json.Unmarshal([]byte(p.must(p.Proxy, "masque-proxy", "user", "list", "-c",
		p.config(), "--json")), &list))
	return u
}

// A session ends when its user expires or is removed. The client reports it and
// does not reconnect. The log of the proxy has the reason.
func TestUserExpiry(t *testing.T) {
	for name, tc := range map[string]struct {
		end    func(*pair)
		reason string // in the log
		class  string // failure class of the next request in the log
		listed bool   // the users file still has the user
	}{
		"expired": {func(p *pair) {
			p.editUser("created =", "expires = 2026-01-02T15:04:05Z\ncreated =")
		}, "the user's time is over", "expired_user", true},
		"expires": {func(p *pair) {
			p.editUser("created =",
				"expires = "+time.Now().Add(2*time.Second).UTC().Format(time.RFC3339)+"\ncreated =")
		}, "the user's time is over", "expired_user", true},
		"removed": {func(p *pair) {
			p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
		}, "the user was removed", "unknown_user", false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, options{client: "\n[reconnect]\nmax_delay = \"1s\"\n"})
			before := p.snapshot(p.Client)
			file := p.invite("alice")
			p.up(p.Client, file)
			if n := p.user().Connected; n == nil || *n != 1 {
				t.Errorf("%v sessions are listed", n)
			}
			tc.end(p)
			p.eventually("the client has given up", func() bool {
				c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
				_ = c.Run()
				return c.ExitCode() == 3
			})
			// The client ends by itself; `down` waits for it.
			_ = p.Client.Command(p.ctx, program("masque-client"), "down", "alice").Run()
			p.wantUnchanged(p.Client, before)
			c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", file)
			if out, _ := c.CombinedOutput(); c.ExitCode() != 4 ||
				!strings.Contains(lastLine(out), "credentials") {
				t.Errorf("exit code %d, want 4:\n%s", c.ExitCode(), out)
			}
			log := p.log(p.server)
			for _, want := range []string{tc.reason, "authentication failed", "class=" + tc.class,
				"user=alice"} {
				if !strings.Contains(log, want) {
					t.Errorf("%q is not in the log:\n%s", want, log)
				}
			}
			if tc.listed && !p.user().Expired {
				t.Error("the user is not listed as expired")
			}
		})
	}
}

// A user reaches only the routes in the users file, and changes to them take
// effect in the session.
func TestUserRoutes(t *testing.T) {
	other := netip.MustParseAddr("198.18.0.7") // an address of the target
	p := newPair(t, options{proxy: "\n[routes]\nadvertise = [\"192.0.2.0/24\", \"198.18.0.0/24\"]\n"})
	check(t, p.Target.AddAddr("lo", netip.PrefixFrom(other, 32)))
	check(t, p.Proxy.AddRoute(netip.PrefixFrom(other, 32), lab.TargetIPv4))
	file := p.invite("alice")
	p.editUser("created =", "routes = [\"192.0.2.0/24\"]\ncreated =")
	p.up(p.Client, file)
	before := p.status(p.Client, "alice")
	p.wantRoute(lab.TargetIPv4, "masque0")
	p.wantRoute(other, "eth0")
	p.ping(p.Client, lab.TargetIPv4)

	// The client may force other packets into the tunnel, and the proxy refuses
	// them.
	out, err := p.Client.Command(p.ctx, "ip", "route", "add", other.String(), "dev",
		"masque0").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.editUser(`routes = ["192.0.2.0/24"]`, `routes = ["192.0.2.0/24", "198.18.0.0/24"]`)
	p.eventually("the route is advertised", func() bool {
		return len(p.status(p.Client, "alice").Routes) > len(before.Routes)
	})
	p.ping(p.Client, other)
	p.editUser(`routes = ["192.0.2.0/24", "198.18.0.0/24"]`, `routes = ["198.18.0.0/24"]`)
	p.eventually("the client has removed the other route", func() bool {
		return len(p.status(p.Client, "alice").Routes) == len(before.Routes)
	})
	p.wantRoute(lab.TargetIPv4, "eth0")
	p.ping(p.Client, other)
	if s := p.status(p.Client, "alice"); s.Reconnects != 0 || !s.Since.Equal(before.Since) {
		t.Errorf("the session did not last: %+v", s)
	}
}

// A user with rate limits gets most of each rate and not more, in either
// direction. A user without limits is not slowed down.
func TestUserRates(t *testing.T) {
	const up, down = 10_000_000, 30_000_000 // bits per second
	p := newPair(t, options{})
	file := filepath.Join(t.TempDir(), "alice.toml")
	p.must(p.Proxy, "masque-proxy", "invite", "alice", "-c", p.config(), "-o", file, "--rate-up",
		"10Mbit", "--rate-down", "30Mbit")
	p.up(p.Client, file)
	port := 5201
	measure := func(args ...string) float64 {
		t.Helper()
		port++
		server := p.iperfServer(p.Target, strconv.Itoa(port))
		out, err := p.Client.Command(p.ctx, "iperf3",
			append(args, "-c", lab.TargetIPv4.String(), "-p", strconv.Itoa(port), "-t", "4",
				"-J")...).Output()
		if err != nil {
			t.Fatalf("iperf3: %v\n%s", err, out)
		}
		var r struct {
			End struct {
				SumReceived struct {
					BitsPerSecond float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			}
		}
		check(t, json.Unmarshal(out, &r))
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		defer cancel()
		_ = server.Stop(ctx)
		return r.End.SumReceived.BitsPerSecond
	}
	for _, tc := range []struct {
		name string
		rate float64
		args []string
	}{{"up", up, nil}, {"down", down, []string{"-R"}},
		{"up, four connections", up, []string{"-P", "4"}},
		{"down, UDP", down, []string{"-R", "-u", "-b", "60M"}},
		{"up, UDP", up, []string{"-u", "-b", "20M"}}} {
		t.Run(tc.name, func(t *testing.T) {
			got := measure(tc.args...)
			t.Logf("%.1f of %.0f Mbit/s, dropped %v", got/1e6, tc.rate/1e6, p.sessions()[0].Drops)
			if got > 1.1*tc.rate || got < tc.rate/3 {
				t.Errorf("%.1f Mbit/s at a rate of %.0f", got/1e6, tc.rate/1e6)
			}
		})
	}
	p.editUser(`rate_up = "10Mbit"`, "")
	p.eventually("the rate limit is removed", func() bool { return measure() > 2*up })
}
