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

// MaxRoutes is how many routes one State may need in the kernel: its Routes,
// and for each table the prefixes in Exclude that lie within them.
const MaxRoutes = 16384

const (
	protocol     = 94      // rtm_protocol of routes that are ours
	metric       = 9484    // our routes: those of the host go first
	lastMetric   = 9485    // routes that lead nowhere count where there is no other
	rulePriority = 9484    // priority of the rules for the longest prefix
	tableBase    = 1 << 30 // smallest number of our tables
	indexMask    = 1<<22 - 1
	minMTU       = 68   // RFC 791
	minMTU6      = 1280 // RFC 8200, section 5
	maxMTU       = 65535

	// ruleProtocol is FRA_PROTOCOL of our rules. systemd-networkd deletes rules
	// that it did not make each time that it is reloaded, unless
	// ManageForeignRoutingPolicyRules=no is set, but those of the kernel it
	// leaves alone. By their tables and priorities the rules are ours all the
	// same.
	ruleProtocol = unix.RTPROT_KERNEL
)

// plan is what the kernel shall have of ours. The zero plan is nothing at all.
type plan struct {
	up      bool
	mtu     int  // 0: as found
	grouped bool // the interface is in the group of those that forward
	addrs   []netip.Prefix
	routes  map[route]struct{}
	rules   map[rule]struct{}
	chains  []chain // chains of our nftables table
	sysctls []setting
}

// route is a route of ours.
type route struct {
	table  int
	prefix netip.Prefix
	kind   routeKind
}

// routeKind says where a route leads.
type routeKind int

const (
	intoTunnel  routeKind = iota
	excluded              // a throw route: on to the next rule
	unreachable           // nowhere: packets are refused
)

// types are the kernel's for each routeKind.
var types = [...]int{intoTunnel: unix.RTN_UNICAST, excluded: unix.RTN_THROW,
	unreachable: unix.RTN_UNREACHABLE}

// rule is a policy rule of ours for a prefix length: the one that leads into
// the tunnel, or one before it that asks the host's routes.
type rule struct {
	v6     bool
	bits   int
	tunnel bool
	to     netip.Prefix // destinations for which the host's are asked, the zero Prefix for all
	least  int          // prefix length from which on a route of the host counts
}

// setting is a sysctl and what it shall be.
type setting struct {
	name, value string // name as a path below /proc/sys
	optional    string // what is lost without it; "": it must be
	needs       string // the feature of the kernel without which it must not be, "": none
}

// tableID returns the number of the table for the tunnel's prefixes of one
// length.
func tableID(index, bits int) int {
	return tableBase | (index&indexMask)<<8 | bits
}

// tableOwner takes apart what tableID made. The index is cut to 22 bits.
func tableOwner(id int) (index, bits int, ok bool) {
	index, bits = id>>8&indexMask, id&0xff
	return index, bits, bits <= 128 && id == tableID(index, bits)
}

func (s State) hasIPv6() bool {
	return slices.ContainsFunc(slices.Concat(s.Addresses, s.Routes, s.Unreachable, s.Exclude,
		s.Masquerade), isIPv6)
}

// forwards says whether s needs one of the sysctls ipForward4 and ipForward6.
func (s State) forwards(sysctl string) bool {
	return s.Forward && slices.ContainsFunc(slices.Concat(s.Addresses, s.Routes, s.Masquerade),
		func(p netip.Prefix) bool {
			return isIPv6(p) == (sysctl == ipForward6)
		})
}

func (s State) ipv4Only() State {
	for _, list := range []*[]netip.Prefix{&s.Addresses, &s.Routes, &s.Unreachable, &s.Exclude,
		&s.Reach, &s.Masquerade} {
		*list = slices.DeleteFunc(slices.Clone(*list), isIPv6)
	}
	return s
}

func isIPv6(p netip.Prefix) bool { return p.Addr().Is6() }

