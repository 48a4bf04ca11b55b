package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
)

// dialWorld is a world for a dialer: the delegation file of example.org comes
// after a time, and servers answer after a time or never.
type dialWorld struct {
	*discoverytest.World
	fileAfter time.Duration
	dropped   bool                     // packets to the web server are lost
	servers   map[string]time.Duration // keyed by address; others fail
	start     time.Time
	dialed    []string // times and addresses
	asked     int      // resolutions
}

// newDialWorld returns a world in which example.org has the address 192.0.2.80,
// and delegates to 192.0.2.1 if there is a file.
func newDialWorld(hasFile bool) *dialWorld {
	w := &dialWorld{World: &discoverytest.World{DNS: map[string]discoverytest.Node{
		"example.org":     {A: []netip.Addr{netip.MustParseAddr("192.0.2.80")}},
		"vpn.example.net": {A: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
	}}, start: time.Now()}
	if hasFile {
		w.HTTPS = map[string]discoverytest.Page{"https://example.org" +
			discovery.FilePath: {Status: 200,
			Body: `{"masque.server": "vpn.example.net:443"}`}}
	}
	return w
}

// Lookup counts the resolutions of example.org.
func (w *dialWorld) Lookup(ctx context.Context, name string, t discovery.Type) (discovery.Answer,
	error) {
	if name == "_masque._udp.example.org" {
		w.asked++
	}
	return w.World.Lookup(ctx, name, t)
}

func (w *dialWorld) fetch(ctx context.Context, u *url.URL, addrs []netip.Addr) (*discovery.Response,
	error) {
	if !w.dropped {
		httptrace.ContextClientTrace(ctx).ConnectDone("tcp", addrs[0].String(), nil)
	}
	select {
	case <-time.After(w.fileAfter):
		return w.World.Fetch(ctx, u, addrs)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (w *dialWorld) dial(ctx context.Context, groups []discovery.Group) (*dial.Conn, error) {
	r := groups[0].Records[0]
	addr := r.Addresses[0].String()
	w.dialed = append(w.dialed, fmt.Sprintf("%v %s", time.Since(w.start), addr))
	after, ok := w.servers[addr]
	select {
	case <-time.After(after):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if !ok {
		return nil, &dial.Error{Failure: dial.Silence, Record: r, Err: errors.New("silence")}
	}
	return &dial.Conn{Record: r}, nil
}

// dialer returns a dialer to example.org in w.
func (w *dialWorld) dialer(t *testing.T) *dialer {
	to, err := parseProxy("example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	d := newDialer(to, nil, "", nil, slog.New(slog.DiscardHandler))
	d.resolver = w.Resolver()
	d.resolver.DNS, d.resolver.Fetch, d.resolver.Now = w, w.fetch, time.Now
	d.dialTo, d.closeConn = w.dial, func(*dial.Conn) {}
	d.hasRoute = func(netip.Addr) bool { return true }
	return d
}

// A slow delegation file slows down nobody: the servers found without it are
// dialed too, and the first of both wins. A server at the domain's own address
// is dialed at once, but waits half a second for a file whose web server is
// reached.
func TestSlowFile(t *testing.T) {
	const ms = time.Millisecond
	type servers = map[string]time.Duration
	for _, tt := range []struct {
		name      string
		fileAfter time.Duration
		noFile    bool
		dropped   bool // the web server is not reached
		srv       bool // the domain has an SRV record
		servers   servers
		dialed    string
		want      string // target of the server that wins; "" for none
		took      time.Duration
	}{
		{name: "fast", fileAfter: 50 * ms, servers: servers{"192.0.2.1": 50 * ms, "192.0.2.80": 0},
			dialed: "0s 192.0.2.80, 50ms 192.0.2.1", want: "vpn.example.net", took: 100 * ms},
		{name: "after 400 ms", fileAfter: 400 * ms,
			servers: servers{"192.0.2.1": 50 * ms, "192.0.2.80": 0},
			dialed:  "0s 192.0.2.80, 400ms 192.0.2.1", want: "vpn.example.net", took: 450 * ms},
		{name: "after 800 ms, the domain's own server is fast", fileAfter: 800 * ms,
			servers: servers{"192.0.2.1": 50 * ms, "192.0.2.80": 100 * ms}, dialed: "0s 192.0.2.80",
			want: "example.org", took: 500 * ms},
		{name: "after 800 ms, the domain's own server is slow", fileAfter: 800 * ms,
			servers: servers{"192.0.2.1": 50 * ms, "192.0.2.80": 900 * ms},
			dialed:  "0s 192.0.2.80, 800ms 192.0.2.1", want: "vpn.example.net", took: 850 * ms},
		{name: "after 800 ms, the domain has no server", fileAfter: 800 * ms,
			servers: servers{"192.0.2.1": 50 * ms}, dialed: "0s 192.0.2.80, 800ms 192.0.2.1",
			want: "vpn.example.net", took: 850 * ms},
		{name: "never, and the domain's own server is slow", fileAfter: time.Hour,
			servers: servers{"192.0.2.80": 4 * time.Second}, dialed: "0s 192.0.2.80",
			want: "example.org",
			took: 4 * time.Second},
		{name: "the network drops its packets", fileAfter: time.Hour, dropped: true,
			servers: servers{"192.0.2.80": 100 * ms}, dialed: "0s 192.0.2.80", want: "example.org",
			took: 100 * ms},
		{name: "there is none, which is known late", fileAfter: 800 * ms, noFile: true,
			servers: servers{"192.0.2.80": time.Second}, dialed: "0s 192.0.2.80",
			want: "example.org",
			took: time.Second},
		{name: "there is none, which is known soon", fileAfter: 200 * ms, noFile: true,
			servers: servers{"192.0.2.80": 100 * ms}, dialed: "0s 192.0.2.80", want: "example.org",
			took: 200 * ms},
		{name: "there is none, and no server", fileAfter: 800 * ms, noFile: true,
			dialed: "0s 192.0.2.80",
			took:   800 * ms},
		{name: "SRV, after 400 ms", fileAfter: 400 * ms, srv: true,
			servers: servers{"192.0.2.1": 50 * ms, "192.0.2.90": 0}, dialed: "400ms 192.0.2.1",
			want: "vpn.example.net", took: 450 * ms},
		{name: "SRV, never", fileAfter: time.Hour, srv: true, dropped: true,
			servers: servers{"192.0.2.90": 100 * ms}, dialed: "500ms 192.0.2.90",
			want: "p1.example.net",
			took: 600 * ms},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newDialWorld(!tt.noFile)
				w.fileAfter, w.servers, w.dropped = tt.fileAfter, tt.servers, tt.dropped
				if tt.srv {
					w.DNS["_masque._udp.example.org"] = discoverytest.Node{SRV: []string{"0 0 443 p1.example.net."}}
					w.DNS["p1.example.net"] = discoverytest.Node{A: []netip.Addr{netip.MustParseAddr("192.0.2.90")}}
				}
				c, err := w.dialer(t).connect(t.Context())
				took, got := time.Since(w.start), ""
				if err == nil {
					got = c.Record.Target
				}
				if got != tt.want || took != tt.took {
					t.Errorf("got %q (%v) after %v, want %q after %v", got, err, took, tt.want,
						tt.took)
				}
				if dialed := strings.Join(w.dialed, ", "); dialed != tt.dialed {
					t.Errorf("dialed %s, want %s", dialed, tt.dialed)
				}
			})
		})
	}
}

// With signatures required, nobody is dialed before the file has decided.
func TestSlowFileWithDNSSEC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDialWorld(true)
		w.Signed = []string{"example.org", "vpn.example.net"}
		w.fileAfter, w.servers = 2*time.Second,
			map[string]time.Duration{"192.0.2.1": 0, "192.0.2.80": 0}
		d := w.dialer(t)
		d.target.query.DNSSEC = discovery.DNSSECRequire
		if _, err := d.connect(t.Context()); err != nil ||
			strings.Join(w.dialed, ", ") != "2s 192.0.2.1" {
			t.Errorf("got %v, dialed %v, want the server of the file alone", err, w.dialed)
		}
	})
}

