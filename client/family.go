package client

import (
	"fmt"
	"net/netip"
	"slices"

	"masquevpn/capsule"
	"masquevpn/routing"
)

var (
	everything4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	everything6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// The keys of notices about address families that the tunnel does not carry.
const (
	noticeFamily        = "family"
	noticeFamilyOutside = "family_outside"
	noticeIPv6          = "ipv6"
	noticeNoRoutes      = "no_routes"
)

// holdMissingFamily returns routes. In a full tunnel it adds the accepted
// routes of the family without an address in addrs: a proxy with addresses of
// one family advertises routes of that family only (RFC 9484 section 4.6), and
// the other family's traffic would leave outside the tunnel. With the added
// routes the tunnel answers it with No Route, at once.
//
// A tunnel is full if routes cover most of one family and the configuration
// accepts most of the other. A gateway gets no added routes, because they would
// make it forward that family.
func (s *session) holdMissingFamily(routes, addrs []netip.Prefix) []netip.Prefix {
	family := ""
	for _, f := range []struct {
		name string
		ipv6 bool
	}{{"IPv4", false}, {"IPv6", true}} {
		other := func(p netip.Prefix) bool { return p.Addr().Is6() != f.ipv6 }
		accepted := slices.DeleteFunc(slices.Clone(s.c.cfg.Accept), other)
		if len(s.c.cfg.AdvertiseRoutes) > 0 || !routing.IsFull(routes, !f.ipv6) ||
			!routing.IsFull(accepted, f.ipv6) ||
			slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return !other(p) }) {
			continue
		}
		family = f.name
		routes = slices.Concat(slices.DeleteFunc(slices.Clone(routes), func(p netip.Prefix) bool {
			return !other(p)
		}), accepted)
		break
	}
	if family != "" && family != s.heldFamily {
		s.c.cfg.Logger.Warn("all traffic goes through the tunnel, but it has no address of this "+
			"family, which is therefore unreachable", "family", family)
	}
	s.heldFamily = family
	text := ""
	if family != "" {
		text = family + " is unreachable: all traffic goes through the tunnel, and the proxy " +
			"assigns no address of this family"
	}
	s.c.warn(noticeFamily, text)
	s.noteFamilyOutside(routes)
	return routes
}

// noteFamilyOutside warns, in the log and in the status, about a family that
// leaves this host outside a full tunnel of the other family: the configuration
// accepts it, but the proxy does not advertise most of it.
func (s *session) noteFamilyOutside(routes []netip.Prefix) {
	text := ""
	for _, f := range []struct {
		name, other string
		ipv6        bool
	}{{"IPv4", "IPv6", false}, {"IPv6", "IPv4", true}} {
		if routing.IsFull(routes, !f.ipv6) && !routing.IsFull(routes, f.ipv6) &&
			routing.IsFull(s.c.cfg.Accept, f.ipv6) {
			text = fmt.Sprintf("%s leaves this host outside the tunnel, which carries all of %s: "+
				"the proxy advertises no routes for it", f.name, f.other)
		}
	}
	if text != "" && text != s.familyOutside {
		s.c.cfg.Logger.Warn("one family leaves outside the tunnel", "reason", text)
	}
	s.familyOutside = text
	s.c.warn(noticeFamilyOutside, text)
}

// noteNoRoutes warns, in the log and in the status, if the tunnel has no route,
// so that all traffic leaves this host as it would without the tunnel. A
// gateway gets no warning: it has no routes until another gateway connects.
func (s *session) noteNoRoutes(advertised []capsule.Route, routes []netip.Prefix) {
	text := ""
	if len(routes) == 0 && len(s.c.cfg.Accept) > 0 && len(s.c.cfg.AdvertiseRoutes) == 0 {
		text = "nothing goes through the tunnel: "
		if len(advertised) == 0 {
			text += "the proxy advertises no routes"
		} else {
			text += "no route that the proxy advertises is one that routes.accept has and this " +
				"host can take"
		}
	}
	if text != "" && text != s.noRoutes {
		s.c.cfg.Logger.Warn("the tunnel has no routes", "reason", text)
	}
	s.noRoutes = text
	s.c.warn(noticeNoRoutes, text)
}

// noteIPv6Refused warns, in the log and in the status, that IPv6 packets for
// the tunnel are refused, because its interface cannot have IPv6 for the reason
// held. nil removes the warning.
func (s *session) noteIPv6Refused(held error) {
	text := ""
	if held != nil {
		text = fmt.Sprintf("IPv6 that belongs in the tunnel is refused: %v", held)
		if !s.onlyIPv4 {
			s.c.cfg.Logger.Warn("IPv6 that belongs in the tunnel is refused", "reason", held)
		}
	}
	s.c.warn(noticeIPv6, text)
}
