package routing

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// MaxRoutes is the greatest number of routes that a State may need in the
// kernel: its Routes, and for each table the prefixes of Exclude within them.
const MaxRoutes = 16384

const (
	protocol     = 94      // rtm_protocol of our routes
	metric       = 9484    // our routes; others of the same prefix come first
	lastMetric   = 9485    // unreachable routes, behind all others
	rulePriority = 9484    // priority of the rules for the longest prefix
	tableBase    = 1 << 30 // smallest number of our tables
	indexMask    = 1<<22 - 1
	minMTU       = 68   // RFC 791
	minMTU6      = 1280 // RFC 8200 section 5
	maxMTU       = 65535

	// ruleProtocol is the FRA_PROTOCOL of our rules. It is the kernel's because
	// systemd-networkd deletes rules of all other protocols when it is
	// reloaded, unless ManageForeignRoutingPolicyRules=no is set. Our rules are
	// recognised by their tables and marks instead.
	ruleProtocol = unix.RTPROT_KERNEL
)

// plan lists the kernel objects of a State. The zero plan has none.
type plan struct {
	up      bool // the interface is up
	mtu     int  // bytes, 0: as found
	grouped bool // the interface is in tunnelGroup
	addrs   []netip.Prefix
	routes  map[route]struct{}
	rules   map[rule]struct{}
	chains  []chain // chains of our nftables table
	sysctls []setting
}

// route is one of our routes.
type route struct {
	table  int
	prefix netip.Prefix
	kind   routeKind
}

// routeKind is the action of a route.
type routeKind int

const (
	intoTunnel  routeKind = iota
	excluded              // a throw route: the next rule decides
	unreachable           // packets are refused
)

// routeTypes are the rtm_type of each routeKind.
var routeTypes = [...]int{intoTunnel: unix.RTN_UNICAST, excluded: unix.RTN_THROW,
	unreachable: unix.RTN_UNREACHABLE}

// rule is one of our policy rules for a prefix length.
type rule struct {
	v6   bool
	bits int // prefix length

	// tunnel means that the rule looks up the tunnel's table. Otherwise it
	// looks up the host's main table, for destinations in to (zero: all), and
	// uses routes of at least minBits bits.
	tunnel  bool
	to      netip.Prefix
	minBits int
}

// setting is a sysctl and its desired value.
type setting struct {
	name, value string // name is a path below /proc/sys

	// optional is the consequence if the sysctl cannot be set. Empty means that
	// Apply fails.
	optional string

	// needs is a kernel feature without which the sysctl must not be set. Empty
	// means none.
	needs string
}

// tableID returns the number of the tunnel's table for a prefix length.
func tableID(index, bits int) int {
	return tableBase | (index&indexMask)<<8 | bits
}

// tableOwner is the inverse of tableID. It returns the lower 22 bits of the
// interface's index.
func tableOwner(id int) (index, bits int, ok bool) {
	index, bits = id>>8&indexMask, id&0xff
	return index, bits, bits <= 128 && id == tableID(index, bits)
}

// forwards reports whether s needs a sysctl, ipForward4 or ipForward6.
func (s State) forwards(sysctl string) bool {
	return s.Forward && slices.ContainsFunc(slices.Concat(s.Addresses, s.Routes, s.Masquerade),
		func(p netip.Prefix) bool {
			return isIPv6(p) == (sysctl == ipForward6)
		})
}

// planFor returns the plan for a State and the host's current networks.
func (k *kernel) planFor(want State) (plan, error) {
	p, err := newPlan(want, k)
	if err == nil {
		p.sysctls = append(p.sysctls, k.looseFilters(want)...)
	}
	return p, err
}

