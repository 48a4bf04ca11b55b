package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// Routes of the tunnel and the host compete by longest prefix match.
func TestLongestPrefixMatch(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	tunnel, _ := h.tun("masque0")
	for _, r := range []string{
		"10.20.0.0/16", "10.1.2.0/24", "172.16.0.0/12", "10.9.1.0/24",
		"2001:db8:20::/48", "2001:db8:1:2::/64", "2001:db8:14::/46", "2001:db8:9:1::/64",
	} {
		h.ip("route add " + r + " dev up0 proto static")
	}
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	addresses := prefixes("10.77.0.2/32", "fd77::2/128")
	split := prefixes(
		"10.0.0.0/8", "10.20.30.0/24", "172.16.0.0/12", "192.168.0.0/16", "198.51.100.0/25",
		"2001:db8::/32", "2001:db8:20:30::/64", "2001:db8:14::/46", "2001:db8:5::/65",
	)
	exclude := prefixes("10.9.0.0/16", "10.20.30.64/26", "192.0.2.0/24", "2001:db8:9::/48",
		"2001:db8:20:30:8000::/65", "3fff::/20")
	for _, tt := range []struct {
		name  string
		state State
		want  map[string]int // interface by destination
	}{
		{
			"split", State{Addresses: addresses, Routes: split, Exclude: exclude},
			map[string]int{
				"10.2.3.4":               tunnel, // route of the tunnel
				"10.20.1.1":              up,     // longer route of the host
				"10.20.30.1":             tunnel, // still longer route of the tunnel
				"10.20.30.65":            up,     // excluded, /16 of the host
				"10.1.2.3":               up,
				"10.9.1.1":               up, // excluded, route of the host
				"10.9.2.1":               up, // excluded, default route of the host
				"172.16.5.5":             up, // same length
				"192.168.5.77":           up, // the LAN
				"192.168.6.1":            tunnel,
				"198.51.100.1":           tunnel,
				"198.51.100.200":         up, // not in the tunnel
				"203.0.113.1":            up,
				"127.0.0.1":              1,
				"10.77.0.2":              1, // address of the host
				"2001:db8:2::1":          tunnel,
				"2001:db8:20:1::1":       up,
				"2001:db8:20:30::1":      tunnel,
				"2001:db8:20:30:8000::1": up,
				"2001:db8:1:2::3":        up,
				"2001:db8:9:1::1":        up,
				"2001:db8:9:2::1":        up,
				"2001:db8:14::5":         up, // same length
				// One half of the LAN is in the tunnel, with a longer prefix.
				"2001:db8:5::77":        tunnel,
				"2001:db8:5:0:8000::77": up,
				"2a00::1":               up,
				"::1":                   1,
				"fd77::2":               1,
			},
		},
		{
			"full, with all routes of the host", State{
				Addresses: addresses, Exclude: exclude, HostRoutes: HostAll,
				Routes: slices.Concat(split, prefixes("0.0.0.0/0", "::/0")),
			},
			map[string]int{
				"203.0.113.1":           tunnel, // default route of the tunnel
				"198.51.100.200":        tunnel,
				"192.168.5.77":          up, // the LAN
				"10.20.1.1":             up,
				"10.20.30.1":            tunnel,
				"10.20.30.65":           up,
				"10.9.2.1":              up,
				"192.0.2.1":             up, // excluded
				"172.16.5.5":            up,
				"2a00::1":               tunnel,
				"2001:db8:20:1::1":      up,
				"2001:db8:9:2::1":       up,
				"3fff::1":               up,
				"2001:db8:5:0:8000::77": up,
			},
		},
		{
			"full", State{
				Addresses: addresses, Exclude: exclude,
				Routes: slices.Concat(split, prefixes("0.0.0.0/0", "::/0")),
			},
			map[string]int{
				"203.0.113.1":  tunnel,
				"192.168.5.77": up,     // the LAN
				"169.254.1.1":  tunnel, // no route except default routes
				"10.20.1.1":    up,     // longer route of the host, private
				"10.20.30.1":   tunnel,
				"10.9.2.1":     up, // excluded
				"192.0.2.1":    up,
				"172.16.5.5":   up,
				// Multicast and limited broadcast use the default route of the
				// host.
				"224.0.0.251":           up,
				"239.255.255.250":       up,
				"255.255.255.255":       up,
				"2a00::1":               tunnel,
				"2001:db8:20:1::1":      tunnel, // longer route of the host, public
				"2001:db8:5:0:8000::77": tunnel,
				"3fff::1":               up,
			},
		},
		{
			"full, with no route of the host", State{
				Addresses: addresses, Routes: prefixes("0.0.0.0/0", "::/0"), HostRoutes: HostNone,
			},
			map[string]int{
				"192.168.5.77": tunnel, "10.20.1.1": tunnel, "239.255.255.250": tunnel,
				"255.255.255.255": tunnel, "2001:db8:5::77": tunnel,
			},
		},
		{
			"everything except one address", State{Addresses: addresses, Routes: slices.Concat(
				Prefixes(netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("203.0.113.6")),
				Prefixes(netip.MustParseAddr("203.0.113.8"),
					netip.MustParseAddr("255.255.255.255")),
			)},
			map[string]int{
				"203.0.113.6": tunnel, "203.0.113.7": up, "203.0.113.8": tunnel, "192.168.5.77": up,
				"8.8.8.8": tunnel, "2a00::1": up,
			},
		},
		{
			"everything excluded", State{
				Addresses: addresses,
				Routes:    prefixes("10.0.0.0/8", "10.20.30.0/24", "2001:db8::/32"),
				Exclude:   prefixes("10.0.0.0/7", "2001:db8::/32"),
			},
			map[string]int{"10.2.3.4": up, "10.20.30.1": up, "2001:db8:2::1": up},
		},
		{
			"nothing", State{Addresses: addresses},
			map[string]int{"203.0.113.1": up, "10.2.3.4": up, "2a00::1": up},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			h.apply(m, tt.state)
			h.wantInterfaces(tt.want)
			for dst, want := range tt.want {
				if want == tunnel {
					want = up // outer packets never enter the tunnel
				}
				if got := h.lookup(dst, DefaultMark); got != want {
					t.Errorf("%s with the mark is routed to interface %d, want %d", dst, got, want)
				}
			}
		})
	}
}

