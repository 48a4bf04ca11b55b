package routing

import (
	"bytes"
	"math/big"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

func TestPrefixes(t *testing.T) {
	for _, tt := range []struct {
		name, start, end string
		want             []netip.Prefix
	}{
		{"all IPv4", "0.0.0.0", "255.255.255.255", prefixes("0.0.0.0/0")},
		{"all IPv6", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", prefixes("::/0")},
		{"one address", "192.0.2.7", "192.0.2.7", prefixes("192.0.2.7/32")},
		{"one prefix", "192.0.2.0", "192.0.2.255", prefixes("192.0.2.0/24")},
		{"several prefixes", "10.0.0.1", "10.0.0.6",
			prefixes("10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31",
				"10.0.0.6/32")},
		{"two addresses", "2001:db8::1", "2001:db8::2",
			prefixes("2001:db8::1/128", "2001:db8::2/128")},
		{"from zero", "0.0.0.0", "9.255.255.255", prefixes("0.0.0.0/5", "8.0.0.0/7")},
		{"end before start", "10.0.0.2", "10.0.0.1", nil},
		{"two families", "10.0.0.1", "2001:db8::1", nil},
		{"zone", "fe80::1%eth0", "fe80::2%eth0", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Prefixes(netip.MustParseAddr(tt.start), netip.MustParseAddr(tt.end))
			equal := cmpopts.EquateComparable(netip.Prefix{})
			if diff := cmp.Diff(tt.want, got, equal); diff != "" {
				t.Errorf("Prefixes(%s, %s) (-want +got):\n%s", tt.start, tt.end, diff)
			}
		})
	}
	t.Run("zero addresses", func(t *testing.T) {
		if got := Prefixes(netip.Addr{}, netip.Addr{}); got != nil {
			t.Errorf("got %v, want nil", got)
		}
	})
}

// The prefixes of any range cover it from start to end without gaps or
// overlaps. No two adjacent prefixes can be merged, so there are no more than
// necessary.
func TestPrefixesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{4, 16}).Draw(t, "size")
		// Addresses with a common head make short ranges likely.
		head := rapid.SliceOfN(rapid.Byte(), 0, size).Draw(t, "head")
		addr := func(label string) netip.Addr {
			tail := rapid.SliceOfN(rapid.Byte(), size-len(head), size-len(head)).Draw(t, label)
			a, _ := netip.AddrFromSlice(append(bytes.Clone(head), tail...))
			return a
		}
		start, end := addr("start"), addr("end")
		if end.Less(start) {
			start, end = end, start
		}
		ps := Prefixes(start, end)
		next := number(start)
		for i, p := range ps {
			if p != p.Masked() {
				t.Fatalf("%v has host bits", p)
			}
			if number(p.Addr()).Cmp(next) != 0 {
				t.Fatalf("%v..%v: %v at index %d of %v does not follow the previous one",
					start, end, p, i, ps)
			}
			next.Add(next, new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits())))
			if i > 0 && ps[i-1].Bits() == p.Bits() && p.Bits() > 0 &&
				netip.PrefixFrom(ps[i-1].Addr(), p.Bits()-1).Contains(p.Addr()) &&
				shorten(ps[i-1], p.Bits()-1).Addr() == ps[i-1].Addr() {
				t.Fatalf("%v..%v: %v and %v can be merged", start, end, ps[i-1], p)
			}
		}
		if next.Cmp(new(big.Int).Add(number(end), big.NewInt(1))) != 0 {
			t.Fatalf("%v..%v: %v has another end", start, end, ps)
		}
	})
}

// number returns a as an integer.
func number(a netip.Addr) *big.Int {
	return new(big.Int).SetBytes(a.AsSlice())
}
