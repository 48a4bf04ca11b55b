package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// samples are public addresses from all parts of the address space. They
// represent the addresses of short prefixes when routes are looked up.
var samples = []netip.Addr{
	netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("65.0.0.1"),
	netip.MustParseAddr("130.0.0.1"), netip.MustParseAddr("193.0.0.1"),
	netip.MustParseAddr("2001:4860::1"), netip.MustParseAddr("2606:4700::1"),
	netip.MustParseAddr("2a00::1"),
}

// maxSamples is the greatest number of addresses of a family to look up.
const maxSamples = 4

// sample returns addresses that are routed into the tunnel.
func (s State) sample(v6 bool) (list []netip.Addr) {
	add := func(a netip.Addr) {
		one := netip.PrefixFrom(a, a.BitLen())
		out := slices.ContainsFunc(s.Exclude, func(p netip.Prefix) bool {
			return p.Contains(a)
		}) || slices.Contains(s.Addresses, one)
		if !out && len(list) < maxSamples && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	for _, p := range s.Routes {
		switch {
		case isIPv6(p) != v6:
		case p.Bits() < broadBits:
			for _, a := range samples {
				if p.Contains(a) {
					add(a)
				}
			}
		case p.IsSingleIP():
			add(p.Addr())
		default:
			add(p.Addr().Next())
		}
	}
	return list
}

// bypassed returns a sentence about packets for the tunnel that leave through
// another interface, or "". The cause is a policy rule of another program, or a
// route in the table of such a rule. bypassed asks the kernel for the effective
// route, so it finds any cause. Routes of the host that take precedence are not
// reported. m.mu is held.
func (m *Manager) bypassed() string {
	if m.Mark == 0 || len(m.applied.rules) == 0 {
		return ""
	}
	for _, v6 := range []bool{false, true} {
		for _, a := range m.state.sample(v6) {
			routes, err := m.nl.RouteGet(a.AsSlice())
			if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST ||
				routes[0].LinkIndex == m.index {
				continue // not sent, or sent through the tunnel
			}
			if index := routes[0].LinkIndex; !m.mayLeaveBy(index, a) {
				return m.describeBypass(a, index)
			}
		}
	}
	return ""
}

// updateBypass updates m.bypass and logs a change. m.mu is held.
func (m *Manager) updateBypass() {
	now := m.bypassed()
	switch {
	case now == m.bypass:
	case now != "":
		m.Logger.Warn("packets for the tunnel leave outside it", "reason", now)
	default:
		m.Logger.Info("packets for the tunnel leave through it again")
	}
	m.bypass = now
}

// mayLeaveBy reports whether packets to an address may leave through another
// interface than this tunnel's: the interface has a Manager too, or a route of
// the host takes precedence. It returns true if the kernel cannot be asked.
func (m *Manager) mayLeaveBy(index int, to netip.Addr) bool {
	rules, err := m.listRules()
	if err != nil {
		return true
	}
	for i := range rules {
		if _, owner, ok := parseRule(&rules[i]); ok && owner == index&indexMask {
			return true
		}
	}
	routes, err := m.hostRoutes()
	if err != nil {
		return true
	}
	return slices.ContainsFunc(routes, func(r hostRoute) bool {
		return r.prefix.Contains(to) && m.state.HostFirst(netip.PrefixFrom(to, to.BitLen()))
	})
}

// describeBypass returns the sentence of bypassed and its remedy.
func (m *Manager) describeBypass(to netip.Addr, index int) string {
	name := m.linkName(index)
	first, last := m.rulesBefore(to.Is6())
	if first == nil {
		return fmt.Sprintf("packets to %v leave by %s, not through the tunnel: delete the route of another program that does this: ip route get %v", to, name, to)
	}
	return fmt.Sprintf("packets to %v leave by %s, not through the tunnel: "+
		"delete the rule %d of another program (ip rule show), or give it a priority above %d", to,
		name, first.Priority, last)
}

// lastPriority returns the highest priority number of the tunnel's rules of a
// family.
func (m *Manager) lastPriority(v6 bool) (last int) {
	for r := range m.applied.rules {
		if r.v6 == v6 {
			last = max(last, r.netlink(&m.kernel).Priority)
		}
	}
	return last
}

// rulesBefore returns the first rule of another program before the last rule of
// the tunnel, nil for none, and the priority of that last rule.
func (m *Manager) rulesBefore(v6 bool) (first *netlink.Rule, last int) {
	last = m.lastPriority(v6)
	rules, err := m.listRules()
	if err != nil {
		return nil, last
	}
	for i, n := range rules {
		_, _, own := parseRule(&n)
		switch {
		case own, (n.Family == netlink.FAMILY_V6) != v6, n.Table == unix.RT_TABLE_LOCAL,
			n.Priority > last:
		case first == nil || n.Priority < first.Priority:
			first = &rules[i]
		}
	}
	return first, last
}

// selectiveRules returns a sentence for each rule of other programs that takes
// some packets out of a full tunnel: packets with a mark, as programs that
// balance traffic set it, or packets of some users.
func (m *Manager) selectiveRules() (list []string, err error) {
	if m.Mark == 0 || len(m.applied.rules) == 0 {
		return nil, nil
	}
	rules, err := m.listRules()
	if err != nil {
		return nil, err
	}
	outside := outsideMark(m.Mark)
	last, full := make(map[bool]int), make(map[bool]bool)
	for _, v6 := range []bool{false, true} {
		last[v6], full[v6] = m.lastPriority(v6), IsFull(m.state.Routes, v6)
	}
	for _, n := range rules {
		_, _, own := parseRule(&n)
		v6 := n.Family == netlink.FAMILY_V6
		hasMark := n.Mark != 0 && n.Mark&outside == 0 && !n.Invert && (n.Mask == nil || *n.Mask != 0)
		if own || !full[v6] || n.Priority > last[v6] || !hasMark && n.UIDRange == nil ||
			n.IifName != "" || n.Src != nil {
			continue
		}
		options, packets := &netlink.RouteGetOptions{Mark: n.Mark},
			fmt.Sprintf("packets with mark %#x", n.Mark)
		if n.UIDRange != nil {
			options.UID, packets = &n.UIDRange.Start,
				fmt.Sprintf("packets of users %d to %d", n.UIDRange.Start, n.UIDRange.End)
		}
		for _, a := range m.state.sample(v6) {
			routes, err := m.nl.RouteGetWithOptions(a.AsSlice(), options)
			if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST ||
				routes[0].LinkIndex == m.index || m.mayLeaveBy(routes[0].LinkIndex, a) {
				continue
			}
			list = append(list, fmt.Sprintf("the host's rule %d takes %s out of the tunnel, to %s: "+
				"if this is not intended, delete it (ip rule show), or use a kill switch",
				n.Priority, packets, m.linkName(routes[0].LinkIndex)))
			break
		}
	}
	slices.Sort(list)
	list = slices.Compact(list)
	return list[:min(len(list), maxForeign)], nil
}

// linkName returns the name of an interface.
func (m *Manager) linkName(index int) string {
	if link, err := m.nl.LinkByIndex(index); err == nil {
		return link.Attrs().Name
	}
	return fmt.Sprintf("interface %d", index)
}
