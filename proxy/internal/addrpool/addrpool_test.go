package addrpool

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

// testQuarantine is the quarantine of pools in tests.
const testQuarantine = time.Hour

// clock is a time that tests advance.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func (c *clock) advance(d time.Duration) { c.t = c.t.Add(d) }

func testPool(reserved func(netip.Prefix, string) bool, spaces ...Space) (*Pool, *clock) {
	p := New(Config{Spaces: spaces, Quarantine: testQuarantine, Reserved: reserved})
	c := &clock{time.Unix(1e9, 0)}
	p.now = c.now
	return p, c
}

// holder is a user with one device.
func holder(name string) Holder { return Holder{Owner: name, User: name} }

func mustLease(t *testing.T, p *Pool, owner, want string) netip.Prefix {
	t.Helper()
	got, err := p.Lease(holder(owner), netip.MustParsePrefix(want))
	if err != nil {
		t.Fatalf("%s wants %s: %v", owner, want, err)
	}
	return got
}

const (
	any4 = "0.0.0.0/32"
	any6 = "::/128"
)

// lease is a lease in the model.
type lease struct {
	prefix netip.Prefix
	owner  string
}

// release is the release of an address in the model.
type release struct {
	owner string
	at    time.Time
}

// model is a simple pool that visits every address. Tests compare a Pool with
// it.
type model struct {
	Space
	leases   []lease
	released map[netip.Addr]release // last release of each address
}

