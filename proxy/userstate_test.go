package proxy

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"masquevpn/capsule"
)

// asAlice is the header of requests of the user alice, where tokens are names.
var asAlice = http.Header{"Authorization": {"Bearer alice"}}

func withUsers(users Users, more func(*Config)) func(*Config) {
	return func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, users
		if more != nil {
			more(c)
		}
	}
}

// TestUserRoutes checks that a user with Routes gets only these advertised,
// that other destinations are prohibited, also if a name resolves to them, and
// that all of this follows changes of the user.
func TestUserRoutes(t *testing.T) {
	one, other := netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24")
	gateway := netip.MustParsePrefix("10.77.0.1/32")
	users := &oneChanging{alice: User{Name: "alice",
		Routes: []netip.Prefix{one, netip.MustParsePrefix("203.0.113.0/24")}}}
	addr := netip.MustParseAddr
	x := newReloadable(t, withUsers(users, func(c *Config) {
		c.Advertise = []netip.Prefix{one, other}
		c.Resolver = resolver(func(_ context.Context, name string) ([]netip.Addr, error) {
			if name == "inside.example" {
				return []netip.Addr{addr("192.0.2.7"), addr("198.51.100.7")}, nil
			}
			return []netip.Addr{addr("198.51.100.7")}, nil
		})
		c.ConnectUDP = true
	}))
	dnsOf := func(list ...string) {
		t.Helper()
		for {
			c, err := x.r.Next()
			if err != nil {
				t.Fatal(err)
			}
			if d, ok := c.(*capsule.DNSAssign); ok {
				var got []string
				for _, n := range d.Configurations[0].Nameservers {
					got = append(got, n.Addresses[0].String())
				}
				if !slices.Equal(got, list) {
					t.Errorf("pushed servers %v, want %v", got, list)
				}
				return
			}
		}
	}
	status := func(protocol, path string, want int, kind string) {
		t.Helper()
		rsp, str := request(t, x.h3, "CONNECT", protocol, path, asAlice)
		if rsp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", path, rsp.StatusCode, want)
		}
		if want == 200 {
			str.CancelRead(0)
			str.CancelWrite(0)
		} else if got, _ := proxyStatus(t, rsp); got != kind {
			t.Errorf("%s: Proxy-Status says %q, want %q", path, got, kind)
		}
	}
	if got, want := x.Sessions()[0].Routes, 2; len(got) != want {
		t.Errorf("advertised %v, want %v and %v", got, gateway, one)
	}
	x.cfg.DNS = DNS{Servers: []netip.Addr{addr("198.51.100.53"), addr("192.0.2.53"),
		addr("10.77.0.1")}}
	x.reload()
	dnsOf("192.0.2.53", "10.77.0.1")
	x.passes("192.0.2.1", 1)
	x.passes("10.77.0.1", 2)
	x.answered("198.51.100.1", 13) // advertised to others
	x.answered("203.0.113.1", 0)   // the user might, but the proxy has no such route
	const ip = "/.well-known/masque/ip/"
	status("connect-ip", ip+"outside.example/*/", 403, "destination_ip_prohibited")
	status("connect-ip", ip+"198.51.100.0%2F25/*/", 403, "destination_ip_prohibited")
	status("connect-ip", ip+"inside.example/*/", 200, "")
	status(udpProtocol, udpPath+"198.51.100.7/53/", 403, "destination_ip_prohibited")
	status(udpProtocol, udpPath+"outside.example/53/", 403, "destination_ip_prohibited")
	status(udpProtocol, udpPath+"192.0.2.7/53/", 200, "")

	users.change(func(o *oneChanging) { o.alice.Routes = nil })
	x.UsersChanged()
	if got, want := nextRoutes(t, x.r),
		[]capsule.Route{route("10.77.0.1", 0), route("192.0.2.0/24", 0),
			route("198.51.100.0/24", 0)}; !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
	dnsOf("198.51.100.53", "192.0.2.53", "10.77.0.1")
	x.passes("198.51.100.1", 3)

	users.change(func(o *oneChanging) { o.alice.Routes = []netip.Prefix{other} })
	x.UsersChanged()
	x.answered("192.0.2.1", 13) // even before the client gets the new routes
	if got, want := nextRoutes(t, x.r),
		[]capsule.Route{route("10.77.0.1", 0),
			route("198.51.100.0/24", 0)}; !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
	x.passes("198.51.100.1", 4)

	// A network that is advertised to others later is withheld as well.
	x.cfg.Advertise = append(x.cfg.Advertise, netip.MustParsePrefix("203.0.113.0/24"))
	x.reload()
	x.answered("203.0.113.1", 13)

	// A running flow ends if the user may not reach its target any more.
	rsp, _ := request(t, x.h3, "CONNECT", udpProtocol, udpPath+"198.51.100.7/53/", asAlice)
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	i := slices.IndexFunc(x.sessions.list(), func(ss session) bool {
		return ss.kind() == KindUDP && ss.base().ctx.Err() == nil
	})
	flow := x.sessions.list()[i].base()
	users.change(func(o *oneChanging) { o.alice.Routes = []netip.Prefix{} })
	x.UsersChanged()
	<-flow.done
	if err := context.Cause(flow.ctx); err != errProhibited {
		t.Errorf("the flow ended with %v", err)
	}
	x.answered("198.51.100.1", 13)
}

