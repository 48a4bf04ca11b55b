package routing

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"go4.org/netipx"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// The rules and routes of a plan have the documented effect: the longest prefix
// among the tunnel's routes and the accepted routes of the host takes
// precedence. The host wins a tie, except between default routes, and excluded
// prefixes are routed by the host.
func TestPlanProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v6 := rapid.Bool().Draw(t, "v6")
		// Addresses with few different bits make overlaps likely.
		addr := rapid.Custom(func(t *rapid.T) netip.Addr {
			size, head := 4, rapid.SampledFrom([][]byte{{10, 0}, {8, 0}, {239, 0},
				{255, 255}}).Draw(t, "head")
			if v6 {
				size, head = 16, rapid.SampledFrom([][]byte{{0xfd, 0}, {0x20, 1},
					{0xff, 2}}).Draw(t, "head")
			}
			tail := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x80, 0xff}), size-2,
				size-2).Draw(t, "bytes")
			a, _ := netip.AddrFromSlice(slices.Concat(head, tail))
			return a
		})
		list := func(label string, maxLen int) []netip.Prefix {
			return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
				a := addr.Draw(t, "address")
				return netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
			}), 0, maxLen).Draw(t, label)
		}
		host, s := list("host", 6), State{
			Routes: list("routes", 8), Exclude: list("exclude", 4),
			HostRoutes: HostRoutes(rapid.IntRange(0, 2).Draw(t, "host routes")),
		}
		full := s.HostRoutes == HostPrivate && IsFull(s.Routes, v6)
		k := &kernel{index: rapid.IntRange(1, 1<<23).Draw(t, "index"), ipv6: true}
		k.Mark = DefaultMark
		p, err := newPlan(s, k)
		if err != nil {
			t.Fatal(err)
		}
		for _, dst := range rapid.SliceOfN(addr, 1, 8).Draw(t, "destinations") {
			want := false
			if longest(s.Exclude, dst) < 0 {
				tunnel, host := longest(s.Routes, dst), longest(host, dst)
				private, shared := longest(privateNetworks, dst), longest(multicastNetworks, dst)
				hostWins := host > 0 && host >= tunnel
				switch {
				case s.HostRoutes == HostNone:
					hostWins = false
				case shared >= 0 && (full || tunnel < shared):
					hostWins = host >= 0
				case full:
					hostWins = hostWins && private >= 0 && host >= private
				}
				want = tunnel >= 0 && !hostWins
			}
			if got := p.entersTunnel(k, host, dst); got != want {
				t.Fatalf("%v enters the tunnel: %t, want %t", dst, got, want)
			}
		}
	})
}

// longest returns the length of the longest prefix that contains a, or -1 if
// there is none.
func longest(list []netip.Prefix, a netip.Addr) int {
	bits := -1
	for _, p := range list {
		if p.Contains(a) {
			bits = max(bits, p.Bits())
		}
	}
	return bits
}

// entersTunnel reports whether the kernel routes dst into the tunnel, with the
// rules and routes of p and the routes of the host.
func (p plan) entersTunnel(k *kernel, host []netip.Prefix, dst netip.Addr) bool {
	rules := slices.SortedFunc(maps.Keys(p.rules), func(a, b rule) int {
		return cmp.Compare(a.netlink(k).Priority, b.netlink(k).Priority)
	})
	for _, r := range rules {
		n := r.netlink(k)
		if n.Family == unix.AF_INET6 != dst.Is6() {
			continue
		}
		if n.Dst != nil && !prefixOf(n.Dst).Contains(dst) {
			continue
		}
		if n.Table == unix.RT_TABLE_MAIN {
			if longest(host, dst) > n.SuppressPrefixlen {
				return false
			}
			continue
		}
		best := route{prefix: netip.Prefix{}}
		found := false
		for r := range p.routes {
			if r.table == n.Table && r.prefix.Contains(dst) &&
				(!found || r.prefix.Bits() > best.prefix.Bits()) {
				best, found = r, true
			}
		}
		if found && best.kind == intoTunnel {
			return true
		}
	}
	return false
}

