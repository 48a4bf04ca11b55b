package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/dnstest"
	"masquevpn/internal/hostdns"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
)

// The status shows the DNS configuration of the proxy and its changes.
func TestDNSInStatus(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) {
		c.DNS = proxy.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")},
			Search:  []string{"corp.example"},
			NAT64:   []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")},
		}
	})
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	awaitDNS(t, n, connectip.DNSStatus{
		Servers: []string{"10.77.0.1", "fd77::1"}, Search: []string{"corp.example"},
		Domains: []string{"."},
		NAT64:   []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")},
	})
	if err := f.SetDNS(proxy.DNS{Servers: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
		Domains: []string{"corp.example"}}); err != nil {
		t.Fatal(err)
	}
	awaitDNS(t, n, connectip.DNSStatus{Servers: []string{"192.0.2.53"}, Search: []string{},
		Domains: []string{"corp.example"}, NAT64: []netip.Prefix{}})
	if err := f.SetDNS(proxy.DNS{}); err != nil {
		t.Fatal(err)
	}
	awaitDNS(t, n, connectip.DNSStatus{Servers: []string{}, Search: []string{}, Domains: []string{},
		NAT64: []netip.Prefix{}})
}

// awaitDNS waits until the DNS configuration in the status is want.
func awaitDNS(t *testing.T, n *testClient, want connectip.DNSStatus) {
	t.Helper()
	n.await(t, fmt.Sprintf("DNS status %+v", want), func(s Status) bool {
		return reflect.DeepEqual(s.DNS, want)
	})
}

// fakeResolver is a Resolver that records calls of its methods and, through
// fakeNetwork, of the host's routing.
type fakeResolver struct {
	outside []netip.Addr // servers that Reaches denies
	fail    error        // returned by Apply

	mu       sync.Mutex // guards the fields below
	events   []string
	restored string           // returned by Check
	lost     error            // returned by Check
	asks     []netip.AddrPort // returned by Outside
}

func (r *fakeResolver) record(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf(format, args...))
}

// all returns the events in order, repeated ones once.
func (r *fakeResolver) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Compact(slices.Clone(r.events))
}

func (r *fakeResolver) Apply(s hostdns.Settings) (string, error) {
	if len(s.Servers) == 0 {
		r.record("no servers")
		return "", nil
	}
	r.record("servers %v search %v domains %v", s.Servers, s.Search, s.Domains)
	return "a test", r.fail
}

func (r *fakeResolver) Reaches(server netip.AddrPort) bool {
	return !slices.Contains(r.outside, server.Addr())
}

func (r *fakeResolver) Check() (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.restored, r.lost
}

// change sets the results of Check.
func (r *fakeResolver) change(restored string, lost error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.restored, r.lost = restored, lost
}

func (r *fakeResolver) Upstream() ([]netip.AddrPort, bool) { return nil, false }

func (r *fakeResolver) Outside() []netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asks
}

func (r *fakeResolver) Close() error {
	r.record("closed")
	return nil
}

// fakeNetwork is a network that records its calls in resolver.
type fakeNetwork struct {
	*routingtest.Network
	resolver *fakeResolver
}

func (n fakeNetwork) Apply(s routing.State) error {
	n.resolver.record("%d routes", len(s.Routes))
	return n.Network.Apply(s)
}

func (n fakeNetwork) Close() error {
	n.resolver.record("no routes")
	return n.Network.Close()
}

func (r *fakeResolver) config(c *Config) {
	c.OpenResolver = func(Device) (Resolver, error) { return r, nil }
	c.OpenNetwork = func(Device) (Network, error) {
		return fakeNetwork{&routingtest.Network{}, r}, nil
	}
}

func pushing(d proxy.DNS) func(*proxy.Config) { return func(c *proxy.Config) { c.DNS = d } }

var corp = proxy.DNS{
	Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("192.0.2.53")},
	Search:  []string{"corp.example"},
}