// TestUserExpires checks that sessions end when the access of their user ends,
// and that the user cannot connect after that.
func TestUserExpires(t *testing.T) {
	users := &oneChanging{alice: User{Name: "alice", Expires: time.Now().Add(time.Second)}}
	s := startServer(t, withUsers(users, nil))
	_, h3 := s.dial(t, nil)
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, asAlice); rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	ended := func() {
		t.Helper()
		for _, session := range s.sessions.list() {
			ss := session.base()
			<-ss.done
			if got := context.Cause(ss.ctx); got != errExpired {
				t.Errorf("the session ended with %v, want %v", got, errExpired)
			}
		}
		if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
			asAlice); rsp.StatusCode != 401 {
			t.Errorf("status %d after that, want 401", rsp.StatusCode)
		}
	}
	ended() // UsersChanged was not called

	// The operator may extend the access and shorten it.
	users.change(func(o *oneChanging) { o.alice.Expires = time.Now().Add(time.Hour) })
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, asAlice); rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	users.change(func(o *oneChanging) { o.alice.Expires = time.Time{} })
	s.UsersChanged()
	if ss := s.sessions.list()[0].base(); ss.userState.expired(time.Now().Add(2 * time.Hour)) {
		t.Error("the session still has the previous expiry")
	}
	users.change(func(o *oneChanging) { o.alice.Expires = time.Now().Add(-time.Hour) })
	s.UsersChanged()
	ended()
}

// TestUserStates checks that the sessions of a user share a userState, which is
// removed with the last session.
func TestUserStates(t *testing.T) {
	users := &oneChanging{alice: User{Name: "alice", RateUp: 64_000}}
	s := startServer(t, withUsers(users, nil))
	_, h3 := s.dial(t, nil)
	for range 2 {
		request(t, h3, "CONNECT", "connect-ip", anyPath, asAlice)
	}
	list := s.sessions.list()
	if len(list) != 2 || list[0].base().userState != list[1].base().userState {
		t.Fatalf("%d sessions, user states %+v", len(list), s.sessions.userStates)
	}
	shared := list[0].base().userState
	if up := shared.up.Rate(); up != 64_000 {
		t.Fatalf("rate %d, want 64000", up)
	}
	users.change(func(o *oneChanging) { o.alice.RateUp, o.alice.RateDown = 0, 128_000 })
	s.UsersChanged()
	if up, down := shared.up.Rate(), shared.down.Rate(); up != 0 ||
		down != 128_000 {
		t.Errorf("rates %d and %d, want none and 128000", up, down)
	}
	for _, ss := range list {
		s.Kick(ss.base().id)
	}
	s.sessions.mu.Lock()
	defer s.sessions.mu.Unlock()
	if n := len(s.sessions.userStates) - len(s.sessions.byID); n != 0 {
		t.Errorf("user states %v remain", cmp.Diff(nil, s.sessions.userStates))
	}
}
