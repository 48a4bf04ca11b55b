package routing

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// op is one change to the kernel.
type op struct {
	kind string // kind of the object, one of the constants below
	text string // a verb and its object, for the log and for errors
	do   func() error
}

// The kinds of objects of a plan. They are label values of a metric.
const (
	kindLink    = "link"
	kindMTU     = "mtu"
	kindAddress = "address"
	kindTable   = "table" // nftables table
	kindRoute   = "route"
	kindRule    = "rule"
	kindSysctl  = "sysctl"
	kindShared  = "" // an entry of the journal alone
)

// converge makes the kernel match the plan. It compares again after the
// changes, because the kernel removes objects together with others: routes with
// the last IPv4 address of an interface, and IPv6 with an MTU below 1280.
// converge stops at the first error, or with all set makes all changes that it
// can.
func (k *kernel) converge(want plan, all bool) error {
	var last string
	for range maxRounds {
		have, err := k.observe()
		if err != nil {
			return err
		}
		list, err := k.diff(have, want)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			k.verified = have.chains
			return nil
		}
		var errs []error
		for _, o := range list {
			err := o.do()
			k.logOp(o, err)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", o.text, err))
				if !all {
					break
				}
			}
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
		last = list[0].text
	}
	return fmt.Errorf("%s: another program undoes this each time: stop it", last)
}

// maxRounds is the number of comparisons until a plan must be reached.
const maxRounds = 5

func (k *kernel) logOp(o op, err error) {
	switch {
	case err != nil:
		k.Logger.Debug("failed to "+o.text, "error", err)
	case k.afterCrash:
		k.Logger.Info("left behind by a dead process: " + o.text)
	default:
		k.Logger.Debug(o.text)
	}
}

// ops is a list of changes, in the order in which they are made.
type ops []op

func (o *ops) add(kind string, do func() error, format string, args ...any) {
	*o = append(*o, op{kind, fmt.Sprintf(format, args...), do})
}

// diff returns the changes that make the kernel match the plan. Objects are
// added before others are removed.
func (k *kernel) diff(have observed, want plan) (ops, error) {
	var list ops
	k.plannedRoutes = want.routes
	if want.up && have.link == nil {
		return nil, fmt.Errorf("interface %s (index %d): %w", k.Interface, k.index,
			explain(unix.ENODEV))
	}
	if want.mtu >= minMTU6 {
		k.diffMTU(&list, have, want)
		if have.mtu < minMTU6 {
			return list, nil // IPv6 starts with new settings, which must be read first
		}
	}
	set, unset, err := k.diffSysctls(want)
	if err != nil {
		return nil, err
	}
	// The firewall comes before the packets that it filters.
	if want.grouped && have.group != tunnelGroup {
		list.add(kindLink, func() error {
			return k.setGroup(have.link, have.group)
		}, "put %s into group %d", k.Interface, tunnelGroup)
	}
	chains := k.available(want.chains)
	if len(chains) != 0 && !(sameTable(chains, have.chains) &&
		sameContents(have.chains, k.verified)) {
		list.add(kindTable, func() error {
			return k.writeTable(chains)
		}, "write nftables table inet %s", k.tableName())
	}
	list = append(list, set...)
	k.diffAdded(&list, have, want)
	k.diffRemoved(&list, have, want)
	if !want.up && k.rec.Down {
		list.add(kindLink, func() error {
			return k.restoreDown(have.link)
		}, "set %s down", k.Interface)
	}
	if want.mtu < minMTU6 {
		// This turns IPv6 off, or restarts it if the MTU is restored.
		k.diffMTU(&list, have, want)
	}
	if !want.up && k.rec.AddrGen != "" {
		list.add(kindLink, func() error {
			return k.restoreAddrGen(have.link)
		}, "restore the address generation of %s", k.Interface)
	}
	list = append(list, unset...)
	if len(chains) == 0 && have.hasTable {
		list.add(kindTable, k.deleteTable, "delete nftables table inet %s", k.tableName())
	}
	if !want.grouped && k.rec.Group != nil {
		list.add(kindLink, func() error {
			return k.restoreGroup(have.link)
		}, "restore the group of %s", k.Interface)
	}
	return list, nil
}