// newPlan returns the plan of a State.
func newPlan(s State, k *kernel) (plan, error) {
	if s.MTU != 0 && (s.MTU < minMTU || s.MTU > maxMTU) {
		return plan{}, fmt.Errorf("MTU %d: want %d to %d", s.MTU, minMTU, maxMTU)
	}
	for _, p := range s.Addresses {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().IsUnspecified() || p.Addr().IsMulticast() {
			return plan{}, fmt.Errorf("address %v: not an address for an interface", p)
		}
	}
	for _, list := range []struct {
		name     string
		prefixes []netip.Prefix
	}{{"route", s.Routes}, {"unreachable", s.Unreachable}, {"exclude", s.Exclude},
		{"reach", s.Reach}, {"masquerade", s.Masquerade}} {
		for _, p := range list.prefixes {
			if !p.IsValid() || p.Addr().Is4In6() {
				return plan{}, fmt.Errorf("%s %v: not a prefix", list.name, p)
			}
			if p != p.Masked() {
				return plan{}, fmt.Errorf("%s %v: bits after the prefix are set; was %v meant?",
					list.name, p, p.Masked())
			}
		}
	}
	if without := slices.Concat(s.Exclude, s.Unreachable); k.Mark == 0 && len(without) != 0 {
		return plan{}, fmt.Errorf("exclude or unreachable %v: only possible with a mark for the outer socket", without[0])
	}

	s.Addresses, s.Masquerade = sorted(s.Addresses), sorted(s.Masquerade)
	w := plan{up: true, mtu: s.MTU, grouped: s.Forward, addrs: s.Addresses}
	w.planRoutes(s, k)
	if len(w.routes) > MaxRoutes {
		return plan{}, fmt.Errorf("%w: %d needed, %d allowed", ErrTooManyRoutes, len(w.routes),
			MaxRoutes)
	}
	w.chains = newChains(s, k, len(w.rules) != 0)
	for r := range w.rules {
		if !r.v6 {
			w.sysctls = append(w.sysctls, setting{
				name: "net/ipv4/conf/all/src_valid_mark", value: "1",
				optional: "strict reverse path filters may drop replies of the proxy",
			})
			break
		}
	}
	if slices.ContainsFunc(s.Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		// The tunnel sends ICMP errors about outgoing packets back to this host
		// with an address of this host as the source. The guard chain drops
		// other packets with such a source.
		w.sysctls = append(w.sysctls, setting{
			name: "net/ipv4/conf/" + k.Interface + "/accept_local", value: "1",
			optional: "programs of this host do not learn why the tunnel refuses a packet",
			needs:    needsGuard,
		})
	}
	if s.Forward {
		// Clients have no shorter path to each other than through this host.
		// The kernel sends redirects if the sysctl of the interface or the one
		// of "all" is on.
		for _, name := range []string{k.Interface, "all"} {
			w.sysctls = append(w.sysctls, setting{
				name: "net/ipv4/conf/" + name + "/send_redirects", value: "0",
				optional: "clients may get pointless ICMP redirects",
			})
		}
		for _, name := range []string{ipForward4, ipForward6} {
			if s.forwards(name) {
				w.sysctls = append(w.sysctls, setting{name: name, value: "1"})
			}
		}
	}
	return w, nil
}

// sorted returns the list sorted and without duplicates.
func sorted(list []netip.Prefix) []netip.Prefix {
	return slices.Compact(slices.SortedFunc(slices.Values(list), netip.Prefix.Compare))
}

// planRoutes sets the routes and rules of w.
func (w *plan) planRoutes(s State, k *kernel) {
	w.routes = make(map[route]struct{})
	w.rules = make(map[rule]struct{})
	exclude := make(map[netip.Prefix]struct{})
	for _, p := range s.Exclude {
		exclude[p] = struct{}{}
	}
	var added []netip.Prefix
	add := func(p netip.Prefix, kind routeKind) {
		if covered(p, exclude, p.Bits()) {
			return
		}
		added = append(added, p)
		w.routes[route{table: tableID(k.index, p.Bits()), prefix: p, kind: kind}] = struct{}{}
		w.rules[rule{v6: isIPv6(p), bits: p.Bits(), tunnel: true}] = struct{}{}
	}
	for _, p := range s.Routes {
		if k.Mark == 0 {
			w.routes[route{table: unix.RT_TABLE_MAIN, prefix: p}] = struct{}{}
			continue
		}
		add(p, intoTunnel)
	}
	for _, p := range s.Unreachable {
		add(p, unreachable)
	}
	for _, r := range s.hostRules(added) {
		w.rules[r] = struct{}{}
	}
	for p := range exclude {
		if covered(p, exclude, p.Bits()-1) {
			continue
		}
		for bits := range p.Bits() {
			table := tableID(k.index, bits)
			for _, kind := range []routeKind{intoTunnel, unreachable} {
				if _, ok := w.routes[route{table: table, prefix: shorten(p, bits),
					kind: kind}]; ok {
					w.routes[route{table: table, prefix: p, kind: excluded}] = struct{}{}
				}
			}
		}
	}
}

