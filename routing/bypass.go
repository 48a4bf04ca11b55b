package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// samples are public addresses all over those in use: where packets to them go
// is looked at in place of all the others of a prefix that is short.
var samples = []netip.Addr{
	netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("65.0.0.1"),
	netip.MustParseAddr("130.0.0.1"), netip.MustParseAddr("193.0.0.1"),
	netip.MustParseAddr("2001:4860::1"), netip.MustParseAddr("2606:4700::1"),
	netip.MustParseAddr("2a00::1"),
}

// maxSamples is how many addresses of a family are looked up.
const maxSamples = 4

// sample returns addresses that the tunnel leads to.
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

// bypassed says which packets for the tunnel go elsewhere, "" for none: by a
// policy rule that another program put before the tunnel's, or a table that
// such a rule, or the kernel's own, leads to. Whatever the kernel has of ours,
// it is the outcome that counts, so it is asked for that. Routes of the host
// that may go before the tunnel's are not meant. m.mu is held.
func (m *Manager) bypassed() string {
	if m.Mark == 0 || len(m.applied.rules) == 0 {
		return ""
	}
	for _, v6 := range []bool{false, true} {
		for _, a := range m.state.sample(v6) {
			routes, err := m.nl.RouteGet(a.AsSlice())
			if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST ||
				routes[0].LinkIndex == m.index {
				continue // packets that lead nowhere do not leave
			}
			if index := routes[0].LinkIndex; !m.mayLeaveBy(index, a) {
				return m.describeBypass(a, index)
			}
		}
	}
	return ""
}

// updateBypass looks for packets that go elsewhere, and logs what is new. m.mu is
// held.
func (m *Manager) updateBypass() {
	now := m.bypassed()
	switch {
	case now == m.bypass:
	case now != "":
		m.Logger.Warn("packets for the tunnel leave beside it", "reason", now)
	default:
		m.Logger.Info("packets for the tunnel leave through it again")
	}
	m.bypass = now
}

// mayLeaveBy says whether packets to an address are to leave through the
// interface rather than through this tunnel: it is another tunnel of ours, or a
// route of the host goes first.
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

func (m *Manager) describeBypass(to netip.Addr, index int) string {
	name := m.linkName(index)
	first, last := m.rulesBefore(to.Is6())
	if first == nil {
		return fmt.Sprintf("packets to %v leave by %s, not through the tunnel: delete the route of another program that takes them there: ip route get %v", to, name, to)
	}
	return fmt.Sprintf("packets to %v leave by %s, not through the tunnel: "+
		"delete the rule %d of another program (ip rule show), or give it a priority above %d", to,
		name, first.Priority, last)
}

// lastPriority returns the priority of the tunnel's last rule of a family.
func (m *Manager) lastPriority(v6 bool) (last int) {
	for r := range m.applied.rules {
		if r.v6 == v6 {
			last = max(last, r.netlink(&m.kernel).Priority)
		}
	}
	return last
}

// rulesBefore returns the first rule of another program that goes before the
// tunnel's, nil for none, and the priority of the tunnel's last.
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

// selective says which rules of other programs take some packets out of a
// tunnel for everything: those with a mark, as balancers of uplinks give to
// all, or of some users.
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
		marked := n.Mark != 0 && n.Mark&outside == 0 && !n.Invert && (n.Mask == nil || *n.Mask != 0)
		if own || !full[v6] || n.Priority > last[v6] || !marked && n.UIDRange == nil ||
			n.IifName != "" || n.Src != nil {
			continue
		}
		options, whose := &netlink.RouteGetOptions{Mark: n.Mark},
			fmt.Sprintf("packets with mark %#x", n.Mark)
		if n.UIDRange != nil {
			options.UID, whose = &n.UIDRange.Start,
				fmt.Sprintf("packets of users %d to %d", n.UIDRange.Start, n.UIDRange.End)
		}
		for _, a := range m.state.sample(v6) {
			routes, err := m.nl.RouteGetWithOptions(a.AsSlice(), options)
			if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST ||
				routes[0].LinkIndex == m.index || m.mayLeaveBy(routes[0].LinkIndex, a) {
				continue
			}
			list = append(list, fmt.Sprintf("the host's rule %d takes %s out of the tunnel, to %s: "+
				"delete it (ip rule show), or have a kill switch hold them, if it is not meant to",
				n.Priority, whose, m.linkName(routes[0].LinkIndex)))
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
