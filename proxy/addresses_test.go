package proxy

import (
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"testing"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/logtest"
)

// asker sends ADDRESS_REQUEST capsules on one session and reads the answers.
type asker struct {
	t   *testing.T
	str *http3.RequestStream
	r   *capsule.Reader
	id  uint64 // the last request ID
}

// newAsker begins a session of the client program with the given instance.
func newAsker(t *testing.T, h3 *http3.ClientConn, instance string) *asker {
	t.Helper()
	rsp, str := request(t, h3, "CONNECT", "connect-ip", anyPath,
		http.Header{connectip.InstanceHeader: {instance}})
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	return &asker{t: t, str: str, r: reader(t, str)}
}

// ask requests prefixes and returns the full list that the proxy answers with.
// It checks that the list answers each request once.
func (a *asker) ask(wants ...string) []capsule.Address {
	a.t.Helper()
	var c capsule.AddressRequest
	for _, s := range wants {
		a.id++
		c.Addresses = append(c.Addresses,
			capsule.Address{RequestID: a.id, Prefix: netip.MustParsePrefix(s)})
	}
	if _, err := a.str.Write(c.Append(nil)); err != nil {
		a.t.Fatal(err)
	}
	for {
		x, err := a.r.Next()
		if err != nil {
			a.t.Fatal(err)
		}
		list, ok := x.(*capsule.AddressAssign)
		if !ok {
			continue
		}
		for _, asked := range c.Addresses {
			n := 0
			for _, got := range list.Addresses {
				if got.RequestID == asked.RequestID {
					n++
				}
			}
			if n != 1 {
				a.t.Errorf("the request %d for %v is answered %d times: %v", asked.RequestID,
					asked.Prefix, n, list.Addresses)
			}
		}
		return list.Addresses
	}
}

// want compares got with the prefixes that it should have. "" stands for a
// refusal.
func (a *asker) want(got []capsule.Address, want ...string) {
	a.t.Helper()
	var have []string
	for _, g := range got {
		if g.Refused() {
			have = append(have, "")
		} else {
			have = append(have, g.Prefix.String())
		}
	}
	if !slices.Equal(have, want) {
		a.t.Errorf("assigned %q, want %q", have, want)
	}
}

// delegating starts a proxy that leases blocks of both families.
func delegating(t *testing.T, change func(*Config)) *http3.ClientConn {
	return start(t, func(c *Config) {
		c.Pool6 = netip.MustParsePrefix("fd77::/56")
		c.Delegate4, c.Delegate6 = 28, 64
		if change != nil {
			change(c)
		}
	})
}

// TestDelegation checks that a client is leased the block that it requests, but
// none larger than the operator allows and no second one of the same family.
func TestDelegation(t *testing.T) {
	h3 := delegating(t, nil)
	a := newAsker(t, h3, "a")
	a.want(a.ask("0.0.0.0/24", "::/64", "0.0.0.0/32"), "10.77.0.224/28", "fd77:0:0:ff::/64",
		"10.77.0.2/32")
	b := newAsker(t, h3, "b")
	b.want(b.ask("10.77.0.64/28", "fd77:0:0:7::/64"), "10.77.0.64/28", "fd77:0:0:7::/64")
	c := newAsker(t, h3, "c")
	c.want(c.ask("10.77.0.64/29", "0.0.0.0/32"), "10.77.0.240/29", "10.77.0.3/32")
	// A second block of the family is not leased: an address is leased instead.
	c.want(c.ask("0.0.0.0/28", "::/60"), "10.77.0.240/29", "10.77.0.3/32", "10.77.0.4/32",
		"fd77:0:0:fe::/64")
}

// TestNoDelegation checks that a request for a block is answered with an
// address if the operator allows no blocks.
func TestNoDelegation(t *testing.T) {
	h3 := delegating(t, func(c *Config) { c.Delegate4, c.Delegate6 = 0, 0 })
	a := newAsker(t, h3, "a")
	a.want(a.ask("0.0.0.0/24", "10.77.0.64/28", "fd77:0:0:7::/64"), "10.77.0.2/32", "10.77.0.64/32",
		"fd77:0:0:7::/128")
}