func (k *kernel) diffMTU(list *ops, have observed, want plan) {
	switch {
	case want.mtu == 0 && k.rec.MTU != 0:
		list.add(kindMTU, func() error {
			return k.restoreMTU(have.link)
		}, "set the MTU of %s back to %d", k.Interface, k.rec.MTU)
	case want.mtu != 0 && have.mtu != want.mtu:
		list.add(kindMTU, func() error { return k.setMTU(have.link, want.mtu, have.mtu) },
			"set the MTU of %s from %d to %d", k.Interface, have.mtu, want.mtu)
	}
}

// diffAdded appends the changes that add objects. Each object comes after those
// that it depends on: interface, addresses, routes, rules.
func (k *kernel) diffAdded(list *ops, have observed, want plan) {
	if want.up && have.addrGen != "" && have.addrGen != strconv.Itoa(addrGenNone) &&
		(!have.up || k.rec.AddrGen != "") {
		list.add(kindLink, func() error {
			return k.disableLinkLocal(have.link, have.addrGen)
		}, "stop %s from generating addresses", k.Interface)
		for p := range have.addrs {
			// IPv6 was turned off and on again, such as by an MTU below 1280.
			// This has reset the mode, which then generated an address.
			if k.rec.AddrGen != "" && isIPv6(p) && p.Addr().IsLinkLocalUnicast() &&
				!slices.Contains(want.addrs, p) {
				list.add(kindAddress, func() error {
					return k.delAddr(have.link, p)
				}, "delete address %v of %s", p, k.Interface)
			}
		}
	}
	if want.up && !have.up {
		list.add(kindLink, func() error { return k.setUp(have.link) }, "set %s up", k.Interface)
	}
	for _, p := range want.addrs {
		_, ok := have.addrs[p]
		if _, bad := have.unusable[p]; ok && !bad {
			continue
		}
		if ok && !isIPv6(p) {
			list.add(kindAddress, func() error {
				return k.delAddr(have.link, p)
			}, "delete address %v of %s", p, k.Interface)
		}
		for old := range have.addrs {
			// An interface cannot have an IPv6 address with two prefix lengths.
			if isIPv6(p) && old.Addr() == p.Addr() {
				list.add(kindAddress, func() error {
					return k.delAddr(have.link, old)
				}, "delete address %v of %s", old, k.Interface)
			}
		}
		list.add(kindAddress, func() error {
			return k.addAddr(have.link, p)
		}, "add address %v to %s", p, k.Interface)
	}
	for _, r := range have.wrongRoutes {
		list.add(kindRoute, func() error {
			return unlessGone(k.nl.RouteDel(&r))
		}, "delete a route of another program: %v in table %d", prefixOf(r.Dst), r.Table)
	}
	for _, group := range groupRoutes(want.routes, have.routes) {
		list.add(kindRoute, func() error {
			return k.addRoutes(group)
		}, "add %d %s", len(group), describe(group[0]))
	}
	for _, r := range missing(want.rules, have.rules, compareRules) {
		n := r.netlink(k)
		list.add(kindRule, func() error {
			return explain(k.nl.RuleAdd(n))
		}, "add %s", describeRule(n))
	}
}