// A result is used until its lifetime ends. When all of its servers fail, the
// proxy is resolved again, but not within ten seconds.
func TestResultIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDialWorld(false)
		w.servers = map[string]time.Duration{"192.0.2.80": 0}
		d := w.dialer(t)
		connect := func(wantAsked int, wantOK bool) {
			t.Helper()
			if _, err := d.connect(t.Context()); (err == nil) != wantOK || w.asked != wantAsked {
				t.Errorf("got %v after %d resolutions, want %d", err, w.asked, wantAsked)
			}
		}
		connect(1, true)
		time.Sleep(299 * time.Second)
		connect(1, true)
		time.Sleep(2 * time.Second)
		connect(2, true) // the TTL of 300 s is over
		w.servers = nil
		connect(2, false)
		time.Sleep(5 * time.Second)
		connect(2, false) // too soon for another resolution
		time.Sleep(5 * time.Second)
		connect(3, false)
		// DNS fails: the last result serves.
		w.DNS = map[string]discoverytest.Node{"example.org": {Fail: map[string]string{"*": "SERVFAIL"}},
			"_masque._udp.example.org": {Fail: map[string]string{"*": "SERVFAIL"}}}
		w.servers = map[string]time.Duration{"192.0.2.80": 0}
		time.Sleep(time.Minute)
		connect(4, true)
	})
}

