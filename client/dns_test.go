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
	"masquevpn/internal/dnstest"
	"masquevpn/internal/hostdns"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
)

// The status shows what the proxy says about DNS, and follows it.
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

// awaitDNS waits until the status says want about DNS.
func awaitDNS(t *testing.T, n *near, want connectip.DNSStatus) {
	t.Helper()
	n.await(t, fmt.Sprintf("told %+v", want), func(s Status) bool {
		return reflect.DeepEqual(s.DNS, want)
	})
}

// fakeResolver is a host whose resolver and routing note what they are told, in
// order.
type fakeResolver struct {
	outside []netip.Addr // servers that are not reached through the tunnel
	fail    error        // error that Apply returns

	mu       sync.Mutex
	said     []string
	restored string // what Check says
	lost     error
	asks     []netip.AddrPort // the host's servers outside the tunnel
}

func (r *fakeResolver) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, fmt.Sprintf(format, args...))
}

// all returns what was said so far, without repetitions.
func (r *fakeResolver) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Compact(slices.Clone(r.said))
}

func (r *fakeResolver) Apply(s hostdns.Settings) (string, error) {
	if len(s.Servers) == 0 {
		r.note("no servers")
		return "", nil
	}
	r.note("servers %v search %v domains %v", s.Servers, s.Search, s.Domains)
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

// change has Check say something else from now on.
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
	r.note("closed")
	return nil
}

// routed notes routes in r.
type routed struct {
	*routingtest.Network
	r *fakeResolver
}

func (n routed) Apply(s routing.State) error {
	n.r.note("%d routes", len(s.Routes))
	return n.Network.Apply(s)
}

func (n routed) Close() error {
	n.r.note("no routes")
	return n.Network.Close()
}

func (r *fakeResolver) config(c *Config) {
	c.OpenResolver = func(Device) (Resolver, error) { return r, nil }
	c.OpenNetwork = func(Device) (Network, error) { return routed{&routingtest.Network{}, r}, nil }
}

func pushing(d proxy.DNS) func(*proxy.Config) { return func(c *proxy.Config) { c.DNS = d } }

var corp = proxy.DNS{
	Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("192.0.2.53")},
	Search:  []string{"corp.example"},
}

// Routes come before DNS and go after it.
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
	said := slices.DeleteFunc(r.all(), func(s string) bool { return s == "2 routes" })
	const servers = "servers [10.77.0.1:53 192.0.2.53:53] search [corp.example] domains [.]"
	if said[0] == "no servers" { // the routes came first, on their own
		said = said[1:]
	}
	if want := []string{servers, "no servers", servers, "closed",
		"no routes"}; !slices.Equal(said, want) {
		t.Errorf("the host was told %q, want %q", said, want)
	}
	if all := r.all(); all[0] != "2 routes" {
		t.Errorf("the host was told %q", all)
	}
}

// What the configuration says goes first; what it cannot have is said.
func TestDNSAsConfigured(t *testing.T) {
	addr := netip.MustParseAddr
	for name, test := range map[string]struct {
		pushed  proxy.DNS
		dns     DNS
		outside []netip.Addr
		fail    error
		want    string // that the resolver is told at the end
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
			want: "servers [10.77.0.1:53 192.0.2.53:53] search [a.example] domains [a.example b.example]",
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
			n.await(t, "as wanted", func(s Status) bool {
				return s.State == StateConnected && s.DNS.Reason == test.reason &&
					s.DNS.Applied == (test.reason == "") && len(s.DNS.Servers) > 0
			})
			said := r.all()
			if test.want == "" {
				if slices.ContainsFunc(said, func(s string) bool {
					return strings.Contains(s, "servers")
				}) {
					t.Errorf("the resolver was told %q", said)
				}
				return
			}
			if said[len(said)-1] != test.want {
				t.Errorf("the resolver was told %q, want %q", said, test.want)
			}
		})
	}
}