// Routes are installed before DNS settings, and removed after them.
func TestDNSIsApplied(t *testing.T) {
	f := startProxy(t, pushing(corp))
	r := &fakeResolver{}
	n := startClient(t, f, r.config)
	n.await(t, "applied", func(s Status) bool {
		return s.DNS.Applied && s.DNS.Via == "a test" && s.DNS.Reason == ""
	})
	if err := f.SetDNS(proxy.DNS{}); err != nil {
		t.Fatal(err)
	}
	n.await(t, "without DNS", func(s Status) bool {
		return !s.DNS.Applied && s.DNS.Via == "" && len(s.DNS.Servers) == 0
	})
	if err := f.SetDNS(corp); err != nil {
		t.Fatal(err)
	}
	n.await(t, "applied again", func(s Status) bool { return s.DNS.Applied })
	n.stop()
	<-n.done
	events := slices.DeleteFunc(r.all(), func(s string) bool { return s == "2 routes" })
	const servers = "servers [10.77.0.1:53 192.0.2.53:53] search [corp.example] domains [.]"
	if events[0] == "no servers" { // the routes came before the servers
		events = events[1:]
	}
	if want := []string{servers, "no servers", servers, "closed",
		"no routes"}; !slices.Equal(events, want) {
		t.Errorf("got %q, want %q", events, want)
	}
	if all := r.all(); all[0] != "2 routes" {
		t.Errorf("got %q, want routes first", all)
	}
}

// The client's configuration overrides the proxy's. The status names the reason
// why DNS is not applied.
func TestDNSAsConfigured(t *testing.T) {
	addr := netip.MustParseAddr
	for name, test := range map[string]struct {
		pushed  proxy.DNS
		dns     DNS
		outside []netip.Addr
		fail    error
		want    string // last event of the resolver; "": none is wanted
		reason  string // why DNS is not applied
	}{
		"as pushed": {pushed: corp,
			want: "servers [10.77.0.1:53 192.0.2.53:53] search [corp.example] domains [.]"},
		"off": {pushed: corp, dns: DNS{Off: true}, reason: "dns.mode is off"},
		"other servers": {
			pushed: corp, dns: DNS{Servers: []netip.Addr{addr("192.0.2.1")}},
			want: "servers [192.0.2.1:53] search [corp.example] domains [.]",
		},
		"without the proxy": {
			dns:  DNS{Servers: []netip.Addr{addr("192.0.2.1")}, Search: []string{"a.example"}},
			want: "servers [192.0.2.1:53] search [a.example] domains [.]",
		},
		"search and domains": {
			pushed: corp, dns: DNS{Search: []string{"a.example"},
				Domains: []string{"a.example", "b.example"}},
			want: "servers [10.77.0.1:53 192.0.2.53:53] search [a.example] " +
				"domains [a.example b.example]",
		},
		"split, for all names": {
			pushed: proxy.DNS{Servers: corp.Servers, Domains: []string{"corp.example"}},
			dns:    DNS{Domains: []string{"."}},
			want:   "servers [10.77.0.1:53 192.0.2.53:53] search [] domains [.]",
		},
		"one outside": {
			pushed: corp, outside: corp.Servers[1:],
			want: "servers [10.77.0.1:53] search [corp.example] domains [.]",
		},
		"all outside": {
			pushed: corp, outside: corp.Servers, want: "no servers",
			reason: "no route into the tunnel leads to 10.77.0.1, 192.0.2.53",
		},
		"refused": {
			pushed: corp, fail: errors.Join(errors.New("the resolver is busy"),
				errors.New("and stays so")),
			want:   "servers [10.77.0.1:53 192.0.2.53:53] search [corp.example] domains [.]",
			reason: "the resolver is busy; and stays so",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := startProxy(t, pushing(test.pushed))
			r := &fakeResolver{outside: test.outside, fail: test.fail}
			n := startClient(t, f, func(c *Config) {
				r.config(c)
				c.DNS = test.dns
			})
			n.await(t, "connected with the reason", func(s Status) bool {
				return s.State == StateConnected && s.DNS.Reason == test.reason &&
					s.DNS.Applied == (test.reason == "") && len(s.DNS.Servers) > 0
			})
			events := r.all()
			if test.want == "" {
				if slices.ContainsFunc(events, func(s string) bool {
					return strings.Contains(s, "servers")
				}) {
					t.Errorf("got %q, want no servers", events)
				}
				return
			}
			if events[len(events)-1] != test.want {
				t.Errorf("got %q, want %q at the end", events, test.want)
			}
		})
	}
}

