package routing

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// HostRoutes says which routes of the host's main table go before those of a
// tunnel that are not longer.
type HostRoutes int

const (
	// HostPrivate are, in a family of which the tunnel has most addresses (see
	// IsFull), the routes to private and link-local networks, and the default
	// route for multicast and limited broadcasts. Whoever runs the network that
	// the host is in can hand out routes to all other addresses, by DHCP
	// (option 121, RFC 3442), router advertisements (RFC 4191), or as a network
	// that claims them, and would so take traffic out of the tunnel. In a
	// family of which the tunnel has less, HostPrivate is HostAll.
	HostPrivate HostRoutes = iota

	// HostAll are all but default routes, which count for multicast and limited
	// broadcasts.
	HostAll

	// HostNone is none.
	HostNone
)

// maxSelectors is how many rules there may be in the place of one that asks the
// host's routes for all destinations.
const maxSelectors = 16

var (
	// local are networks whose addresses mean nothing elsewhere: RFC 1918,
	// RFC 6598, RFC 3927, RFC 4193, RFC 4291 section 2.5.6.
	privateNetworks = parsePrefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
		"169.254.0.0/16", "fc00::/7", "fe80::/10")

	// multicastNetworks are destinations of packets for all, or many, on a link.
	multicastNetworks = parsePrefixes("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")

	unicast6 = netip.MustParsePrefix("2000::/3") // what of IPv6 is in use
)

func parsePrefixes(list ...string) (ps []netip.Prefix) {
	for _, p := range list {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

// IsFull reports whether routes hold most addresses of a family: more than half
// of IPv4, or of 2000::/3. A tunnel for them is meant for everything, even if
// some prefixes are left out.
func IsFull(routes []netip.Prefix, ipv6 bool) bool {
	var b netipx.IPSetBuilder
	for _, p := range routes {
		if isIPv6(p) == ipv6 {
			b.AddPrefix(p)
		}
	}
	set, err := b.IPSet()
	if err != nil {
		return false
	}
	whole, covered := 0, 0.0 // covered is a share of the whole
	if ipv6 {
		whole = unicast6.Bits()
	}
	for _, p := range set.Prefixes() {
		if !ipv6 || p.Overlaps(unicast6) {
			covered += 1 / float64(uint64(1)<<min(max(p.Bits()-whole, 0), 63))
		}
	}
	return covered > 0.5
}

// hostRules returns the rules that let routes of the host go before those of
// the tunnel. Each is limited to destinations that the tunnel has routes of
// that length to, where these are few, because rules hold for all tunnels of a
// host: another one may pass over the host's routes to other destinations.
func (s State) hostRules(routes []netip.Prefix) (rules []rule) {
	if s.HostRoutes == HostNone {
		return nil
	}
	type length struct {
		v6   bool
		bits int
	}
	byLength := make(map[length][]netip.Prefix)
	for _, p := range routes {
		l := length{isIPv6(p), p.Bits()}
		byLength[l] = append(byLength[l], p)
	}
	strict := map[bool]bool{false: s.ignoresPublic(false), true: s.ignoresPublic(true)}
	for l, list := range byLength {
		add := func(to netip.Prefix, least int) {
			rules = append(rules, rule{v6: l.v6, bits: l.bits, to: to, least: least})
		}
		overlaps := func(p netip.Prefix) bool { return slices.ContainsFunc(list, p.Overlaps) }
		least := max(l.bits, 1)
		switch {
		case strict[l.v6]:
			for _, p := range privateNetworks {
				if overlaps(p) {
					add(p, max(least, p.Bits()))
				}
			}
			for _, p := range s.Private {
				if overlaps(p) {
					add(p, least)
				}
			}
		case l.bits > 0 && len(list) <= maxSelectors:
			for _, p := range list {
				add(p, least)
			}
		default:
			add(netip.Prefix{}, least)
		}
		for _, p := range multicastNetworks {
			if overlaps(p) && (strict[l.v6] || l.bits < p.Bits()) {
				add(p, 0)
			}
		}
	}
	return rules
}

// HostFirst reports whether routes of the host to network go before those of
// Routes that are not longer.
func (s State) HostFirst(network netip.Prefix) bool {
	return s.HostRoutes != HostNone && (s.isPrivate(network) || !s.ignoresPublic(isIPv6(network)))
}

// ignoresPublic reports whether the host's routes to public addresses of a family
// do not count.
func (s State) ignoresPublic(ipv6 bool) bool {
	return s.HostRoutes == HostPrivate && IsFull(slices.Concat(s.Routes, s.Unreachable), ipv6)
}

// isPrivate reports whether all of p is in networks whose routes of the host
// count in any case.
func (s State) isPrivate(p netip.Prefix) bool {
	return slices.ContainsFunc(slices.Concat(privateNetworks, multicastNetworks, s.Private), func(l netip.Prefix) bool {
		return l.Bits() <= p.Bits() && l.Overlaps(p)
	})
}