// The error of an attempt names the server, and how it was found.
func TestFoundServerIsNamed(t *testing.T) {
	for _, tt := range []struct {
		name    string
		world   func(*dialWorld)
		failure dial.Failure
		want    string
		cause   cause
	}{
		{"an address of the name", func(*dialWorld) {}, dial.NoMASQUE,
			"example.org does not offer HTTP Datagrams, so it is no MASQUE proxy: check the name and the port of the proxy",
			causeNoProxy},
		{"an SRV record", func(w *dialWorld) {
			w.DNS["_masque._udp.example.org"] = discoverytest.Node{SRV: []string{"0 0 8443 vpn.example.net."}}
		}, dial.NoMASQUE,
			"vpn.example.net (from SRV of example.org) does not offer HTTP Datagrams, so it is no MASQUE proxy: check the name and the port of the proxy",
			causeNoProxyFound},
		{"an SRV record, and a wrong certificate", func(w *dialWorld) {
			w.DNS["_masque._udp.example.org"] = discoverytest.Node{SRV: []string{"0 0 8443 vpn.example.net."}}
		}, dial.Identity,
			"vpn.example.net (from SRV of example.org) does not have the name example.org: the operator of example.org has to give the proxy a certificate for example.org, publish /.well-known/masquevpn/server, or sign the zone",
			causeIdentityFound},
		{"SRV that failed", func(w *dialWorld) {
			w.DNS["_masque._udp.example.org"] = discoverytest.Node{Fail: map[string]string{"SRV": "SERVFAIL"}}
		}, dial.Identity, "", causeIdentityFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newDialWorld(false)
				tt.world(w)
				d := w.dialer(t)
				d.dialTo = func(_ context.Context, g []discovery.Group) (*dial.Conn, error) {
					return nil, &dial.Error{Failure: tt.failure, Record: g[0].Records[0],
						Err: errors.New("no")}
				}
				_, err := d.connect(t.Context())
				err = d.explain(err)
				var e *Error
				if !errors.As(err, &e) || tt.want != "" && e.Error() != tt.want ||
					attemptOf(e).cause != tt.cause {
					t.Errorf("got %v (cause %d), want %q (cause %d)", err, attemptOf(e).cause,
						tt.want, tt.cause)
				}
			})
		})
	}
}