// The resolver keeps its settings from the end of a session until the proxy
// sends the DNS configuration of the next session, or none in time.
func TestDNSAcrossSessions(t *testing.T) {
	var sessions atomic.Int32
	lose, proceed := make(chan struct{}), make(chan struct{})
	dns := &capsule.DNSAssign{Configurations: []capsule.DNSConfiguration{{
		Nameservers:     []capsule.Nameserver{{Priority: 1, Addresses: corp.Servers[:1]}},
		InternalDomains: []string{""},
	}}}
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		n := sessions.Add(1)
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		reader := capsule.NewReader(str, 1<<16)
		requested(reader)
		write(str, &capsule.AddressAssign{Addresses: []capsule.Address{
			{RequestID: 1, Prefix: netip.MustParsePrefix("10.77.0.2/32")},
			{RequestID: 2, Prefix: netip.MustParsePrefix("fd77::2/128")},
		}}, &capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes("0.0.0.0/0"), 0)})
		switch n {
		case 1:
			write(str, dns)
		case 2:
			<-proceed
		}
		go keepSending(r.Context(), str,
			append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		if n == 1 {
			<-lose
			_ = str.Close()
			str.CancelRead(0)
			return
		}
		_ = requested(reader)
	})
	r := &fakeResolver{}
	n := startClient(t, f, func(c *Config) {
		r.config(c)
		c.Accept = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	})
	n.await(t, "applied", func(s Status) bool { return s.DNS.Applied && s.State == StateConnected })
	r.mu.Lock()
	r.events = nil
	r.mu.Unlock()
	close(lose)
	n.await(t, "routed again", func(s Status) bool {
		return s.State != StateConnected && len(r.all()) > 1
	})
	if events := r.all(); slices.Contains(events, "no servers") || !n.Status().DNS.Applied {
		t.Errorf("got %q between the sessions, want the settings kept", events)
	}
	close(proceed)
	n.await(t, "the first session's configuration is removed", func(s Status) bool {
		return s.State == StateConnected && !s.DNS.Applied
	})
	if events := r.all(); events[len(events)-1] != "no servers" {
		t.Errorf("got %q, want no servers at the end", events)
	}
}

// serveNames starts a nameserver that counts queries and answers those for A
// records with answer. Without answer it answers nothing until the test ends.
func serveNames(t *testing.T, answer ...netip.Addr) (netip.AddrPort, *atomic.Int32) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := c.LocalAddr().(*net.UDPAddr).AddrPort()
	var queries atomic.Int32
	testEnds := make(chan struct{})
	dnstest.Serve(t, c, func(string) ([]netip.Addr, error) {
		queries.Add(1)
		if len(answer) == 0 {
			<-testEnds
			return nil, dnstest.ErrNotFound
		}
		return answer, nil
	})
	t.Cleanup(func() {
		close(testEnds)
		// Queries are answered in order. With an answer to this one, no lookup
		// of the test waits any longer.
		resolver := net.Resolver{PreferGo: true,
			Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "udp", server.String())
			}}
		_, _ = resolver.LookupNetIP(context.Background(), "ip4", "end.example")
	})
	return server, &queries
}