// newPlan works out what the state needs. It does not look at the kernel.
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
		// ICMP errors that the tunnel's own end makes about packets of this
		// host, or through it, come in with an address of this host as their
		// source. Others that do are for the guard chain.
		w.sysctls = append(w.sysctls, setting{
			name: "net/ipv4/conf/" + k.Interface + "/accept_local", value: "1",
			optional: "programs of this host do not learn why the tunnel refuses a packet",
			needs:    needsGuard,
		})
	}
	if s.Forward {
		// Clients that reach each other through this host have no shorter way.
		// The kernel sends redirects where either the interface's switch or
		// that for all is on; other interfaces keep their own.
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

// sorted returns a list without order and repetition as everyone writes it.
func sorted(list []netip.Prefix) []netip.Prefix {
	return slices.Compact(slices.SortedFunc(slices.Values(list), netip.Prefix.Compare))
}

// planRoutes fills in routes and rules.
func (w *plan) planRoutes(s State, k *kernel) {
	w.routes = make(map[route]struct{})
	w.rules = make(map[rule]struct{})
	exclude := make(map[netip.Prefix]struct{})
	for _, p := range s.Exclude {
		exclude[p] = struct{}{}
	}
	var kept []netip.Prefix
	add := func(p netip.Prefix, kind routeKind) {
		if covered(p, exclude, p.Bits()) {
			return
		}
		kept = append(kept, p)
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
	for _, r := range s.hostRules(kept) {
		w.rules[r] = struct{}{}
	}
	for p := range exclude {
		if covered(p, exclude, p.Bits()-1) {
			continue
		}
		for bits := range p.Bits() {
			table := tableID(k.index, bits)
			for _, kind := range []routeKind{intoTunnel, unreachable} {
				if _, ok := w.routes[route{table: table, prefix: shorten(p, bits), kind: kind}]; ok {
					w.routes[route{table: table, prefix: p, kind: excluded}] = struct{}{}
				}
			}
		}
	}
}

// covered says whether p lies in a prefix of the set with at most bits bits.
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

func shorten(p netip.Prefix, bits int) netip.Prefix {
	return netip.PrefixFrom(p.Addr(), bits).Masked()
}

// netlink returns the rule as the kernel shall have it.
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
		// Mask 0 matches every mark: the mark only says whose rule it is.
		n.Mark, n.Mask = uint32(id), new(uint32)
		n.Table, n.SuppressPrefixlen = unix.RT_TABLE_MAIN, r.least-1
		if r.to.IsValid() {
			n.Dst = ipNet(r.to)
		}
	}
	return n
}

// parseRule says whether a rule of the kernel is ours, of which interface, and
// which of our rules it is.
func parseRule(n *netlink.Rule) (r rule, index int, ok bool) {
	if n.Protocol != ruleProtocol && n.Protocol != protocol { // the latter is of earlier versions
		return rule{}, 0, false
	}
	r = rule{v6: n.Family == unix.AF_INET6, tunnel: true}
	index, r.bits, ok = tableOwner(n.Table)
	if !ok && n.Mask != nil && *n.Mask == 0 {
		r.tunnel, r.least = false, n.SuppressPrefixlen+1
		if n.Dst != nil {
			r.to = prefixOf(n.Dst)
		}
		index, r.bits, ok = tableOwner(int(n.Mark))
	}
	return r, index, ok
}

// sameRule compares what we set in a rule.
func sameRule(a, b *netlink.Rule) bool {
	return a.Family == b.Family && a.Priority == b.Priority && a.Table == b.Table &&
		a.Mark == b.Mark && a.Mask != nil && b.Mask != nil && *a.Mask == *b.Mask &&
		a.Invert == b.Invert && a.SuppressPrefixlen == b.SuppressPrefixlen &&
		(a.Dst == nil) == (b.Dst == nil) && (a.Dst == nil || prefixOf(a.Dst) == prefixOf(b.Dst))
}

// netlink returns the route as the kernel shall have it.
func (r route) netlink(k *kernel) *netlink.Route {
	n := &netlink.Route{
		Dst:      ipNet(r.prefix),
		Table:    r.table,
		Protocol: protocol,
		Priority: metric,
		Type:     types[r.kind],
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

// compareRoutes puts routes of one table and family next to each other, with
// those that keep packets out of the tunnel first.
func compareRoutes(a, b route) int {
	return cmp.Or(
		cmp.Compare(a.prefix.Addr().BitLen(), b.prefix.Addr().BitLen()),
		-cmp.Compare(a.table, b.table),
		-cmp.Compare(a.kind, b.kind),
		a.prefix.Compare(b.prefix),
	)
}

// compareRules puts rules in the order in which they are to be added: longest
// prefix first, the host's before the tunnel's.
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
	return netip.PrefixFrom(a.Unmap(), ones) // the library writes 0.0.0.0 in 16 bytes
}