// covered reports whether p is within a prefix of the set that has at most the
// given number of bits.
func covered(p netip.Prefix, set map[netip.Prefix]struct{}, bits int) bool {
	if len(set) == 0 {
		return false
	}
	for ; bits >= 0; bits-- {
		if _, ok := set[shorten(p, bits)]; ok {
			return true
		}
	}
	return false
}

// shorten returns the prefix of the given length that contains p.
func shorten(p netip.Prefix, bits int) netip.Prefix {
	return netip.PrefixFrom(p.Addr(), bits).Masked()
}

// netlink returns the attributes of the rule.
func (r rule) netlink(k *kernel) *netlink.Rule {
	n := netlink.NewRule()
	n.Family, n.Protocol = unix.AF_INET, ruleProtocol
	width := 32
	if r.v6 {
		n.Family, width = unix.AF_INET6, 128
	}
	id := tableID(k.index, r.bits)
	n.Priority = rulePriority + 2*(width-r.bits)
	if r.tunnel {
		n.Priority++
		n.Invert, n.Mark, n.Table = true, outsideMark(k.Mark), id
		n.Mask = new(outsideMark(k.Mark))
	} else {
		// The mask 0 matches every packet. The mark only identifies the rule.
		n.Mark, n.Mask = uint32(id), new(uint32)
		n.Table, n.SuppressPrefixlen = unix.RT_TABLE_MAIN, r.minBits-1
		if r.to.IsValid() {
			n.Dst = ipNet(r.to)
		}
	}
	return n
}

// parseRule is the inverse of rule.netlink. index has the lower 22 bits of the
// interface's index, and ok is false for rules of other programs.
func parseRule(n *netlink.Rule) (r rule, index int, ok bool) {
	if n.Protocol != ruleProtocol && n.Protocol != protocol { // protocol: earlier versions
		return rule{}, 0, false
	}
	r = rule{v6: n.Family == unix.AF_INET6, tunnel: true}
	index, r.bits, ok = tableOwner(n.Table)
	if !ok && n.Mask != nil && *n.Mask == 0 {
		r.tunnel, r.minBits = false, n.SuppressPrefixlen+1
		if n.Dst != nil {
			r.to = prefixOf(n.Dst)
		}
		index, r.bits, ok = tableOwner(int(n.Mark))
	}
	return r, index, ok
}

// sameRule reports whether a and b have the same attributes.
func sameRule(a, b *netlink.Rule) bool {
	return a.Family == b.Family && a.Priority == b.Priority && a.Table == b.Table &&
		a.Mark == b.Mark && a.Mask != nil && b.Mask != nil && *a.Mask == *b.Mask &&
		a.Invert == b.Invert && a.SuppressPrefixlen == b.SuppressPrefixlen &&
		(a.Dst == nil) == (b.Dst == nil) && (a.Dst == nil || prefixOf(a.Dst) == prefixOf(b.Dst))
}

// netlink returns the attributes of the route.
func (r route) netlink(k *kernel) *netlink.Route {
	n := &netlink.Route{
		Dst:      ipNet(r.prefix),
		Table:    r.table,
		Protocol: protocol,
		Priority: metric,
		Type:     routeTypes[r.kind],
	}
	switch r.kind {
	case intoTunnel:
		n.LinkIndex = k.index
		if !isIPv6(r.prefix) {
			n.Scope = unix.RT_SCOPE_LINK
		}
	case unreachable:
		n.Priority = lastMetric
	}
	return n
}

// compareRoutes sorts by family and table. Routes that keep packets out of the
// tunnel come first in each table.
func compareRoutes(a, b route) int {
	return cmp.Or(
		cmp.Compare(a.prefix.Addr().BitLen(), b.prefix.Addr().BitLen()),
		-cmp.Compare(a.table, b.table),
		-cmp.Compare(a.kind, b.kind),
		a.prefix.Compare(b.prefix),
	)
}

// compareRules sorts rules in the order in which they are added: the longest
// prefix first, and rules for the host's routes before those for the tunnel's.
func compareRules(a, b rule) int {
	return cmp.Or(
		cmp.Compare(b2i(a.v6), b2i(b.v6)),
		-cmp.Compare(a.bits, b.bits),
		cmp.Compare(b2i(a.tunnel), b2i(b.tunnel)),
		a.to.Compare(b.to),
	)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones) // the netlink library has 0.0.0.0 in 16 bytes
}