// diffRemoved appends the changes that remove objects, in the opposite order.
func (k *kernel) diffRemoved(list *ops, have observed, want plan) {
	old := missing(have.rules, want.rules, compareRules)
	slices.Reverse(old)
	rules := have.wrongRules
	for _, r := range old {
		rules = append(rules, r.netlink(k))
	}
	for _, n := range rules {
		list.add(kindRule, func() error {
			return unlessGone(k.nl.RuleDel(n))
		}, "delete %s", describeRule(n))
	}
	for _, group := range groupRoutes(have.routes, want.routes) {
		slices.Reverse(group)
		list.add(kindRoute, func() error {
			return k.delRoutes(group)
		}, "delete %d %s", len(group), describe(group[0]))
	}
	for _, p := range k.rec.Addresses {
		if !slices.Contains(want.addrs, p) {
			list.add(kindAddress, func() error {
				return k.delAddr(have.link, p)
			}, "delete address %v of %s", p, k.Interface)
		}
	}
}

// missing returns the elements of want that are not in have, in order.
func missing[T comparable](want, have map[T]struct{}, compare func(a, b T) int) []T {
	var list []T
	for v := range want {
		if _, ok := have[v]; !ok {
			list = append(list, v)
		}
	}
	slices.SortFunc(list, compare)
	return list
}

// groupRoutes returns the routes of want that are not in have, grouped by table
// and family.
func groupRoutes(want, have map[route]struct{}) (groups [][]route) {
	list := missing(want, have, compareRoutes)
	for len(list) > 0 {
		n := slices.IndexFunc(list, func(r route) bool {
			return r.table != list[0].table || isIPv6(r.prefix) != isIPv6(list[0].prefix)
		})
		if n < 0 {
			n = len(list)
		}
		groups = append(groups, list[:n])
		list = list[n:]
	}
	return groups
}

func describe(r route) string {
	family := "IPv4"
	if isIPv6(r.prefix) {
		family = "IPv6"
	}
	return fmt.Sprintf("%s routes of table %d", family, r.table)
}

func describeRule(n *netlink.Rule) string {
	target := "IPv4 rule"
	if n.Family == netlink.FAMILY_V6 {
		target = "IPv6 rule"
	}
	if n.Invert {
		return fmt.Sprintf("%s %d: not fwmark %#x lookup %d", target, n.Priority, n.Mark, n.Table)
	}
	to := "all"
	if n.Dst != nil {
		to = n.Dst.String()
	}
	description := fmt.Sprintf("%s %d: to %s lookup %d", target, n.Priority, to, n.Table)
	if n.SuppressPrefixlen >= 0 {
		description += fmt.Sprintf(" suppress_prefixlength %d", n.SuppressPrefixlen)
	}
	return description
}

// clean undoes the changes of dead processes: those in old, the journal of this
// instance, and all objects of the interface or of interfaces that are gone.
func (k *kernel) clean(old *record) error {
	// Rules are listed before interfaces. An interface exists before its rules,
	// so if it has rules and is not in the later list, it is gone for good.
	rules, err := k.listRules()
	if err != nil {
		return err
	}
	links, err := repeat(k.nl.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", explain(err))
	}
	exists := make(map[int]bool)
	for _, l := range links {
		exists[l.Attrs().Index&indexMask] = true
	}
	var records []record
	if old != nil {
		if !slices.ContainsFunc(links, func(l netlink.Link) bool {
			return l.Attrs().Index == old.Index && l.Attrs().Name == old.Interface
		}) {
			// The settings of the interface are gone with it.
			old.MTU, old.Down, old.AddrGen, old.Group, old.Addresses = 0, false, "", nil, nil
		}
		records = append(records, *old)
	}
	records = append(records, record{Interface: k.Interface, Index: k.index})
	for i := range rules {
		if _, index, ok := parseRule(&rules[i]); ok && !exists[index] {
			records = append(records, record{Interface: fmt.Sprintf("interface %d, gone", index),
				Index: index})
		}
	}
	done := make(map[int]bool)
	for _, rec := range records {
		if done[rec.Index] {
			continue
		}
		done[rec.Index] = true
		dead := *k
		dead.afterCrash, dead.index, dead.Interface, dead.rec = true, rec.Index, rec.Interface, rec
		if err := dead.converge(plan{}, true); err != nil {
			return err
		}
	}
	return nil
}
