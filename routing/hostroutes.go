package routing

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// HostRoutes selects the routes of the host's main table that take precedence
// over routes of the tunnel with the same or a shorter prefix.
type HostRoutes int

const (
	// HostPrivate selects routes to private and link-local networks if the
	// tunnel has most addresses of the family (see IsFull), and HostAll
	// otherwise. The operator of the host's network could take other traffic
	// out of the tunnel with routes from DHCP (option 121, RFC 3442) or router
	// advertisements (RFC 4191), or with a network that claims public
	// addresses. The default route is selected for multicast and limited
	// broadcast packets only.
	HostPrivate HostRoutes = iota

	// HostAll selects all routes. The default route is selected for multicast
	// and limited broadcast packets only.
	HostAll

	// HostNone selects no route.
	HostNone
)

// maxSelectors is the greatest number of rules with one destination each. For
// more destinations there is one rule for all of them.
const maxSelectors = 16

var (
	// privateNetworks have addresses without a global meaning (RFC 1918,
	// RFC 6598, RFC 3927, RFC 4193, RFC 4291 section 2.5.6).
	privateNetworks = parsePrefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
		"100.64.0.0/10",
		"169.254.0.0/16", "fc00::/7", "fe80::/10")

	// multicastNetworks are the multicast addresses and the limited broadcast
	// address.
	multicastNetworks = parsePrefixes("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")

	unicast6 = netip.MustParsePrefix("2000::/3") // the allocated addresses of IPv6
)

func parsePrefixes(list ...string) (ps []netip.Prefix) {
	for _, p := range list {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

// IsFull reports whether routes contain most addresses of a family: more than
// half of IPv4, or of 2000::/3. Such routes are meant for everything, even
// without some prefixes.
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
	// fraction is the part of the addresses within a prefix of length all.
	all, fraction := 0, 0.0
	if ipv6 {
		all = unicast6.Bits()
	}
	for _, p := range set.Prefixes() {
		if !ipv6 || p.Overlaps(unicast6) {
			fraction += 1 / float64(uint64(1)<<min(max(p.Bits()-all, 0), 63))
		}
	}
	return fraction > 0.5
}

// hostRules returns the rules by which routes of the host take precedence over
// routes, the tunnel's. Rules apply to all tunnels of a host, and another
// tunnel may ignore the host's routes. So each rule is limited to the
// destinations of the tunnel's routes of its length, if these are few.
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
	privateOnly := map[bool]bool{false: s.ignoresPublic(false), true: s.ignoresPublic(true)}
	for l, list := range byLength {
		add := func(to netip.Prefix, minBits int) {
			rules = append(rules, rule{v6: l.v6, bits: l.bits, to: to, minBits: minBits})
		}
		overlaps := func(p netip.Prefix) bool { return slices.ContainsFunc(list, p.Overlaps) }
		minBits := max(l.bits, 1)
		switch {
		case privateOnly[l.v6]:
			for _, p := range privateNetworks {
				if overlaps(p) {
					add(p, max(minBits, p.Bits()))
				}
			}
			for _, p := range s.Private {
				if overlaps(p) {
					add(p, minBits)
				}
			}
		case l.bits > 0 && len(list) <= maxSelectors:
			for _, p := range list {
				add(p, minBits)
			}
		default:
			add(netip.Prefix{}, minBits)
		}
		for _, p := range multicastNetworks {
			if overlaps(p) && (privateOnly[l.v6] || l.bits < p.Bits()) {
				add(p, 0)
			}
		}
	}
	return rules
}

// HostFirst reports whether routes of the host to network take precedence over
// Routes with the same or a shorter prefix.
func (s State) HostFirst(network netip.Prefix) bool {
	return s.HostRoutes != HostNone && (s.isPrivate(network) || !s.ignoresPublic(isIPv6(network)))
}

// ignoresPublic reports whether the host's routes to public addresses of a
// family are not selected.
func (s State) ignoresPublic(ipv6 bool) bool {
	return s.HostRoutes == HostPrivate && IsFull(slices.Concat(s.Routes, s.Unreachable), ipv6)
}

// isPrivate reports whether HostPrivate selects the host's routes to p.
func (s State) isPrivate(p netip.Prefix) bool {
	return slices.ContainsFunc(slices.Concat(privateNetworks, multicastNetworks, s.Private),
		func(l netip.Prefix) bool {
			return l.Bits() <= p.Bits() && l.Overlaps(p)
		})
}