// Between two sessions the resolver is left as it is, and so it is until the
// proxy has said what it wants now.
func TestDNSAcrossSessions(t *testing.T) {
	var sessions atomic.Int32
	lose, speak := make(chan struct{}), make(chan struct{})
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
		}}, &capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, 0)})
		switch n {
		case 1:
			write(str, dns)
		case 2:
			<-speak
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
	r.said = nil
	r.mu.Unlock()
	close(lose)
	n.await(t, "routed again", func(s Status) bool {
		return s.State != StateConnected && len(r.all()) > 1
	})
	if said := r.all(); slices.Contains(said, "no servers") || !n.Status().DNS.Applied {
		t.Errorf("between the sessions the host was told %q", said)
	}
	close(speak)
	n.await(t, "without what only the first session said", func(s Status) bool {
		return s.State == StateConnected && !s.DNS.Applied
	})
	if said := r.all(); said[len(said)-1] != "no servers" {
		t.Errorf("the host was told %q", said)
	}
}

// serveNames answers queries for the name of the proxy on a socket of its own,
// if there is an answer, and counts them.
func serveNames(t *testing.T, answer ...netip.Addr) (netip.AddrPort, *atomic.Int32) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var queries atomic.Int32
	dnstest.Serve(t, c, func(string) ([]netip.Addr, error) {
		queries.Add(1)
		if len(answer) == 0 {
			return nil, dnstest.ErrSilent
		}
		return answer, nil
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort(), &queries
}

// While the host's resolver asks through the tunnel, the proxy's name is looked
// up with the servers that the host has besides.
func TestLookupBesideTheTunnel(t *testing.T) {
	to, err := parseProxy("vpn.example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	silent, asked := serveNames(t)
	knows, _ := serveNames(t, netip.MustParseAddr("192.0.2.5"))
	var upstream []netip.AddrPort
	d := newDialer(to, nil, "", nil, slog.New(slog.DiscardHandler))
	d.upstream = func() ([]netip.AddrPort, bool) { return upstream, true }
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.5:443")}

	if _, err := d.resolve(t.Context()); err == nil ||
		!strings.Contains(err.Error(), "no nameservers besides those of the tunnel") {
		t.Errorf("without servers: %v", err)
	}
	upstream = []netip.AddrPort{silent, knows}
	if got, err := d.resolve(t.Context()); err != nil || !slices.Equal(got, want) ||
		asked.Load() == 0 {
		t.Errorf("got %v, %v", got, err)
	}
	// When none knows, the last addresses serve.
	ctx, cancel := context.WithTimeout(t.Context(), resolveTimeout/20)
	defer cancel()
	upstream = []netip.AddrPort{silent}
	if got, err := d.resolve(ctx); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
}

// Under a tunnel for everything, the status says when names are asked outside
// it, and why; a resolver that asks the tunnel's servers for all names does not
// do that.
func TestDNSOutside(t *testing.T) {
	router := []netip.AddrPort{netip.MustParseAddrPort("192.168.1.1:53")}
	for name, tc := range map[string]struct {
		pushed proxy.DNS
		change func(*Config)
		asks   []netip.AddrPort
		want   string // what the warning begins with; "": none
		hold   bool
	}{
		"no servers from the proxy": {asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear (the proxy hands out no nameservers): set dns.servers to nameservers in the tunnel, or dns.outside = false"},
		"held": {change: func(c *Config) { c.DNS.Hold = true }, asks: router, hold: true,
			want: "DNS queries to 192.168.1.1 are refused, because they would leave outside the tunnel (the proxy hands out no nameservers)"},
		"behind a kill switch": {change: func(c *Config) {
			c.KillSwitch = &killSwitch{}
		}, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear, as far as kill_switch.allow lets them"},
		"off": {pushed: corp, change: func(c *Config) { c.DNS.Off = true }, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear (dns.mode is off)"},
		"for some names": {pushed: proxy.DNS{Servers: corp.Servers,
			Domains: []string{"corp.example"}}, asks: router,
			want: "DNS queries to 192.168.1.1 leave outside the tunnel, in the clear (the tunnel's nameservers are for some names alone)"},
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
			n.await(t, "DNS is dealt with", func(s Status) bool {
				text := strings.Join(s.Warnings, "\n")
				return strings.HasPrefix(text, tc.want) && (tc.want == "") == (text == "")
			})
			if got := kernel.Last().HoldDNS; got != tc.hold {
				t.Errorf("the kernel holds queries: %t, want %t", got, tc.hold)
			}
		})
	}
}

// The host that comes into another network, where names are asked outside, says
// so then.
func TestDNSOutsideLater(t *testing.T) {
	f := startProxy(t, nil)
	u, r := newUplink(), &fakeResolver{}
	n := startClient(t, f, func(c *Config) {
		r.config(c)
		c.OpenUplink = u.open
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