// Routes that the host's network hands out do not divert packets from a full
// tunnel: by DHCP, by router advertisement, or as a network with public
// addresses.
func TestNetworkRoutesStayInTunnel(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	tunnel, _ := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	addresses, all := prefixes("10.77.0.2/32", "fd77::2/128"), prefixes("0.0.0.0/0", "::/0")
	allAddresses := func(v6 bool) (list []netip.Prefix) {
		if v6 {
			return Prefixes(netip.MustParseAddr("::1"),
				netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"))
		}
		return Prefixes(netip.MustParseAddr("0.0.0.1"), netip.MustParseAddr("255.255.255.254"))
	}
	for _, tt := range []struct {
		name, route string
		to          string
		leaves      bool // HostAll lets the packet leave outside the tunnel
	}{
		{"half of everything", "0.0.0.0/1 via 192.168.5.1 dev up0", "8.8.8.8", true},
		{"half of everything, to a private address", "0.0.0.0/1 via 192.168.5.1 dev up0",
			"10.1.2.3", true},
		{"one address", "8.8.8.8/32 via 192.168.5.1 dev up0", "8.8.8.8", true},
		{"network on the link", "8.8.8.0/24 dev up0", "8.8.8.8", true},
		{"network for documentation", "192.0.2.0/24 dev up0", "192.0.2.1", true},
		{"error route", "unreachable 8.8.8.0/24", "8.8.8.8", true},
		{"IPv6, from a router advertisement", "2a00::/16 via 2001:db8:5::1 proto ra",
			"2a00::1", true},
		{"IPv6, half of everything, to a private address", "::/1 via 2001:db8:5::1",
			"fd01::1", false},
		{"IPv6, half of everything, to a public address", "::/1 via 2001:db8:5::1",
			"2a00::1", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			h.ip("route add " + tt.route)
			defer h.ip("route del " + tt.route)
			for _, s := range []State{
				{Addresses: addresses, Routes: all},
				{Addresses: addresses,
					Routes: slices.Concat(allAddresses(false), allAddresses(true))},
				{Addresses: addresses, Routes: all, HostRoutes: HostNone},
			} {
				h.apply(m, s)
				h.wantInterfaces(map[string]int{tt.to: tunnel,
					"192.168.5.77": map[bool]int{false: up,
						true: tunnel}[s.HostRoutes == HostNone]})
			}
			h.apply(m, State{Addresses: addresses, Routes: all, HostRoutes: HostAll})
			if leaves := h.lookup(tt.to, 0) != tunnel; leaves != tt.leaves {
				t.Errorf("with HostAll, the packet leaves outside the tunnel: %t, want %t",
					leaves, tt.leaves)
			}
			h.apply(m, State{Addresses: addresses, Routes: all, Private: prefixes("8.8.8.0/24")})
			if leaves, want := h.lookup(tt.to, 0) != tunnel, tt.to == "8.8.8.8"; leaves != want {
				t.Errorf("with Private 8.8.8.0/24, the packet leaves: %t, want %t", leaves, want)
			}
		})
	}
}