// While the host's resolver asks the tunnel's servers, the client asks the
// upstream servers for the proxy's name.
func TestLookupOutsideTunnel(t *testing.T) {
	to, err := parseProxy("vpn.example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	silent, asked := serveNames(t)
	knows, _ := serveNames(t, netip.MustParseAddr("192.0.2.5"))
	var upstream []netip.AddrPort
	d := newDialer(to, nil, "", nil, slog.New(slog.DiscardHandler))
	d.target.query.Method = discovery.Addresses
	d.upstream = func() ([]netip.AddrPort, bool) { return upstream, true }
	resolve := func() ([]netip.AddrPort, error) {
		r, err := d.resolver.Resolve(t.Context(), d.target.query)
		if r, err = d.resolved(resolution{r, err}); err != nil {
			return nil, err
		}
		return r.Addrs(), nil
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.5:443")}

	if _, err := resolve(); err == nil || !strings.Contains(err.Error(), "no nameserver to ask") {
		t.Errorf("without servers: %v", err)
	}
	upstream = []netip.AddrPort{silent, knows}
	if got, err := resolve(); err != nil || !slices.Equal(got, want) || asked.Load() == 0 {
		t.Errorf("got %v, %v", got, err)
	}
	// If no server answers, the last addresses are used.
	upstream = []netip.AddrPort{silent}
	if got, err := resolve(); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
}

// With a full tunnel, the status warns about DNS queries outside it and names
// the reason. There is no warning if the resolver asks the tunnel's servers for
// all names.
func TestDNSOutside(t *testing.T) {
	router := []netip.AddrPort{netip.MustParseAddrPort("192.168.1.1:53")}
	for name, tc := range map[string]struct {
		pushed proxy.DNS
		change func(*Config)
		asks   []netip.AddrPort
		want   string // beginning of the warning; "": none
		hold   bool
	}{
		"no servers from the proxy": {asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear (the proxy " +
				"hands out no nameservers): set dns.servers to nameservers in the tunnel, or " +
				"dns.outside = false"},
		"held": {change: func(c *Config) { c.DNS.Hold = true }, asks: router, hold: true,
			want: "DNS queries to 192.168.1.1 are refused, because they would leave outside the " +
				"tunnel (the proxy hands out no nameservers)"},
		"behind a kill switch": {change: func(c *Config) {
			c.KillSwitch = &killSwitch{}
		}, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear, as far as " +
				"kill_switch.allow lets them"},
		"off": {pushed: corp, change: func(c *Config) { c.DNS.Off = true }, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear " +
				"(dns.mode is off)"},
		"for some names": {pushed: proxy.DNS{Servers: corp.Servers,
			Domains: []string{"corp.example"}}, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear (the " +
				"tunnel's nameservers are for some names alone)"},
		"for all names":      {pushed: proxy.DNS{Servers: corp.Servers}, asks: router},
		"through the tunnel": {},
		"split": {change: func(c *Config) {
			c.Accept = prefixes("192.0.2.0/24")
		}, asks: router},
		"split, none is held": {change: func(c *Config) {
			c.Accept, c.DNS.Hold = prefixes("192.0.2.0/24"), true
		}, asks: router},
	} {
		t.Run(name, func(t *testing.T) {
			f := startProxy(t, pushing(tc.pushed))
			r := &fakeResolver{asks: tc.asks}
			kernel := &routingtest.Network{}
			n := startClient(t, f, func(c *Config) {
				r.config(c)
				c.OpenNetwork = func(Device) (Network, error) { return kernel, nil }
				if tc.change != nil {
					tc.change(c)
				}
			})
			n.awaitConnected(t)
			n.await(t, "the warning is as wanted", func(s Status) bool {
				text := strings.Join(s.Warnings, "\n")
				return strings.HasPrefix(text, tc.want) && (tc.want == "") == (text == "")
			})
			if got := kernel.Last().HoldDNS; got != tc.hold {
				t.Errorf("the kernel holds queries: %t, want %t", got, tc.hold)
			}
		})
	}
}

// The warning about DNS outside the tunnel follows the host from network to
// network.
func TestDNSOutsideLater(t *testing.T) {
	f := startProxy(t, nil)
	u, r := newFakeUnderlay(), &fakeResolver{}
	n := startClient(t, f, func(c *Config) {
		r.config(c)
		c.OpenUnderlay = u.open
	})
	n.awaitConnected(t)
	for _, asks := range [][]netip.AddrPort{{netip.MustParseAddrPort("192.168.7.1:53")}, nil} {
		r.mu.Lock()
		r.asks = asks
		r.mu.Unlock()
		u.set("192.0.2.1", nil)
		n.await(t, fmt.Sprintf("the status follows %v", asks), func(s Status) bool {
			return len(s.Warnings) == len(asks)
		})
	}
}
