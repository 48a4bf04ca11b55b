package client

import (
	"fmt"
	"net/netip"
	"slices"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
)

// checkSite checks routes.advertise and routes.assign, which describe the
// networks behind this host.
func (c *Config) checkSite() error {
	own := slices.Clone(c.Static)
	for _, p := range c.Request {
		if !p.Addr().IsUnspecified() {
			own = append(own, p)
		}
	}
	for _, p := range c.AdvertiseRoutes {
		if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
			return usage("routes.advertise", "%v is not a prefix without bits beyond its length", p)
		}
		if reserved, overlaps := connectip.Reserved(p); overlaps {
			return usage("routes.advertise", "%v overlaps %v, which is never behind a gateway", p,
				reserved)
		}
		if i := slices.IndexFunc(own, p.Overlaps); i >= 0 {
			return usage("routes.advertise", "%v holds %v, an address of the tunnel itself",
				p, own[i])
		}
	}
	// Our own proxy accepts no more than this.
	if n := len((&capsule.RouteAdvertisement{Routes: capsule.Routes(c.AdvertiseRoutes,
		0)}).Append(nil)); n > connectip.MaxCapsule {
		return usage("routes.advertise",
			"%d networks are too many for a proxy: advertise fewer and larger ones",
			len(c.AdvertiseRoutes))
	}
	if n := len(c.AssignPeer); n > connectip.MaxAssigned {
		return usage("routes.assign", "%d addresses are too many, at most %d are possible", n,
			connectip.MaxAssigned)
	}
	for i, p := range c.AssignPeer {
		if !p.IsValid() || p.Addr().Is4In6() || !p.IsSingleIP() {
			return usage("routes.assign", "%v is not a single address", p)
		}
		if reserved, overlaps := connectip.Reserved(p); overlaps {
			return usage("routes.assign", "%v is within %v, which is never behind a gateway", p,
				reserved)
		}
		if slices.ContainsFunc(own, p.Overlaps) || slices.Contains(c.AssignPeer[:i], p) {
			return usage("routes.assign", "%v is already an address of the tunnel", p)
		}
	}
	return nil
}

// checkAssigned checks that addrs, assigned by the proxy, do not overlap the
// networks behind this host.
func (c *Config) checkAssigned(addrs []netip.Prefix) error {
	for _, a := range addrs {
		if i := slices.IndexFunc(c.AdvertiseRoutes, a.Overlaps); i >= 0 {
			return fail(causeAddresses, nil,
				fmt.Sprintf("routes.advertise: %v holds %v, the address in the tunnel that the "+
					"proxy assigned",
					c.AdvertiseRoutes[i], a.Addr()), "correct it, or ask the operator of the proxy")
		}
		if slices.ContainsFunc(c.AssignPeer, a.Overlaps) {
			return fail(causeAddresses, nil,
				fmt.Sprintf("routes.assign: %v is the address in the tunnel that the proxy "+
					"assigned to this host", a.Addr()),
				"choose another")
		}
	}
	return nil
}

// ownNetworks returns the networks for which this host may forward packets from
// the tunnel: the advertised ones, and assigned prefixes of more than one
// address.
func (c *Config) ownNetworks(assigned []netip.Prefix) []netip.Prefix {
	out := slices.Clone(c.AdvertiseRoutes)
	for _, p := range assigned {
		if !p.IsSingleIP() && p == p.Masked() {
			out = append(out, p)
		}
	}
	return out
}

// excludeOwn returns routes without those that lie within a network behind this
// host, or within a range that no router forwards to. A larger route that
// contains such a network stays: the host prefers its own, longer route.
func (s *session) excludeOwn(routes []netip.Prefix) []netip.Prefix {
	var refused []netip.Prefix
	routes = slices.DeleteFunc(routes, func(p netip.Prefix) bool {
		within := slices.ContainsFunc(s.c.cfg.AdvertiseRoutes, func(own netip.Prefix) bool {
			return own.Overlaps(p) && own.Bits() <= p.Bits()
		})
		if reserved, overlaps := connectip.Reserved(p); overlaps && reserved.Bits() <= p.Bits() ||
			p.Addr().Is4In6() {
			within = true
		}
		if within {
			refused = append(refused, p)
		}
		return within
	})
	if len(refused) > 0 && !slices.Equal(refused, s.refusedRoutes) {
		s.c.cfg.Logger.Warn("ignoring the proxy's routes into networks behind this host or "+
			"reserved ranges", "refused", refused)
	}
	s.refusedRoutes = refused
	return routes
}

// announceSite assigns addresses to the proxy and advertises the networks
// behind this host (RFC 9484 section 8.2). It sends only lists that changed.
func (s *session) announceSite() error {
	networks := s.c.cfg.AdvertiseRoutes
	assign := s.c.cfg.AssignPeer
	if s.onlyIPv4 {
		networks, assign = onlyIPv4(networks), onlyIPv4(assign)
	}
	if len(assign) > 0 && !slices.Equal(assign, s.assignedPeer) {
		if err := s.conn.Assign(unrequested(assign)); err != nil {
			return err
		}
		s.assignedPeer = assign
	}
	if len(networks) > 0 && !slices.Equal(networks, s.advertised) {
		if err := s.conn.Advertise(capsule.Routes(networks, 0)); err != nil {
			return err
		}
		s.advertised = networks
		s.c.cfg.Logger.Info("advertised networks to the proxy", "networks", networks)
	}
	return nil
}

// unrequested returns an assignment of prefixes that answers no request.
func unrequested(prefixes []netip.Prefix) []capsule.Address {
	addrs := make([]capsule.Address, len(prefixes))
	for i, p := range prefixes {
		addrs[i] = capsule.Address{Prefix: p}
	}
	return addrs
}

// handleAddressRequest answers an ADDRESS_REQUEST of the proxy. It assigns each
// address of routes.assign once and refuses all other requests.
func (s *session) handleAddressRequest(requested []capsule.Address) error {
	answer := unrequested(s.c.cfg.AssignPeer)
	for _, r := range requested {
		i := slices.IndexFunc(answer, func(a capsule.Address) bool {
			same := a.Prefix.Addr().Is4() == r.Prefix.Addr().Is4() && !a.Refused() &&
				a.RequestID == 0
			return same && (r.Prefix.Addr().IsUnspecified() || r.Prefix.Overlaps(a.Prefix))
		})
		if i < 0 {
			answer = append(answer, connectip.Refusal(r))
			continue
		}
		answer[i].RequestID = r.RequestID
	}
	return s.conn.Assign(answer)
}