// Routes of the host that take precedence over a split tunnel do not take
// precedence over a full tunnel on the same host.
func TestSplitBesideFullTunnel(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	full, _ := h.tun("masque0")
	split, _ := h.tun("masque1")
	h.apply(h.open(Config{Instance: "full", Interface: "masque0", Mark: DefaultMark}), State{
		Addresses: prefixes("10.77.0.2/32", "fd77::2/128"), Routes: prefixes("0.0.0.0/0", "::/0"),
	})
	h.apply(h.open(Config{Instance: "split", Interface: "masque1", Mark: DefaultMark}), State{
		Addresses: prefixes("10.78.0.2/32", "fd78::2/128"),
		Routes:    prefixes("9.9.0.0/16", "2a01::/16"),
	})
	for _, r := range []string{"8.8.8.0/24 via 192.168.5.1 dev up0",
		"9.9.9.0/24 via 192.168.5.1 dev up0", "2a00:1::/32 via 2001:db8:5::1"} {
		h.ip("route add " + r)
	}
	h.wantInterfaces(map[string]int{
		"8.8.8.8": full, "9.9.8.8": split, "9.9.9.9": up, "1.1.1.1": full, "192.168.5.77": up,
		"2a00:1::1": full, "2a01::1": split,
	})
}

// Changed routes of the host take effect immediately.
func TestHostChanges(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	tunnel, _ := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, State{Addresses: prefixes("10.77.0.2/32"),
		Routes: prefixes("0.0.0.0/0", "10.0.0.0/8", "::/0")})
	for _, tt := range []struct {
		change    string
		dst       string
		want      int // interface; 0: unreachable
		wantOuter int // interface of outer packets
	}{
		{"addr add 10.5.0.2/16 dev up0", "10.5.1.1", up, up}, // new LAN
		{"addr del 10.5.0.2/16 dev up0", "10.5.1.1", tunnel, up},
		{"route del default", "203.0.113.1", tunnel, 0},
		{"route add default dev up0", "203.0.113.1", tunnel, up},
		{"-6 route del default", "2a00::1", tunnel, 0},
	} {
		t.Run(tt.change, func(t *testing.T) {
			h := h.in(t)
			h.ip(tt.change)
			h.wantInterfaces(map[string]int{tt.dst: tt.want})
			if got := h.lookup(tt.dst, DefaultMark); got != tt.wantOuter {
				t.Errorf("%s with the mark is routed to interface %d, want %d", tt.dst, got,
					tt.wantOuter)
			}
		})
	}
}

