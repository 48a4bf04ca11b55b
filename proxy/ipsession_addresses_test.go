package proxy

import (
	"net/http"
	"net/netip"
	"slices"
	"testing"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
)

// userList are users whose token is their name. It reserves their addresses.
type userList []User

func (l userList) ByName(name string) (User, bool) {
	i := slices.IndexFunc(l, func(u User) bool { return u.Name == name })
	if i < 0 {
		return User{}, false
	}
	return l[i], true
}

func (l userList) ByToken(token string) (User, bool) { return l.ByName(token) }

func (l userList) Reserved(p netip.Prefix, name string) bool {
	return slices.ContainsFunc(l, func(u User) bool {
		return u.Name != name && slices.ContainsFunc(u.Addresses, p.Contains)
	})
}

// as begins a session of a user and returns an asker that has sent no request.
func as(t *testing.T, h3 *http3.ClientConn, user string) *asker {
	t.Helper()
	header := http.Header{}
	if user != "" {
		header.Set("Authorization", "Bearer "+user)
	}
	rsp, str := request(t, h3, "CONNECT", "connect-ip", anyPath, header)
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	return &asker{t: t, str: str, r: reader(t, str)}
}

// assigned returns the next list of addresses from the proxy.
func (a *asker) assigned() []capsule.Address {
	a.t.Helper()
	for {
		x, err := a.r.Next()
		if err != nil {
			a.t.Fatal(err)
		}
		if list, ok := x.(*capsule.AddressAssign); ok {
			return list.Addresses
		}
	}
}

// withAddresses gives the proxy both families and two users. Alice has reserved
// addresses.
func withAddresses(c *Config) {
	c.Pool6 = netip.MustParsePrefix("fd77::/64")
	c.Methods, c.Users = []string{MethodToken}, userList{
		{Name: "alice", Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.9"),
			netip.MustParseAddr("fd77::9")}}, {Name: "bob"},
	}
}

// TestUnprompted checks that a client that requests no addresses is assigned
// one of each family, and that they answer its later requests.
func TestUnprompted(t *testing.T) {
	for _, tc := range []struct {
		name, user string
		unprompted []string
		ask, want  []string // a later request and its answer
	}{
		{"nothing more", "bob", []string{"10.77.0.2/32", "fd77::2/128"}, nil, nil},
		{"any", "bob", []string{"10.77.0.2/32", "fd77::2/128"}, []string{"0.0.0.0/32", "::/128"},
			[]string{"10.77.0.2/32", "fd77::2/128"}},
		{"any block, without delegation", "bob", []string{"10.77.0.2/32", "fd77::2/128"},
			[]string{"0.0.0.0/0"}, []string{"10.77.0.2/32"}},
		{"another family alone", "bob", []string{"10.77.0.2/32", "fd77::2/128"}, []string{"::/128"},
			[]string{"fd77::2/128"}},
		{"the assigned address and any", "bob", []string{"10.77.0.2/32", "fd77::2/128"},
			[]string{"0.0.0.0/32", "10.77.0.2/32"}, []string{"10.77.0.2/32", "10.77.0.3/32"}},
		{"another address", "bob", []string{"10.77.0.2/32", "fd77::2/128"},
			[]string{"10.77.0.7/32"}, []string{"10.77.0.7/32"}},
		{"reserved", "alice", []string{"10.77.0.9/32", "fd77::9/128"},
			[]string{"0.0.0.0/32", "::/128"}, []string{"10.77.0.9/32", "fd77::9/128"}},
		{"an address that is reserved for another", "bob", []string{"10.77.0.2/32", "fd77::2/128"},
			[]string{"10.77.0.9/32"}, []string{"10.77.0.2/32"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, withAddresses)
			_, h3 := s.dial(t, nil)
			a := as(t, h3, tc.user)
			got := a.assigned()
			a.want(got, tc.unprompted...)
			for _, g := range got {
				if g.RequestID != 0 {
					t.Errorf("%v answers the request %d, which nobody made", g.Prefix, g.RequestID)
				}
			}
			want := tc.unprompted
			if tc.ask != nil {
				a.want(a.ask(tc.ask...), tc.want...)
				want = tc.want
			}
			if v4, v6 := s.pool.Leased(); v4+v6 != len(want) {
				t.Errorf("%d addresses are leased, want %d", v4+v6, len(want))
			}
		})
	}
}

// TestReservedAddressNeedsNoRequest checks that a client may use the reserved
// address of its user without a request and before the assignment.
func TestReservedAddressNeedsNoRequest(t *testing.T) {
	h := newHub(t, withReserved)
	g := &gateway{hub: h, str: as(t, h.h3, "c").str}
	h.awaitAllowed(g, "10.77.0.9", "192.0.2.7")
}

// withReserved sets the users of a hub. The client c and the gateway b have
// reserved addresses.
func withReserved(c *Config) {
	c.Users = userList{
		{Name: "a"}, {Name: "b", Addresses: []netip.Addr{netip.MustParseAddr("fd77::8")}},
		{Name: "c", Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.9")}},
	}
}

// TestUnpromptedGateway checks that the gateway of a site, which may not need
// an address, is assigned only reserved addresses unprompted.
func TestUnpromptedGateway(t *testing.T) {
	h := newHub(t, withReserved)
	a := as(t, h.h3, "a")
	b := as(t, h.h3, "b")
	b.want(b.assigned(), "fd77::8/128")
	c := as(t, h.h3, "c")
	c.want(c.assigned(), "10.77.0.9/32", "fd77::2/128") // later than an assignment to a would be
	if v4, v6 := h.pool.Leased(); v4 != 1 || v6 != 2 {
		t.Errorf("%d IPv4 and %d IPv6 addresses are leased, want 1 and 2", v4, v6)
	}
	a.want(a.ask("0.0.0.0/32"), "10.77.0.2/32")
}

// TestReservedAndAsked checks that a client that requests addresses before the
// assignment gets only the addresses that it requests.
func TestReservedAndAsked(t *testing.T) {
	h := startServer(t, withAddresses)
	_, h3 := h.dial(t, nil)
	a := as(t, h3, "alice")
	got := a.ask("0.0.0.0/32")
	a.want(got, "10.77.0.9/32")
	if v4, v6 := h.pool.Leased(); v4 != 1 || v6 != 0 {
		t.Errorf("%d IPv4 and %d IPv6 addresses are leased, want 1 and 0", v4, v6)
	}
	other := as(t, h3, "alice")
	other.want(other.ask("0.0.0.0/32", "::/128"), "fd77::9/128", "10.77.0.2/32")
}
