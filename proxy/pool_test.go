package proxy

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func nobody(netip.Addr) string { return "" }

// However leases and releases follow each other, no address is with two holders, none gets lost, and none is outside the pool.
func TestPoolProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefix := netip.MustParsePrefix("10.77.0.0/28")
		p := newPool(nobody, prefix, netip.MustParsePrefix("fd77::/64"))
		const usable = 16 - 3 // without network, proxy and broadcast
		held := map[netip.Addr]bool{}
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			if len(held) > 0 && rapid.Bool().Draw(t, "release") {
				for a := range held {
					p.release(a)
					delete(held, a)
					break
				}
				continue
			}
			want := netip.IPv4Unspecified()
			if rapid.Bool().Draw(t, "prefer") {
				want = netip.AddrFrom4([4]byte{10, 77, 0, rapid.Byte().Draw(t, "host")})
			}
			a, err := p.lease(User{}, want)
			if len(held) == usable {
				if !errors.Is(err, errPoolExhausted) {
					t.Fatalf("leased %v, %v from a full pool", a, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%d of %d leased: %v", len(held), usable, err)
			}
			if held[a] || !prefix.Contains(a) || a == prefix.Addr() || a == netip.MustParseAddr("10.77.0.1") || a == netip.MustParseAddr("10.77.0.15") {
				t.Fatalf("leased %v while %v were held", a, held)
			}
			if want.IsUnspecified() || a == want || held[want] || !p.families[0].usable(want) {
				held[a] = true
				continue
			}
			t.Fatalf("leased %v instead of the free %v", a, want)
		}
		if v4, _ := p.leased(); v4 != len(held) {
			t.Fatalf("the pool counts %d leases, %d are held", v4, len(held))
		}
	})
}

func TestPoolReservations(t *testing.T) {
	reserved := netip.MustParseAddr("10.77.0.2")
	p := newPool(func(a netip.Addr) string {
		if a == reserved {
			return "alice"
		}
		return ""
	}, netip.MustParsePrefix("10.77.0.0/29"))
	alice := User{Name: "alice", Addresses: []netip.Addr{reserved}}
	for range 4 {
		if a, err := p.lease(User{Name: "bob"}, reserved); err != nil || a == reserved {
			t.Fatalf("bob got %v, %v", a, err)
		}
	}
	if _, err := p.lease(User{Name: "bob"}, netip.IPv4Unspecified()); !errors.Is(err, errPoolExhausted) {
		t.Errorf("bob got what is reserved: %v", err)
	}
	if a, err := p.lease(alice, netip.IPv4Unspecified()); a != reserved {
		t.Errorf("alice got %v, %v", a, err)
	}
	if _, err := p.lease(alice, netip.IPv6Unspecified()); !errors.Is(err, errNoFamily) {
		t.Errorf("an IPv6 address from a pool without: %v", err)
	}
}

// An address that was given back is the last to be used again.
func TestPoolReusesLate(t *testing.T) {
	p := newPool(nobody, netip.MustParsePrefix("10.77.0.0/24"))
	first, err := p.lease(User{}, netip.IPv4Unspecified())
	if err != nil {
		t.Fatal(err)
	}
	p.release(first)
	for i := range 252 {
		a, err := p.lease(User{}, netip.IPv4Unspecified())
		if err != nil || a == first {
			t.Fatalf("lease %d is %v, %v", i, a, err)
		}
	}
}
