package proxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func nobody(netip.Prefix, string) bool { return false }

// clock is a time that tests move on.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func (c *clock) pass(d time.Duration) { c.t = c.t.Add(d) }

func testPool(reserved func(netip.Prefix, string) bool, spaces ...space) (*pool, *clock) {
	p, c := newPool(reserved, spaces...), &clock{time.Unix(1e9, 0)}
	p.now = c.now
	return p, c
}

func mustLease(t *testing.T, p *pool, owner, want string) netip.Prefix {
	t.Helper()
	got, err := p.lease(User{Name: owner}, owner, netip.MustParsePrefix(want))
	if err != nil {
		t.Fatalf("%s wants %s: %v", owner, want, err)
	}
	return got
}

const (
	any4 = "0.0.0.0/32"
	any6 = "::/128"
)

// held is a lease in the model.
type held struct {
	prefix netip.Prefix
	owner  string
}

// given is when an address was given back, and by whom.
type given struct {
	owner string
	at    time.Time
}

// model is what a pool is checked against: it looks at every address.
type model struct {
	space
	held  []held
	given map[netip.Addr]given // the last time
}

// candidates returns all prefixes of the given length that may be leased.
func (m *model) candidates(bits int) (out []netip.Prefix) {
	for p := netip.PrefixFrom(m.prefix.Addr(), bits); m.prefix.Contains(p.Addr()); {
		special := p.Contains(m.prefix.Addr()) || p.Contains(m.prefix.Addr().Next()) ||
			p.Contains(netip.MustParseAddr("10.77.0.63"))
		if !special && !slices.ContainsFunc(m.held, func(o held) bool {
			return o.prefix.Overlaps(p)
		}) {
			out = append(out, p)
		}
		a := p.Addr()
		for range 1 << (a.BitLen() - bits) {
			a = a.Next()
		}
		p = netip.PrefixFrom(a, bits)
	}
	return out
}

// restsForOthers reports whether an address of p was given back by somebody
// else than owner less than DefaultHold ago.
func (m *model) restsForOthers(p netip.Prefix, owner string, now time.Time) bool {
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		if g, ok := m.given[a]; ok && g.owner != owner && now.Sub(g.at) < DefaultHold {
			return true
		}
	}
	return false
}

// release gives the lease with the index i back, to p as well.
func (m *model) release(p *pool, i int, now time.Time) {
	h := m.held[i]
	p.release(h.prefix, h.owner)
	m.held = slices.Delete(m.held, i, i+1)
	for a := h.prefix.Addr(); h.prefix.Contains(a); a = a.Next() {
		m.given[a] = given{h.owner, now}
	}
}

// However leases and releases of addresses and blocks follow each other, no two
// leases overlap, none is lost or out of place, what is wanted and free is
// granted, and what rests goes to others only when nothing else is free.
func TestPoolProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := model{
			space: space{netip.MustParsePrefix("10.77.0.0/26"),
				rapid.SampledFrom([]int{0, 28, 30}).Draw(t, "delegate")},
			given: map[netip.Addr]given{},
		}
		p, clock := testPool(nobody, m.space, space{prefix: netip.MustParsePrefix("fd77::/64")})
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			clock.pass(time.Duration(rapid.IntRange(0, 20).Draw(t, "seconds")) * time.Second)
			if len(m.held) > 0 && rapid.Bool().Draw(t, "release") {
				m.release(p, rapid.IntRange(0, len(m.held)-1).Draw(t, "which"), clock.t)
				continue
			}
			owner := rapid.SampledFrom([]string{"alice", "bob", "carol"}).Draw(t, "owner")
			want := netip.PrefixFrom(netip.IPv4Unspecified(),
				rapid.IntRange(24, 32).Draw(t, "bits"))
			if rapid.Bool().Draw(t, "prefer") {
				a := netip.AddrFrom4([4]byte{10, 77, 0, rapid.ByteMax(70).Draw(t, "host")})
				want = netip.PrefixFrom(a, want.Bits()).Masked()
			}
			m.lease(t, p, owner, want, clock.t)
		}
		if v4, v6 := p.leased(); v4 != len(m.held) || v6 != 0 {
			t.Fatalf("the pool counts %d and %d leases, %d are held", v4, v6, len(m.held))
		}
	})
}