// TestAsksAgain checks that a client may request addresses at any time. Each
// answer is the full list; a refusal is in one answer only.
func TestAsksAgain(t *testing.T) {
	// five addresses for clients
	h3 := start(t, func(c *Config) { c.Pool4 = netip.MustParsePrefix("10.77.0.0/29") })
	a := newAsker(t, h3, "a")
	a.want(a.ask("0.0.0.0/32", "::/128"), "10.77.0.2/32", "")
	a.want(a.ask("0.0.0.0/32"), "10.77.0.2/32", "10.77.0.3/32")
	got := a.ask("10.77.0.2/32") // the client has it already
	a.want(got, "10.77.0.2/32", "10.77.0.3/32")
	if got[0].RequestID != 4 || got[1].RequestID != 3 {
		t.Errorf("request IDs %v", got)
	}
	// One address cannot answer two requests.
	a.want(a.ask("10.77.0.3/32", "10.77.0.3/32"), "10.77.0.2/32", "10.77.0.3/32", "10.77.0.4/32")
	a.want(a.ask("0.0.0.0/32", "0.0.0.0/32", "0.0.0.0/32"), "10.77.0.2/32", "10.77.0.3/32",
		"10.77.0.4/32", "10.77.0.5/32", "10.77.0.6/32", "")
	a.want(a.ask("10.77.0.6/32"), "10.77.0.2/32", "10.77.0.3/32", "10.77.0.4/32", "10.77.0.5/32",
		"10.77.0.6/32")
}

// TestAddressesOfOneSession checks the limit on the addresses of one session.
func TestAddressesOfOneSession(t *testing.T) {
	h3 := start(t, nil)
	a := newAsker(t, h3, "a")
	wants := slices.Repeat([]string{"0.0.0.0/32"}, maxAddresses+2)
	got := a.ask(wants...)
	if n := len(slices.DeleteFunc(got, capsule.Address.Refused)); n != maxAddresses {
		t.Errorf("%d addresses, want %d", n, maxAddresses)
	}
}

// TestFreedAddresses checks the addresses of a session that ended: its client
// may lease them at once, other clients only when no other address is free.
func TestFreedAddresses(t *testing.T) {
	h3 := start(t, func(c *Config) { c.Pool4 = netip.MustParsePrefix("10.77.0.0/29") })
	first := newAsker(t, h3, "a")
	first.want(first.ask("10.77.0.3/32"), "10.77.0.3/32")
	again := newAsker(t, h3, "a") // replaces first, which has released its address
	other := newAsker(t, h3, "b")
	other.want(other.ask("10.77.0.3/32"), "10.77.0.2/32")
	again.want(again.ask("0.0.0.0/32"), "10.77.0.3/32")
	newAsker(t, h3, "a")
	other.want(other.ask("0.0.0.0/32", "0.0.0.0/32", "0.0.0.0/32", "0.0.0.0/32"),
		"10.77.0.2/32", "10.77.0.4/32", "10.77.0.5/32", "10.77.0.6/32", "10.77.0.3/32")
}

// TestAddressesOfOneUser checks the limit on the addresses of all sessions of a
// user. The default is two for each session that the user may have. Released
// addresses do not count.
func TestAddressesOfOneUser(t *testing.T) {
	for _, tc := range []struct {
		name   string
		user   User
		change func(*Config)
		want   int // number of addresses
	}{
		{"default", User{Name: "alice"}, func(c *Config) { c.MaxSessionsPerUser = 3 }, 6},
		{"by the user's own number of sessions", User{Name: "alice", Sessions: 4},
			func(*Config) {}, 8},
		{"for all users", User{Name: "alice"}, func(c *Config) { c.MaxAddressesPerUser = 3 }, 3},
		{"for the user", User{Name: "alice", MaxAddresses: 5}, func(c *Config) {
			c.MaxAddressesPerUser = 3
		}, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := new(logtest.Buffer)
			s := startServer(t, withUsers(userList{tc.user, {Name: "bob"}}, func(c *Config) {
				c.Logger = slog.New(slog.NewTextHandler(log, nil))
				tc.change(c)
			}))
			_, h3 := s.dial(t, nil)
			granted := func(a *asker, n int) int {
				return len(slices.DeleteFunc(a.ask(slices.Repeat([]string{"0.0.0.0/32"}, n)...),
					capsule.Address.Refused))
			}
			first, second := as(t, h3, "alice"), as(t, h3, "alice")
			if n := granted(first, 2) + granted(second, maxAddresses); n != tc.want {
				t.Errorf("the user has %d addresses, want %d", n, tc.want)
			}
			if lines := log.Lines("limits.addresses_per_user"); len(lines) != 1 {
				t.Errorf("the log says %q", lines)
			}
			if n := granted(as(t, h3, "bob"), 2); n != 2 {
				t.Errorf("another user has %d addresses, want 2", n)
			}
			oldest := s.sessions.list()[0].base()
			if err := first.str.Close(); err != nil {
				t.Fatal(err)
			}
			<-oldest.done
			if n := granted(as(t, h3, "alice"), maxAddresses); n != 2 {
				t.Errorf("after a session with 2 addresses ended, %d are granted, want 2", n)
			}
		})
	}
}
