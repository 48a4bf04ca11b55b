package routing

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const addrGenNone = 1 // IN6_ADDR_GEN_MODE_NONE

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

func (k *kernel) families() []int {
	if k.ipv6 {
		return []int{unix.AF_INET, unix.AF_INET6}
	}
	return []int{unix.AF_INET}
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

// repeat repeats a dump while it is interrupted by changes.
func repeat[T any](dump func() (T, error)) (T, error) {
	for range 9 {
		if v, err := dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}

// holdIPv6 returns the State that the interface can have. If the administrator
// turned IPv6 off, that is want without IPv6, with unreachable IPv6 routes, and
// reason is not nil. Without a mark, err is the reason instead.
func (k *kernel) holdIPv6(want State) (_ State, reason, err error) {
	err = k.checkIPv6(want)
	if k.Mark == 0 || !errors.Is(err, ErrIPv6Disabled) {
		return want, nil, err
	}
	held := want.ipv4Only()
	for _, p := range slices.Concat(want.Routes, want.Unreachable) {
		if isIPv6(p) {
			held.Unreachable = append(held.Unreachable, p)
		}
	}
	held.Exclude = want.Exclude
	return held, err, nil
}

// checkIPv6 returns an error if want has IPv6 and the interface cannot have it.
func (k *kernel) checkIPv6(want State) error {
	if !slices.ContainsFunc(slices.Concat(want.Addresses, want.Routes), isIPv6) {
		return nil
	}
	link, err := k.findLink()
	if err != nil || link == nil {
		return err
	}
	mtu := want.MTU
	if mtu == 0 {
		mtu = link.Attrs().MTU
	}
	if mtu < minMTU6 {
		return fmt.Errorf("interface %s: MTU %d is too small for IPv6, which needs %d: leave its addresses and routes out",
			k.Interface, mtu, minMTU6)
	}
	name := "net/ipv6/conf/" + link.Attrs().Name + "/disable_ipv6"
	if v, err := k.readSysctl(name); err == nil && v != "0" {
		return fmt.Errorf("%w: %s is %s, as net.ipv6.conf.default.disable_ipv6 was when %s was made: "+
			"set it to 0 to have IPv6 in the tunnel", ErrIPv6Disabled, dotted(name), v,
			link.Attrs().Name)
	}
	return nil
}

func (k *kernel) addAddr(link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if isIPv6(p) {
		a.Flags |= unix.IFA_F_NODAD
	}
	if k.Mark != 0 {
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	k.rec.addAddr(p)
	if err := k.journal.save(k.rec); err != nil {
		k.rec.dropAddr(p)
		return err
	}
	if err := k.nl.AddrAdd(link, a); err != nil {
		k.rec.dropAddr(p)
		return errors.Join(explain(err), k.journal.save(k.rec))
	}
	return nil
}

func (k *kernel) delAddr(link netlink.Link, p netip.Prefix) error {
	if link != nil {
		err := k.nl.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)})
		if err := unlessGone(err); err != nil {
			return err
		}
	}
	k.rec.dropAddr(p)
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// setMTU changes the MTU and records the previous one.
func (k *kernel) setMTU(link netlink.Link, mtu, found int) error {
	if k.rec.MTU == 0 {
		k.rec.MTU = found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.MTU = 0
			return err
		}
	}
	return explain(k.nl.LinkSetMTU(link, mtu))
}

func (k *kernel) restoreMTU(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetMTU(link, k.rec.MTU)); err != nil {
			return err
		}
	}
	k.rec.MTU = 0
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// tunnelGroup is the group of the interfaces of all tunnels of this host that
// forward.
const tunnelGroup = 9484

// setGroup puts the interface into tunnelGroup and records the previous group.
func (k *kernel) setGroup(link netlink.Link, found uint32) error {
	if k.rec.Group == nil {
		k.rec.Group = &found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.Group = nil
			return err
		}
	}
	return explain(k.nl.LinkSetGroup(link, tunnelGroup))
}

func (k *kernel) restoreGroup(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetGroup(link, int(*k.rec.Group))); err != nil {
			return err
		}
	}
	k.rec.Group = nil
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// disableLinkLocal keeps the kernel from generating a link-local address for
// the interface. The peer does not know that address, and with it the host
// sends router solicitations and multicast reports into the tunnel. The mode is
// set through netlink because a write to its sysctl generates addresses.
func (k *kernel) disableLinkLocal(link netlink.Link, found string) error {
	if k.rec.AddrGen == "" {
		k.rec.AddrGen = found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.AddrGen = ""
			return err
		}
	}
	return explain(k.nl.LinkSetIP6AddrGenMode(link, addrGenNone))
}

func (k *kernel) restoreAddrGen(link netlink.Link) error {
	if mode, err := strconv.Atoi(k.rec.AddrGen); link != nil && err == nil {
		if err := unlessGone(k.nl.LinkSetIP6AddrGenMode(link, mode)); err != nil {
			return err
		}
	}
	k.rec.AddrGen = ""
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// setUp sets the interface up and records that it was down.
func (k *kernel) setUp(link netlink.Link) error {
	if !k.rec.Down {
		k.rec.Down = true
		if err := k.journal.save(k.rec); err != nil {
			k.rec.Down = false
			return err
		}
	}
	return explain(k.nl.LinkSetUp(link))
}

func (k *kernel) restoreDown(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetDown(link)); err != nil {
			return err
		}
	}
	k.rec.Down = false
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

func (k *kernel) addRoutes(routes []route) error {
	for _, r := range routes {
		if err := k.nl.RouteAdd(r.netlink(k)); err != nil {
			return fmt.Errorf("%v: %w", r.prefix, explain(err))
		}
	}
	return nil
}

func (k *kernel) delRoutes(routes []route) error {
	var errs []error
	for _, r := range routes {
		if err := unlessGone(k.nl.RouteDel(r.netlink(k))); err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", r.prefix, err))
		}
	}
	return errors.Join(errs...)
}

// unlessGone explains the error of a removal. It returns nil if the object did
// not exist.
func unlessGone(err error) error {
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return explain(err)
}