// lease leases want for owner from p, and checks what it gets.
func (m *model) lease(t *rapid.T, p *pool, owner string, want netip.Prefix, now time.Time) {
	got, err := p.lease(User{Name: owner}, owner, want)
	bits := 32
	if m.delegate > 0 && want.Bits() < 32 {
		bits = max(want.Bits(), m.delegate)
	}
	free := m.candidates(bits)
	if len(free) == 0 && bits < 32 { // no block is left
		bits = 32
		free = m.candidates(bits)
	}
	if len(free) == 0 {
		if !errors.Is(err, errPoolExhausted) {
			t.Fatalf("leased %v, %v from a full pool", got, err)
		}
		return
	}
	if err != nil {
		t.Fatalf("%s wants %v, %v are free: %v", owner, want, free, err)
	}
	if got.Bits() != bits || !slices.Contains(free, got) {
		t.Fatalf("leased %v for %v, which is none of %v", got, want, free)
	}
	rests := func(x netip.Prefix) bool { return m.restsForOthers(x, owner, now) }
	if i := slices.IndexFunc(free, func(x netip.Prefix) bool {
		return !rests(x)
	}); rests(got) && i >= 0 {
		t.Fatalf("%s got %v, which rests for others, when %v is free", owner, got, free[i])
	}
	wanted := netip.PrefixFrom(want.Addr(), bits).Masked()
	if got != wanted && slices.Contains(free, wanted) && !rests(wanted) {
		t.Fatalf("%s got %v instead of %v, which is free", owner, got, wanted)
	}
	m.held = append(m.held, held{got, owner})
}

// After ten thousand leases and releases of all kinds every address is there
// again, once.
func TestPoolLosesNothing(t *testing.T) {
	s := space{netip.MustParsePrefix("10.77.0.0/24"), 28}
	s6 := space{netip.MustParsePrefix("fd77::/48"), 64}
	p, clock := testPool(nobody, s, s6)
	random := rand.New(rand.NewPCG(1, 2))
	var leases []held
	for i := range 10000 {
		clock.pass(time.Second)
		owner := fmt.Sprint("user", random.IntN(50))
		want := netip.MustParsePrefix([]string{any4, any6, "0.0.0.0/28", "::/64", "0.0.0.0/30",
			"::/80"}[random.IntN(6)])
		got, err := p.lease(User{Name: owner}, owner, want)
		if err == nil {
			for _, h := range leases {
				if h.prefix.Overlaps(got) {
					t.Fatalf("step %d: %v is leased while %v is", i, got, h.prefix)
				}
			}
			leases = append(leases, held{got, owner})
		} else if !errors.Is(err, errPoolExhausted) {
			t.Fatal(err)
		}
		for len(leases) > 0 && (err != nil || random.IntN(5) < 2) {
			j := random.IntN(len(leases))
			p.release(leases[j].prefix, leases[j].owner)
			leases = slices.Delete(leases, j, j+1)
			err = nil
		}
	}
	for _, h := range leases {
		p.release(h.prefix, h.owner)
	}
	if v4, v6 := p.leased(); v4 != 0 || v6 != 0 {
		t.Errorf("%d and %d leases are left", v4, v6)
	}
	seen := map[netip.Prefix]bool{}
	for range 256 - 3 { // all but network, proxy and broadcast
		got := mustLease(t, p, "somebody", any4)
		if seen[got] {
			t.Fatalf("%v is leased twice", got)
		}
		seen[got] = true
	}
	if got, err := p.lease(User{}, "", netip.MustParsePrefix(any4)); !errors.Is(err,
		errPoolExhausted) {
		t.Errorf("leased %v, %v from a full pool", got, err)
	}
}

func TestPoolReservations(t *testing.T) {
	reserved := netip.MustParseAddr("10.77.0.18")
	p, _ := testPool(func(p netip.Prefix, user string) bool {
		return p.Contains(reserved) && user != "alice"
	},
		space{netip.MustParsePrefix("10.77.0.0/27"), 28})
	alice := User{Name: "alice", Addresses: []netip.Addr{reserved}}
	if got := mustLease(t, p, "bob",
		"10.77.0.16/29"); got != netip.MustParsePrefix("10.77.0.8/29") {
		// of the others, one has the reserved address, one the proxy's, one
		// broadcast
		t.Errorf("bob got the block %v", got)
	}
	for i := 0; ; i++ {
		got, err := p.lease(User{Name: "bob"}, "bob", netip.PrefixFrom(reserved, 32))
		if errors.Is(err, errPoolExhausted) && i == 32-3-8-1 {
			break
		}
		if err != nil || got.Contains(reserved) {
			t.Fatalf("lease %d: bob got %v, %v", i, got, err)
		}
	}
	if got, err := p.lease(alice, "alice", netip.MustParsePrefix(any4)); got.Addr() != reserved {
		t.Errorf("alice got %v, %v", got, err)
	}
	if _, err := p.lease(alice, "alice", netip.MustParsePrefix(any6)); !errors.Is(err,
		errNoFamily) {
		t.Errorf("an IPv6 address from a pool without: %v", err)
	}
}

