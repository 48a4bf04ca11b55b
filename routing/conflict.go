package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// network is a network that the host is in.
type network struct {
	prefix netip.Prefix
	link   string
}

// everythingBits is the length below which a route is to hold everything, and
// the host's networks with it, rather than to lead to one of the same addresses.
const everythingBits = 8

// conflicts says where the tunnel and a network of the host have the same
// addresses, and what becomes of that.
func conflicts(s State, host []network) (list []string) {
	for _, n := range host {
		for _, a := range s.Addresses {
			if n.prefix.Contains(a.Addr()) && !n.prefix.IsSingleIP() {
				list = append(list, fmt.Sprintf("the tunnel's address %v lies in %v, the network of %s: "+
					"a host there with this address is not reached; have one of the two renumbered", a.Addr(), n.prefix, n.link))
			}
		}
		for _, r := range s.Routes {
			switch out := slices.ContainsFunc(s.Exclude, func(e netip.Prefix) bool { return e.Bits() <= r.Bits() && e.Overlaps(r) }); {
			case out || !r.Overlaps(n.prefix):
			case r.Bits() > n.prefix.Bits():
				list = append(list, fmt.Sprintf("the tunnel's route %v takes addresses out of %v, the network of %s: "+
					"put them into routes.exclude to keep them", r, n.prefix, n.link))
			case r.Bits() >= everythingBits && !s.Override:
				list = append(list, fmt.Sprintf("the tunnel's route %v holds %v, the network of %s, which goes first: "+
					"what the tunnel has there is not reached", r, n.prefix, n.link))
			}
		}
	}
	return list
}

// warnConflicts logs each conflict once.
func (s *scope) warnConflicts(want State) {
	if s.Mark == 0 {
		return
	}
	host, err := s.hostNetworks()
	if err != nil {
		s.Logger.Debug("conflicts with the host's networks are not known", "error", err)
		return
	}
	for _, c := range conflicts(want, host) {
		if !s.told[c] {
			s.told[c] = true
			s.Logger.Warn(c)
		}
	}
}

// hostNetworks returns the networks of the host's other interfaces.
func (s *scope) hostNetworks() (list []network, err error) {
	links, err := repeat(s.nl.LinkList)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.Attrs().Index == s.index || l.Attrs().Index == loopback {
			continue
		}
		addrs, err := repeat(func() ([]netlink.Addr, error) { return s.nl.AddrList(l, netlink.FAMILY_ALL) })
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
