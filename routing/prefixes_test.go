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
		start, end string
		want       []netip.Prefix
	}{
		{"0.0.0.0", "255.255.255.255", prefixes("0.0.0.0/0")},
		{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", prefixes("::/0")},
		{"192.0.2.7", "192.0.2.7", prefixes("192.0.2.7/32")},
		{"192.0.2.0", "192.0.2.255", prefixes("192.0.2.0/24")},
		{"10.0.0.1", "10.0.0.6", prefixes("10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31",
			"10.0.0.6/32")},
		{"2001:db8::1", "2001:db8::2", prefixes("2001:db8::1/128", "2001:db8::2/128")},
		{"0.0.0.0", "9.255.255.255", prefixes("0.0.0.0/5", "8.0.0.0/7")},
		{"10.0.0.2", "10.0.0.1", nil},
		{"10.0.0.1", "2001:db8::1", nil},
		{"fe80::1%eth0", "fe80::2%eth0", nil},
	} {
		got := Prefixes(netip.MustParseAddr(tt.start), netip.MustParseAddr(tt.end))
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("Prefixes(%s, %s) (-want +got):\n%s", tt.start, tt.end, diff)
		}
	}
	if got := Prefixes(netip.Addr{}, netip.Addr{}); got != nil {
		t.Errorf("Prefixes of no addresses: %v, want nil", got)
	}
}

// Any range: the prefixes follow each other from start to end without gap or
// overlap, and no two neighbours could be one prefix, which makes them the
// fewest.
func TestPrefixesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{4, 16}).Draw(t, "size")
		// A common head makes short ranges likely.
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
				t.Fatalf("%v has bits after the prefix", p)
			}
			if number(p.Addr()).Cmp(next) != 0 {
				t.Fatalf("%v..%v: %v at place %d of %v: not where the one before ends", start, end,
					p, i, ps)
			}
			next.Add(next, new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits())))
			if i > 0 && ps[i-1].Bits() == p.Bits() && p.Bits() > 0 &&
				netip.PrefixFrom(ps[i-1].Addr(), p.Bits()-1).Contains(p.Addr()) &&
				shorten(ps[i-1], p.Bits()-1).Addr() == ps[i-1].Addr() {
				t.Fatalf("%v..%v: %v and %v are one prefix", start, end, ps[i-1], p)
			}
		}
		if next.Cmp(new(big.Int).Add(number(end), big.NewInt(1))) != 0 {
			t.Fatalf("%v..%v: %v ends elsewhere", start, end, ps)
		}
	})
}

func number(a netip.Addr) *big.Int {
	return new(big.Int).SetBytes(a.AsSlice())
}
