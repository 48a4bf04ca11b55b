package routing

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// observed is the kernel's state of the interface and of our objects.
type observed struct {
	link        netlink.Link // nil if it is gone
	up          bool
	mtu         int
	group       uint32
	addrGen     string                    // address generation mode, "" without IPv6
	addrs       map[netip.Prefix]struct{} // all addresses of the interface
	unusable    map[netip.Prefix]struct{} // addrs that the kernel does not use as a source
	routes      map[route]struct{}
	wrongRoutes []netlink.Route // other routes in our tables
	rules       map[rule]struct{}
	wrongRules  []*netlink.Rule // our rules with other attributes
	chains      []kernelChain   // chains of our nftables table
	hasTable    bool            // our nftables table exists
}

// observe reads the kernel's state.
func (k *kernel) observe() (o observed, err error) {
	if o.link, err = k.findLink(); err != nil {
		return o, err
	}
	if o.link != nil {
		o.up = o.link.Attrs().Flags&net.FlagUp != 0
		o.mtu, o.group = o.link.Attrs().MTU, o.link.Attrs().Group
		o.addrGen, _ = k.readSysctl("net/ipv6/conf/" + o.link.Attrs().Name + "/addr_gen_mode")
		if o.addrs, o.unusable, err = k.listAddrs(o.link); err != nil {
			return o, err
		}
	}
	if o.routes, o.wrongRoutes, err = k.listRoutes(); err != nil {
		return o, err
	}
	o.rules = make(map[rule]struct{})
	rules, err := k.listRules()
	if err != nil {
		return o, err
	}
	for _, n := range rules {
		r, index, ok := parseRule(&n)
		switch {
		case !ok || index != k.index&indexMask:
		case sameRule(&n, r.netlink(k)):
			o.rules[r] = struct{}{}
		default:
			o.wrongRules = append(o.wrongRules, &n)
		}
	}
	o.chains, o.hasTable, err = readTable(k.tableName())
	if err != nil && !noNFTables(err) {
		return o, err
	}
	return o, nil
}

// findLink returns the interface, or nil if it is gone.
func (k *kernel) findLink() (netlink.Link, error) {
	if k.index == 0 {
		return nil, nil
	}
	link, err := k.nl.LinkByIndex(k.index)
	if errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up interface %s (index %d): %w", k.Interface, k.index,
			explain(err))
	}
	return link, nil
}

// listAddrs returns the addresses of the interface. unusable are those that
// expire, are deprecated, or have a smaller scope than ours.
func (k *kernel) listAddrs(link netlink.Link) (all, unusable map[netip.Prefix]struct{}, err error) {
	addrs, err := repeat(func() ([]netlink.Addr, error) {
		return k.nl.AddrList(link, netlink.FAMILY_ALL)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses of %s: %w", k.Interface, explain(err))
	}
	all, unusable = make(map[netip.Prefix]struct{}), make(map[netip.Prefix]struct{})
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		all[p] = struct{}{}
		if a.Flags&unix.IFA_F_PERMANENT == 0 || a.Flags&unix.IFA_F_DEPRECATED != 0 ||
			!isIPv6(p) && a.Scope != unix.RT_SCOPE_UNIVERSE {
			unusable[p] = struct{}{}
		}
	}
	return all, unusable, nil
}

// listRoutes returns our routes of the interface, and other routes in its
// tables.
func (k *kernel) listRoutes() (set map[route]struct{}, others []netlink.Route, err error) {
	set = make(map[route]struct{})
	for _, family := range k.families() {
		filter := &netlink.Route{Protocol: protocol}
		routes, err := repeat(func() ([]netlink.Route, error) {
			return k.dump.RouteListFiltered(family, filter,
				netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, nil, fmt.Errorf("list routes: %w", explain(err))
		}
		for _, r := range routes {
			index, _, ok := tableOwner(r.Table)
			own := ok && index == k.index&indexMask
			if own || r.Table == unix.RT_TABLE_MAIN && r.LinkIndex == k.index {
				kind := max(routeKind(slices.Index(routeTypes[:], r.Type)), intoTunnel)
				asked := route{table: r.Table, prefix: prefixOf(r.Dst), kind: kind}
				if own && !equalRoute(&r, asked.netlink(k)) {
					others = append(others, r)
					continue
				}
				set[asked] = struct{}{}
			}
		}
		for _, table := range k.tables(family == unix.AF_INET6) {
			foreign, err := k.foreignRoutes(family, table)
			if err != nil {
				return nil, nil, err
			}
			others = append(others, foreign...)
		}
	}
	return set, others, nil
}

// tables returns the numbers of the last plan's tables of a family.
func (k *kernel) tables(v6 bool) []int {
	set := make(map[int]struct{})
	for r := range k.plannedRoutes {
		if r.table != unix.RT_TABLE_MAIN && isIPv6(r.prefix) == v6 {
			set[r.table] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// equalRoute reports whether a and b have the same metric and next hop.
func equalRoute(a, b *netlink.Route) bool {
	return a.Type == b.Type && a.Priority == b.Priority &&
		(b.LinkIndex == 0 || a.LinkIndex == b.LinkIndex) &&
		a.Gw == nil && a.Via == nil && len(a.MultiPath) == 0
}

// foreignRoutes returns the routes of other programs in one of our tables.
func (k *kernel) foreignRoutes(family, table int) (list []netlink.Route, err error) {
	routes, err := repeat(func() ([]netlink.Route, error) {
		return k.dump.RouteListFiltered(family, &netlink.Route{Table: table},
			netlink.RT_FILTER_TABLE)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // the table is empty
	}
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", table, explain(err))
	}
	for _, r := range routes {
		if r.Protocol != protocol && r.Flags&unix.RTM_F_CLONED == 0 {
			list = append(list, r)
		}
	}
	return list, nil
}

// listRules returns all policy rules, none if the kernel has no policy routing.
func (k *kernel) listRules() ([]netlink.Rule, error) {
	var all []netlink.Rule
	for _, family := range k.families() {
		rules, err := repeat(func() ([]netlink.Rule, error) { return k.nl.RuleList(family) })
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list policy rules: %w", explain(err))
		}
		all = append(all, rules...)
	}
	return all, nil
}