func TestTableNumbers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		index := rapid.IntRange(1, indexMask).Draw(t, "index")
		r := rule{v6: rapid.Bool().Draw(t, "v6"), bits: rapid.IntRange(0, 32).Draw(t, "bits"),
			tunnel: rapid.Bool().Draw(t, "tunnel")}
		if !r.tunnel {
			if rapid.Bool().Draw(t, "limited") {
				r.to = map[bool]netip.Prefix{false: netip.MustParsePrefix("10.0.0.0/8"),
					true: netip.MustParsePrefix("fc00::/7")}[r.v6]
			}
			r.minBits = rapid.IntRange(0, 32).Draw(t, "minBits")
		}
		k := &kernel{index: index}
		k.Mark = rapid.Uint32Range(1, 1<<32-1).Draw(t, "mark")
		n := r.netlink(k)
		if got, gotIndex, ok := parseRule(n); !ok || got != r || gotIndex != index {
			t.Fatalf("parseRule(%v) = %+v, %d, %t; want %+v, %d", n, got, gotIndex, ok, r, index)
		}
		if n.Priority <= 0 || n.Priority >= 32766 {
			t.Fatalf("priority %d is not between the rules for local and main", n.Priority)
		}
	})
	for _, id := range []int{0, unix.RT_TABLE_MAIN, unix.RT_TABLE_LOCAL, 51820, 1<<31 - 1,
		1<<30 - 1} {
		if _, _, ok := tableOwner(id); ok {
			t.Errorf("table %d is considered a table of a Manager", id)
		}
	}
}

func TestIsFull(t *testing.T) {
	minus := func(all string, holes ...string) []netip.Prefix {
		var b netipx.IPSetBuilder
		b.AddPrefix(netip.MustParsePrefix(all))
		for _, p := range prefixes(holes...) {
			b.RemovePrefix(p)
		}
		set, err := b.IPSet()
		if err != nil {
			t.Fatal(err)
		}
		return set.Prefixes()
	}
	for _, tt := range []struct {
		name       string
		routes     []netip.Prefix
		ipv4, ipv6 bool
	}{
		{"nothing", nil, false, false},
		{"everything", prefixes("0.0.0.0/0", "::/0"), true, true},
		{"all of IPv4", prefixes("0.0.0.0/0"), true, false},
		{"everything in halves", prefixes("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"),
			true, true},
		{"global unicast IPv6", prefixes("2000::/3"), false, true},
		{"half", prefixes("0.0.0.0/1", "2000::/4"), false, false},
		{"half, twice", prefixes("0.0.0.0/1", "0.0.0.0/2", "10.0.0.0/8"), false, false},
		{"everything except private networks",
			minus("0.0.0.0/0", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3"),
			true, false},
		{"everything except one address", minus("::/0", "2001:db8::1/128"), false, true},
		{"private networks", prefixes("10.0.0.0/8", "192.168.0.0/16", "fc00::/7"), false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if ipv4, ipv6 := IsFull(tt.routes, false), IsFull(tt.routes, true); ipv4 != tt.ipv4 ||
				ipv6 != tt.ipv6 {
				t.Errorf("IPv4 %t, IPv6 %t; want %t, %t", ipv4, ipv6, tt.ipv4, tt.ipv6)
			}
		})
	}
}

// Rules have the protocol of the kernel, so that other programs do not delete
// them. parseRule recognizes them by table and protocol.
func TestRuleOwner(t *testing.T) {
	k := &kernel{index: 7, ipv6: true}
	k.Mark = DefaultMark
	own := rule{bits: 0, tunnel: true}.netlink(k)
	if own.Protocol != unix.RTPROT_KERNEL {
		t.Errorf("protocol %d, want %d", own.Protocol, unix.RTPROT_KERNEL)
	}
	for _, tc := range []struct {
		name     string
		protocol uint8
		table    int
		want     bool
	}{
		{"own rule", unix.RTPROT_KERNEL, own.Table, true},
		{"rule of an earlier version", protocol, own.Table, true},
		{"rule of another program for the same table", unix.RTPROT_STATIC, own.Table, false},
		{"rule of the kernel", unix.RTPROT_KERNEL, unix.RT_TABLE_MAIN, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := *own
			n.Protocol, n.Table = tc.protocol, tc.table
			if _, _, ok := parseRule(&n); ok != tc.want {
				t.Errorf("got %t, want %t", ok, tc.want)
			}
		})
	}
}
