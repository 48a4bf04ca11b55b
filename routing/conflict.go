package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// network is a network of one of the host's interfaces.
type network struct {
	prefix netip.Prefix
	link   string
}

// broadBits is the prefix length below which a route is meant for everything,
// including the host's networks, and not for a network with the same addresses.
const broadBits = 8

// networkConflicts returns a sentence for each network of the host that has the
// same addresses as the tunnel.
func networkConflicts(s State, host []network) (list []string) {
	for _, n := range host {
		hostFirst := s.HostFirst(n.prefix)
		for _, r := range s.Routes {
			switch out := slices.ContainsFunc(s.Exclude, func(e netip.Prefix) bool {
				return e.Bits() <= r.Bits() && e.Overlaps(r)
			}); {
			case out || !r.Overlaps(n.prefix):
			case r.Bits() > n.prefix.Bits():
				list = append(list,
					fmt.Sprintf("the tunnel's route %v takes addresses out of %v, the network of %s: "+
						"put them into routes.exclude to keep them", r, n.prefix, n.link))
			case r.Bits() >= broadBits && hostFirst:
				list = append(list,
					fmt.Sprintf("the tunnel's route %v holds %v, the network of %s, which goes first: "+
						"the same addresses in the tunnel are not reached", r, n.prefix, n.link))
			}
		}
	}
	return list
}

// hostRoute is a route of the host's main table except a default route.
type hostRoute struct {
	prefix  netip.Prefix
	gateway netip.Addr // zero if the destination is on the link
	link    string
}

func (r hostRoute) String() string {
	if r.gateway.IsValid() {
		return fmt.Sprintf("%v via %v on %s", r.prefix, r.gateway, r.link)
	}
	return fmt.Sprintf("%v on %s", r.prefix, r.link)
}

// maxForeign is the greatest number of routes, and of rules, that are reported.
const maxForeign = 8

// publicRoutes returns a sentence for each route of the host to public
// addresses of a full tunnel.
func publicRoutes(s State, host []hostRoute) (list []string) {
	full := map[bool]bool{}
	for _, v6 := range []bool{false, true} {
		full[v6] = s.HostRoutes != HostNone && IsFull(slices.Concat(s.Routes, s.Unreachable), v6)
	}
	for _, r := range host {
		v6, within := isIPv6(r.prefix), func(p netip.Prefix) bool {
			return p.Bits() <= r.prefix.Bits() && p.Overlaps(r.prefix)
		}
		// The host's own IPv6 network usually has public addresses.
		usual := v6 && !r.gateway.IsValid() && r.prefix.Bits() >= 64
		if !full[v6] || usual || s.isPrivate(r.prefix) || slices.ContainsFunc(s.Exclude, within) {
			continue
		}
		if len(list) == maxForeign {
			return append(list, "more routes of this host lead to public addresses: ip route show table main lists them")
		}
		if s.HostRoutes == HostAll {
			list = append(list, fmt.Sprintf("the host's route %v takes public addresses out of the tunnel: "+
				"delete it, or set routes.lan = true, if this is not intended", r))
		} else {
			list = append(list, fmt.Sprintf("the host's route %v leads to public addresses, which stay in the tunnel: "+
				"put it into routes.exclude to reach them outside", r))
		}
	}
	return list
}

// hostRoutes returns the routes of the main table except default routes and
// routes of the tunnel's interface.
func (k *kernel) hostRoutes() (list []hostRoute, err error) {
	links, err := repeat(k.nl.LinkList)
	if err != nil {
		return nil, err
	}
	names := make(map[int]string)
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
	for _, family := range k.families() {
		routes, err := repeat(func() ([]netlink.Route, error) {
			return k.dump.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			index, gateway := r.LinkIndex, r.Gw
			if len(r.MultiPath) > 0 {
				index, gateway = r.MultiPath[0].LinkIndex, r.MultiPath[0].Gw
			}
			p := prefixOf(r.Dst)
			if r.Type != unix.RTN_UNICAST || p.Bits() == 0 || index == k.index ||
				index == loopback {
				continue
			}
			via, _ := netip.AddrFromSlice(gateway)
			list = append(list, hostRoute{p, via.Unmap(), names[index]})
		}
	}
	return list, nil
}

// looseFilters returns the settings that loosen strict reverse path filters on
// interfaces whose network is routed into the tunnel. A strict filter would
// drop packets from such a network, because the route to their source is the
// tunnel. ARP requests of the gateway are among them and have no mark.
func (k *kernel) looseFilters(want State) (list []setting) {
	tunnelFirst := want.HostRoutes == HostNone || want.ignoresPublic(false)
	if k.Mark == 0 || !tunnelFirst {
		return nil
	}
	networks, err := k.hostNetworks()
	if err != nil {
		k.Logger.Debug("reverse path filters are not changed", "error", err)
		return nil
	}
	all, _ := k.readSysctl("net/ipv4/conf/all/rp_filter")
	for _, n := range networks {
		contains := func(r netip.Prefix) bool {
			return r.Overlaps(n.prefix) && r.Bits() <= n.prefix.Bits()
		}
		name := "net/ipv4/conf/" + n.link + "/rp_filter"
		switch own, _ := k.readSysctl(name); {
		case isIPv6(n.prefix), want.HostRoutes == HostPrivate && want.isPrivate(n.prefix),
			!slices.ContainsFunc(want.Routes, contains):
			// The network is not routed into the tunnel.
		case slices.ContainsFunc(list, func(l setting) bool { return l.name == name }):
			// The interface has several networks.
		case all != "2" && own != "2" && (all == "1" || own == "1"),
			k.rec.sysctl(name) >= 0, k.journal.other(name, false) != nil:
			// The filter is strict, or was until an instance loosened it.
			list = append(list, setting{name: name, value: "2",
				optional: "a strict reverse path filter may keep this host from its own network"})
		}
	}
	return list
}

// hostNetworks returns the networks of the host's other interfaces.
func (k *kernel) hostNetworks() (list []network, err error) {
	links, err := repeat(k.nl.LinkList)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.Attrs().Index == k.index || l.Attrs().Index == loopback {
			continue
		}
		addrs, err := repeat(func() ([]netlink.Addr, error) {
			return k.nl.AddrList(l, netlink.FAMILY_ALL)
		})
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if p := prefixOf(a.IPNet).Masked(); !p.Addr().IsLinkLocalUnicast() {
				list = append(list, network{p, l.Attrs().Name})
			}
		}
	}
	return list, nil
}