// Error routes of the host take precedence over longer routes of the tunnel, as
// the package documentation states.
func TestHostErrorRoutes(t *testing.T) {
	h := newHost(t)
	h.underlay()
	tunnel, _ := h.tun("masque0")
	h.ip("route add unreachable 10.0.0.0/8")
	h.ip("-6 route add unreachable fd01::/16")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, State{Routes: prefixes("0.0.0.0/0", "10.1.0.0/16", "::/0", "fd01:1::/32")})
	h.wantInterfaces(map[string]int{"10.1.0.1": 0, "10.2.0.1": 0, "fd01:1::1": 0,
		"203.0.113.1": tunnel, "2a00::1": tunnel})
}

// Excluded destinations are unreachable if the host has no route to them. They
// do not enter the tunnel.
func TestExcludedWithoutRoute(t *testing.T) {
	h := newHost(t)
	tunnel, _ := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, State{Routes: prefixes("0.0.0.0/0", "::/0"),
		Exclude: prefixes("192.0.2.0/24", "3fff::/20")})
	h.wantInterfaces(map[string]int{"192.0.2.1": 0, "3fff::1": 0, "192.0.3.1": tunnel,
		"3fff:f000::1": tunnel})
}

// With several tunnels on a host, the longest prefix of all tunnels takes
// precedence, and the first tunnel among prefixes of the same length.
func TestSeveralInstances(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	before := h.snapshot()
	const n = 3
	var tunnels [n]int
	var closeTUN [n]func()
	var managers [n]*Manager
	for i := range n {
		name := fmt.Sprintf("masque%d", i)
		tunnels[i], closeTUN[i] = h.tun(name)
		managers[i] = h.open(Config{Instance: name, Interface: name, Mark: DefaultMark})
	}
	h.apply(managers[0], State{Addresses: prefixes("10.77.0.2/32"),
		Routes: prefixes("0.0.0.0/0", "10.1.2.0/24", "::/0")})
	h.apply(managers[1], State{Addresses: prefixes("10.77.1.2/32"),
		Routes: prefixes("10.1.0.0/16", "0.0.0.0/0", "::/0", "fd01:2::/32")})
	h.apply(managers[2], State{Addresses: prefixes("10.77.2.2/32"),
		Routes: prefixes("10.1.2.128/25", "10.0.0.0/8", "fd01::/16")})
	check := func(want map[string]int) {
		t.Helper()
		h.wantInterfaces(want)
		for dst := range want {
			if got := h.lookup(dst, DefaultMark); got != up {
				t.Errorf("%s with the mark is routed to interface %d, want %d", dst, got, up)
			}
		}
	}
	check(map[string]int{
		"203.0.113.1": tunnels[0], "10.1.2.3": tunnels[0], "10.1.2.200": tunnels[2],
		"10.1.3.3": tunnels[1],
		"10.2.3.4": tunnels[2], "2a00::1": tunnels[0], "fd01:2::1": tunnels[1],
		"fd01:3::1": tunnels[2],
	})
	h.close(managers[0])
	check(map[string]int{
		"203.0.113.1": tunnels[1], "10.1.2.3": tunnels[1], "10.1.2.200": tunnels[2],
		"10.1.3.3": tunnels[1],
		"10.2.3.4": tunnels[2], "2a00::1": tunnels[1], "fd01:2::1": tunnels[1],
		"fd01:3::1": tunnels[2],
	})
	h.close(managers[2])
	h.close(managers[1])
	check(map[string]int{"203.0.113.1": up, "10.1.2.3": up, "2a00::1": up})
	for i := range n {
		closeTUN[i]()
	}
	h.wantSnapshot(before)
}