// candidates returns all prefixes of the given length that may be leased.
func (m *model) candidates(bits int) (out []netip.Prefix) {
	for p := netip.PrefixFrom(m.Prefix.Addr(), bits); m.Prefix.Contains(p.Addr()); {
		special := p.Contains(m.Prefix.Addr()) || p.Contains(m.Prefix.Addr().Next()) ||
			p.Contains(netip.MustParseAddr("10.77.0.63"))
		if !special && !slices.ContainsFunc(m.leases, func(l lease) bool {
			return l.prefix.Overlaps(p)
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

// heldBack reports whether an address of p is in quarantine and was released by
// another owner.
func (m *model) heldBack(p netip.Prefix, owner string, now time.Time) bool {
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		if g, ok := m.released[a]; ok && g.owner != owner && now.Sub(g.at) < testQuarantine {
			return true
		}
	}
	return false
}

// release releases the lease with the index i, of p as well.
func (m *model) release(p *Pool, i int, now time.Time) {
	h := m.leases[i]
	p.Release(h.prefix, h.owner)
	m.leases = slices.Delete(m.leases, i, i+1)
	for a := h.prefix.Addr(); h.prefix.Contains(a); a = a.Next() {
		m.released[a] = release{h.owner, now}
	}
}

// TestPoolProperties checks random leases and releases of addresses and blocks:
// no two leases overlap, none is lost or misaligned, a wanted and free prefix
// is granted, and a prefix in quarantine goes to another owner only if nothing
// else is free.
func TestPoolProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := model{
			Space: Space{netip.MustParsePrefix("10.77.0.0/26"),
				rapid.SampledFrom([]int{0, 28, 30}).Draw(t, "delegate")},
			released: map[netip.Addr]release{},
		}
		p, clock := testPool(nil, m.Space, Space{Prefix: netip.MustParsePrefix("fd77::/64")})
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			clock.advance(time.Duration(rapid.IntRange(0, 20).Draw(t, "seconds")) * time.Second)
			if len(m.leases) > 0 && rapid.Bool().Draw(t, "release") {
				m.release(p, rapid.IntRange(0, len(m.leases)-1).Draw(t, "which"), clock.t)
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
		if v4, v6 := p.Leased(); v4 != len(m.leases) || v6 != 0 {
			t.Fatalf("the pool counts %d and %d leases, want %d and 0", v4, v6, len(m.leases))
		}
	})
}

// lease leases want for owner from p, and checks the result.
func (m *model) lease(t *rapid.T, p *Pool, owner string, want netip.Prefix, now time.Time) {
	got, err := p.Lease(holder(owner), want)
	bits := 32
	if m.Delegate > 0 && want.Bits() < 32 {
		bits = max(want.Bits(), m.Delegate)
	}
	free := m.candidates(bits)
	if len(free) == 0 && bits < 32 { // all blocks are leased
		bits = 32
		free = m.candidates(bits)
	}
	if len(free) == 0 {
		if !errors.Is(err, ErrExhausted) {
			t.Fatalf("leased %v, %v from a full pool", got, err)
		}
		return
	}
	if err != nil {
		t.Fatalf("%s wants %v, %v are free: %v", owner, want, free, err)
	}
	if got.Bits() != bits || !slices.Contains(free, got) {
		t.Fatalf("leased %v for %v, want one of %v", got, want, free)
	}
	heldBack := func(x netip.Prefix) bool { return m.heldBack(x, owner, now) }
	if i := slices.IndexFunc(free, func(x netip.Prefix) bool {
		return !heldBack(x)
	}); heldBack(got) && i >= 0 {
		t.Fatalf("%s got %v, which is in quarantine, when %v is free", owner, got, free[i])
	}
	wanted := netip.PrefixFrom(want.Addr(), bits).Masked()
	if got != wanted && slices.Contains(free, wanted) && !heldBack(wanted) {
		t.Fatalf("%s got %v instead of %v, which is free", owner, got, wanted)
	}
	m.leases = append(m.leases, lease{got, owner})
}

// TestPoolLosesNothing checks that every address can be leased, once, after ten
// thousand leases and releases of all kinds.
func TestPoolLosesNothing(t *testing.T) {
	s := Space{netip.MustParsePrefix("10.77.0.0/24"), 28}
	s6 := Space{netip.MustParsePrefix("fd77::/48"), 64}
	p, clock := testPool(nil, s, s6)
	random := rand.New(rand.NewPCG(1, 2))
	var leases []lease
	for i := range 10000 {
		clock.advance(time.Second)
		owner := fmt.Sprint("user", random.IntN(50))
		want := netip.MustParsePrefix([]string{any4, any6, "0.0.0.0/28", "::/64", "0.0.0.0/30",
			"::/80"}[random.IntN(6)])
		got, err := p.Lease(holder(owner), want)
		if err == nil {
			for _, h := range leases {
				if h.prefix.Overlaps(got) {
					t.Fatalf("step %d: %v is leased while %v is", i, got, h.prefix)
				}
			}
			leases = append(leases, lease{got, owner})
		} else if !errors.Is(err, ErrExhausted) {
			t.Fatal(err)
		}
		for len(leases) > 0 && (err != nil || random.IntN(5) < 2) {
			j := random.IntN(len(leases))
			p.Release(leases[j].prefix, leases[j].owner)
			leases = slices.Delete(leases, j, j+1)
			err = nil
		}
	}
	for _, h := range leases {
		p.Release(h.prefix, h.owner)
	}
	if v4, v6 := p.Leased(); v4 != 0 || v6 != 0 {
		t.Errorf("%d and %d leases remain, want none", v4, v6)
	}
	seen := map[netip.Prefix]bool{}
	for range 256 - 3 { // all but network, gateway and broadcast
		got := mustLease(t, p, "somebody", any4)
		if seen[got] {
			t.Fatalf("%v was leased twice", got)
		}
		seen[got] = true
	}
	if got, err := p.Lease(Holder{}, netip.MustParsePrefix(any4)); !errors.Is(err,
		ErrExhausted) {
		t.Errorf("leased %v, %v from a full pool", got, err)
	}
}

func TestPoolReservations(t *testing.T) {
	reserved := netip.MustParseAddr("10.77.0.18")
	p, _ := testPool(func(p netip.Prefix, user string) bool {
		return p.Contains(reserved) && user != "alice"
	},
		Space{netip.MustParsePrefix("10.77.0.0/27"), 28})
	alice := Holder{Owner: "alice", User: "alice", Reserved: []netip.Addr{reserved}}
	if got := mustLease(t, p, "bob",
		"10.77.0.16/29"); got != netip.MustParsePrefix("10.77.0.8/29") {
		// Each of the other blocks contains the reserved address, the gateway
		// or the broadcast address.
		t.Errorf("bob got the block %v", got)
	}
	for i := 0; ; i++ {
		got, err := p.Lease(holder("bob"), netip.PrefixFrom(reserved, 32))
		if errors.Is(err, ErrExhausted) && i == 32-3-8-1 {
			break
		}
		if err != nil || got.Contains(reserved) {
			t.Fatalf("lease %d: bob got %v, %v", i, got, err)
		}
	}
	if got, err := p.Lease(alice, netip.MustParsePrefix(any4)); got.Addr() != reserved {
		t.Errorf("alice got %v, %v", got, err)
	}
	if _, err := p.Lease(alice, netip.MustParsePrefix(any6)); !errors.Is(err,
		ErrNoFamily) {
		t.Errorf("an IPv6 address from a pool without IPv6: got %v, want ErrNoFamily", err)
	}
}

// TestPoolReusesLate checks that a released address is the last one to be
// leased to others, even after quarantine.
func TestPoolReusesLate(t *testing.T) {
	p, clock := testPool(nil, Space{Prefix: netip.MustParsePrefix("10.77.0.0/24")})
	first := mustLease(t, p, "alice", any4)
	p.Release(first, "alice")
	clock.advance(2 * testQuarantine)
	for i := range 252 {
		if got := mustLease(t, p, "bob", any4); got == first {
			t.Fatalf("lease %d is the released address %v", i, got)
		}
	}
}

func TestPoolQuarantine(t *testing.T) {
	for name, tc := range map[string]struct {
		space Space
		want  string // prefix requested at first
		first string // prefix leased for it
	}{
		"address": {Space{netip.MustParsePrefix("10.77.0.0/29"), 30}, any4, "10.77.0.2/32"},
		"block":   {Space{netip.MustParsePrefix("10.77.0.0/28"), 30}, "0.0.0.0/30", "10.77.0.8/30"},
		"IPv6":    {Space{netip.MustParsePrefix("fd77::/120"), 124}, "::/124", "fd77::f0/124"},
	} {
		t.Run(name, func(t *testing.T) {
			p, clock := testPool(nil, tc.space)
			first := mustLease(t, p, "alice", tc.want)
			if first != netip.MustParsePrefix(tc.first) {
				t.Fatalf("the first lease is %v, want %v", first, tc.first)
			}
			p.Release(first, "alice")
			clock.advance(testQuarantine - 1)
			second := mustLease(t, p, "bob", first.String())
			if second == first {
				t.Fatal("bob got a prefix in quarantine for alice")
			}
			if again := mustLease(t, p, "alice", tc.want); again != first {
				t.Errorf("alice got %v, want her last one, %v", again, first)
			}
			p.Release(first, "alice")
			p.Release(second, "bob")
			clock.advance(testQuarantine)
			if got := mustLease(t, p, "carol", first.String()); got != first {
				t.Errorf("carol got %v after the quarantine, want %v", got, first)
			}
		})
	}
}

// TestPoolQuarantineWithoutOwner checks that the owner "" does not get back
// what another holder without an owner released.
func TestPoolQuarantineWithoutOwner(t *testing.T) {
	p, _ := testPool(nil, Space{Prefix: netip.MustParsePrefix("10.77.0.0/24")})
	first := mustLease(t, p, "", any4)
	p.Release(first, "")
	if again := mustLease(t, p, "", first.String()); again == first {
		t.Error("a holder without an owner got an address in quarantine")
	}
}

// TestPoolSkipsBlocks checks that a search does not visit each address of a
// block that is leased or in quarantine.
func TestPoolSkipsBlocks(t *testing.T) {
	p, clock := testPool(nil, Space{netip.MustParsePrefix("fd77::/32"), 48})
	mustLease(t, p, "alice", "fd77:0:1::/48")
	p.Release(mustLease(t, p, "alice", "fd77:0:2::/48"), "alice")
	f := p.families[0]
	f.delegate = 0 // makes the search for an address start at next
	for _, want := range []string{"fd77:0:3::/128", "fd77:0:2::/128"} {
		f.next = netip.MustParseAddr("fd77:0:1::")
		if got := mustLease(t, p, "bob", any6); got != netip.MustParsePrefix(want) {
			t.Errorf("bob got %v, want %s", got, want)
		}
		clock.advance(testQuarantine)
	}
}

// TestPoolBoundsQuarantine checks that the number of prefixes in quarantine is
// bounded.
func TestPoolBoundsQuarantine(t *testing.T) {
	p, _ := testPool(nil, Space{Prefix: netip.MustParsePrefix("fd77::/64")})
	for range 3 * maxQuarantined {
		p.Release(mustLease(t, p, "", any6), "")
	}
	if f := p.families[0]; len(f.queue) > maxQuarantined || f.quarantined.Size() > maxQuarantined {
		t.Errorf("%d leases and %d prefixes are in quarantine, want %d at most", len(f.queue),
			f.quarantined.Size(), maxQuarantined)
	}
}