// An address that was given back is the last to be used again, but for its last
// owner.
func TestPoolReusesLate(t *testing.T) {
	p, clock := testPool(nobody, space{prefix: netip.MustParsePrefix("10.77.0.0/24")})
	first := mustLease(t, p, "alice", any4)
	p.release(first, "alice")
	clock.pass(2 * DefaultHold)
	for i := range 252 {
		if got := mustLease(t, p, "bob", any4); got == first {
			t.Fatalf("lease %d is %v", i, got)
		}
	}
}

func TestPoolRests(t *testing.T) {
	for name, tc := range map[string]struct {
		space       space
		want, other string // what is asked for, and what is not free at first
	}{
		"address": {space{netip.MustParsePrefix("10.77.0.0/29"), 30}, any4, "10.77.0.2/32"},
		"block":   {space{netip.MustParsePrefix("10.77.0.0/28"), 30}, "0.0.0.0/30", "10.77.0.8/30"},
		"IPv6":    {space{netip.MustParsePrefix("fd77::/120"), 124}, "::/124", "fd77::f0/124"},
	} {
		t.Run(name, func(t *testing.T) {
			p, clock := testPool(nobody, tc.space)
			first := mustLease(t, p, "alice", tc.want)
			if first != netip.MustParsePrefix(tc.other) {
				t.Fatalf("the first is %v", first)
			}
			p.release(first, "alice")
			clock.pass(DefaultHold - 1)
			second := mustLease(t, p, "bob", first.String())
			if second == first {
				t.Fatal("bob got what rests for alice")
			}
			if again := mustLease(t, p, "alice", tc.want); again != first {
				t.Errorf("alice got %v, and had %v", again, first)
			}
			p.release(first, "alice")
			p.release(second, "bob")
			clock.pass(DefaultHold)
			if got := mustLease(t, p, "carol", first.String()); got != first {
				t.Errorf("carol got %v after %v has rested", got, first)
			}
		})
	}
}

// Whoever is nobody has no claim on what rests.
func TestPoolRestsForNobody(t *testing.T) {
	p, _ := testPool(nobody, space{prefix: netip.MustParsePrefix("10.77.0.0/24")})
	first := mustLease(t, p, "", any4)
	p.release(first, "")
	if again := mustLease(t, p, "", first.String()); again == first {
		t.Error("somebody got what rests for somebody unknown")
	}
}

// A search does not look at every address of what is leased, or rests.
func TestPoolSkipsBlocks(t *testing.T) {
	p, clock := testPool(nobody, space{netip.MustParsePrefix("fd77::/32"), 48})
	mustLease(t, p, "alice", "fd77:0:1::/48")
	p.release(mustLease(t, p, "alice", "fd77:0:2::/48"), "alice")
	f := p.families[0]
	f.delegate = 0 // so that the search for an address goes on from where it is told to
	for _, want := range []string{"fd77:0:3::/128", "fd77:0:2::/128"} {
		f.next = netip.MustParseAddr("fd77:0:1::")
		if got := mustLease(t, p, "bob", any6); got != netip.MustParsePrefix(want) {
			t.Errorf("bob got %v, want %s", got, want)
		}
		clock.pass(DefaultHold)
	}
}

// What rests is bounded.
func TestPoolForgets(t *testing.T) {
	p, _ := testPool(nobody, space{prefix: netip.MustParsePrefix("fd77::/64")})
	for range 3 * maxResting {
		p.release(mustLease(t, p, "", any6), "")
	}
	if f := p.families[0]; len(f.queue) > maxResting || f.resting.Size() > maxResting {
		t.Errorf("%d leases rest, %d of them in the table", len(f.queue), f.resting.Size())
	}
}
