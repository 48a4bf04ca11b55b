package client

import (
	"fmt"
	"net/netip"
	"slices"
)

var (
	everything4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	everything6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// The keys of notices about families that the tunnel does not carry.
const (
	noticeFamily = "family"
	noticeIPv6   = "ipv6"
)

// whole adds to routes, which are installed, what a tunnel for everything lacks: a proxy with addresses of one family advertises
// routes of that family only (RFC 9484 section 4.6), and the other family's traffic would leave beside the tunnel. When one
// family's default route is in the tunnel, and the configuration accepts that of the other, of which addrs has no address, that
// goes into the tunnel as well. There is no way on for its packets: they are answered with No Route, at once.
//
// A gateway is left out, because a route would make it forward that family.
func (s *session) whole(routes, addrs []netip.Prefix) []netip.Prefix {
	family := ""
	for _, f := range []struct {
		name       string
		all, other netip.Prefix
	}{{"IPv4", everything4, everything6}, {"IPv6", everything6, everything4}} {
		has := func(p netip.Prefix) bool { return p.Addr().Is4() == f.all.Addr().Is4() }
		if len(s.c.cfg.AdvertiseRoutes) > 0 || !slices.Contains(routes, f.other) || !slices.Contains(s.c.cfg.Accept, f.all) ||
			slices.ContainsFunc(addrs, has) {
			continue
		}
		family = f.name
		if !slices.Contains(routes, f.all) {
			routes = append(routes, f.all)
		}
		break
	}
	if family != "" && family != s.blocked {
		s.c.cfg.Logger.Warn("all traffic goes through the tunnel, and there is no address of this family in it: the family is unreachable", "family", family)
	}
	s.blocked = family
	text := ""
	if family != "" {
		text = family + " is unreachable: all traffic goes through the tunnel, and the proxy assigns no address of this family"
	}
	s.c.warn(noticeFamily, text)
	return routes
}

// noteHeld says, in the log and in the status, that the interface of the tunnel cannot have IPv6, for the reason held, and that
// what belongs in the tunnel is therefore refused; nil takes that back.
func (s *session) noteHeld(held error) {
	text := ""
	if held != nil {
		text = fmt.Sprintf("IPv6 that belongs in the tunnel is refused: %v", held)
		if !s.onlyIPv4 {
			s.c.cfg.Logger.Warn("IPv6 that belongs in the tunnel is refused", "reason", held)
		}
	}
	s.c.warn(noticeIPv6, text)
}
