package client

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/routing"
)

// This file checks the configuration of an authenticated proxy, which may be
// wrong about this host or hostile. It compares the assigned addresses and the
// advertised routes with the request and with the networks of this host: an
// assigned address in such a network could cut the host off from it, or give
// the proxy access to it.

// readNetworks reads the networks of this host without the tunnel's. It reports
// whether they have changed.
func (c *Client) readNetworks() (changed bool) {
	networks, err := c.cfg.HostNetworks(c.iface())
	if err != nil {
		c.cfg.Logger.Warn("cannot read the addresses of this host", "error", err)
		return false
	}
	before := c.networks.Swap(&networks)
	return before == nil || !slices.Equal(*before, networks)
}

// networksChanged reports whether the networks have changed since readNetworks.
func (c *Client) networksChanged() bool {
	networks, err := c.cfg.HostNetworks(c.iface())
	return err == nil && !slices.Equal(networks, c.hostNetworks())
}

// hostNetworks returns the networks that readNetworks read.
func (c *Client) hostNetworks() []routing.HostNetwork {
	if n := c.networks.Load(); n != nil {
		return *n
	}
	return nil
}

// isOwn reports whether a is an address of this host, inside or outside the
// tunnel.
func (c *Client) isOwn(a netip.Addr) bool {
	return slices.ContainsFunc(c.hostNetworks(), func(n routing.HostNetwork) bool {
		return n.Address.Addr() == a
	}) ||
		slices.ContainsFunc(c.installed, func(p netip.Prefix) bool {
			return connectip.HostAddr(p) == a
		})
}

// acceptableAddresses returns the assigned addresses that this host can use and
// that are of a requested family.
func (s *session) acceptableAddresses(assigned []capsule.Address) []capsule.Address {
	return slices.DeleteFunc(slices.Clone(assigned), func(a capsule.Address) bool {
		return !a.Refused() && (!s.wantsFamily(a.Prefix) || s.whyUnusable(a.Prefix) != "")
	})
}

// wantsFamily reports whether the session requests the family of p, or requests
// nothing.
func (s *session) wantsFamily(p netip.Prefix) bool {
	return !s.requests || slices.ContainsFunc(s.c.cfg.Request, func(w netip.Prefix) bool {
		return w.Addr().Is4() == p.Addr().Is4()
	})
}

// unassignable lists prefixes, besides the reserved ones, that no host has
// addresses from (RFC 6890): IETF protocols, IPv4 addresses in the form of
// IPv6, which programs and translators treat as IPv4, and the discard prefix.
var unassignable = parsePrefixes("192.0.0.8/29", "192.0.0.170/31", "::/96", "::ffff:0:0/96",
	"64:ff9b::/96", "64:ff9b:1::/48", "100::/64")

func parsePrefixes(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// whyUnusable returns the reason why this host cannot use an assigned address
// or prefix, "" if it can.
func (s *session) whyUnusable(p netip.Prefix) string {
	c := s.c
	if slices.Contains(c.cfg.Static, p) {
		return "" // the configuration takes precedence
	}
	if reserved, overlaps := connectip.Reserved(p); overlaps {
		return fmt.Sprintf("overlaps %v, which is not for tunnels", reserved)
	}
	if i := slices.IndexFunc(unassignable, p.Overlaps); i >= 0 {
		return fmt.Sprintf("overlaps %v, which is not for tunnels", unassignable[i])
	}
	if s.requests && !slices.ContainsFunc(c.cfg.Request, func(w netip.Prefix) bool {
		return w.Addr().Is4() == p.Addr().Is4() && p.Bits() >= w.Bits()
	}) {
		return "is larger than addresses.request allows"
	}
	s.mu.Lock()
	held := s.installed
	s.mu.Unlock()
	for _, a := range s.proxyAddrs {
		if p.Contains(a.Addr()) {
			return fmt.Sprintf("holds %v, where the proxy is reached outside the tunnel", a.Addr())
		}
	}
	for _, n := range c.hostNetworks() {
		if p.Contains(n.Address.Addr()) && !c.isMadeOf(n, p) {
			return fmt.Sprintf("holds %v, an address of %s", n.Address.Addr(), n.Interface)
		}
	}
	if n, overlaps := c.overlap(p); overlaps && !slices.Contains(held, p) {
		return fmt.Sprintf("lies in %v, the network of %s", n.Address.Masked(), n.Interface)
	}
	return ""
}

// isMadeOf reports whether n is a network that this host made of the prefix p,
// which the proxy delegated to it (RFC 9484 section 4.7.1): n is within p and
// does not lead to the proxy, and p is known: the client held it before, or it
// is requested by name. Any other prefix may be a trap of the proxy for a
// network that the host had before.
func (c *Client) isMadeOf(n routing.HostNetwork, p netip.Prefix) bool {
	network := n.Address.Masked()
	if p.IsSingleIP() || network.Bits() < p.Bits() || !p.Contains(network.Addr()) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if u := c.status.Underlay; u != nil && u.Interface == n.Interface {
		return false
	}
	return slices.Contains(c.delegated, p) || slices.Contains(c.cfg.Request, p)
}

// noteDelegated records the prefixes among the addresses that the kernel has.
func (c *Client) noteDelegated(addrs []netip.Prefix) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range addrs {
		if !p.IsSingleIP() && !slices.Contains(c.delegated, p) {
			c.delegated = append(c.delegated, p)
		}
	}
	c.delegated = c.delegated[max(0, len(c.delegated)-connectip.MaxAssigned):]
}

// overlap returns a network of this host that overlaps p, if there is one.
// Networks made of p count as p itself.
func (c *Client) overlap(p netip.Prefix) (routing.HostNetwork, bool) {
	networks := c.hostNetworks()
	i := slices.IndexFunc(networks, func(n routing.HostNetwork) bool {
		return n.Address.Masked().Overlaps(p) && !c.isMadeOf(n, p)
	})
	if i < 0 {
		return routing.HostNetwork{}, false
	}
	return networks[i], true
}

// updateFilter applies the checks again after the host's networks have changed.
func (s *session) updateFilter() error {
	s.mu.Lock()
	assigned, routes := s.assigned, s.routes
	s.mu.Unlock()
	var addrs []netip.Prefix
	for _, a := range s.acceptableAddresses(assigned) {
		if !a.Refused() {
			addrs = append(addrs, a.Prefix)
		}
	}
	return s.conn.SetFiltered(addrs, s.c.acceptableRoutes(routes))
}

// checkAssigned returns an error if this host cannot use an assigned address.
func (s *session) checkAssigned() error {
	s.mu.Lock()
	assigned := s.assigned
	s.mu.Unlock()
	for _, a := range assigned {
		if a.Refused() || !s.wantsFamily(a.Prefix) {
			continue
		}
		if why := s.whyUnusable(a.Prefix); why != "" {
			return fail(causeAddresses, nil,
				fmt.Sprintf("the proxy assigned %v, which %s: it is not taken", a.Prefix, why),
				"ask its operator for other addresses")
		}
	}
	return nil
}

// removeTakenAddresses removes addresses of the tunnel from the kernel that
// another network has assigned to this host in the meantime. Otherwise the
// tunnel's rules would drop the host's packets from these addresses. The routes
// stay.
func (c *Client) removeTakenAddresses() {
	c.mu.Lock()
	last := c.lastState
	c.mu.Unlock()
	if last == nil {
		return
	}
	isTaken := func(p netip.Prefix) bool {
		return slices.ContainsFunc(c.hostNetworks(), func(n routing.HostNetwork) bool {
			return n.Address.Addr() == p.Addr()
		})
	}
	state := *last
	state.Addresses = slices.DeleteFunc(slices.Clone(last.Addresses), isTaken)
	if len(state.Addresses) == len(last.Addresses) {
		return
	}
	if err := c.supervisor.Current().network.Apply(state); err != nil {
		c.cfg.Logger.Warn("cannot remove an address of the tunnel that another network has assigned to this host", "error", err)
		return
	}
	c.installed = nil
	c.mu.Lock()
	c.lastState = &state
	c.mu.Unlock()
}

// noteOverlap warns, in the log and in the status, if an address of the tunnel
// lies in a network of this host. The session continues, because it may be the
// host's only connection.
func (c *Client) noteOverlap(addrs []netip.Prefix) {
	text := ""
	for _, p := range addrs {
		if n, overlaps := c.overlap(p); overlaps && !slices.Contains(c.cfg.Static, p) {
			text = fmt.Sprintf("the tunnel's address %v lies in %v, the network of %s: hosts there may be unreachable; renumber one of the two",
				p.Addr(), n.Address.Masked(), n.Interface)
			break
		}
	}
	if text != "" && text != c.loggedOverlap {
		c.cfg.Logger.Warn("the tunnel and a network of this host have the same addresses",
			"reason", text)
	}
	c.loggedOverlap = text
	c.warn(noticeOverlap, text)
}

// acceptableRoutes returns the advertised addresses that packets in the tunnel
// may come from and go to. It leaves out addresses that the configuration does
// not accept or excludes, addresses behind this host, and the addresses and
// networks of this host. A route of the tunnel that is more specific than a
// network of this host stays.
func (c *Client) acceptableRoutes(routes []capsule.Route) []capsule.Route {
	byProtocol := make(map[uint8]*netipx.IPSetBuilder)
	for _, r := range routes {
		b := byProtocol[r.Protocol]
		if b == nil {
			b = &netipx.IPSetBuilder{}
			byProtocol[r.Protocol] = b
		}
		b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	refused := c.refusedRanges(routes)
	var out []capsule.Route
	for protocol, b := range byProtocol {
		b.RemoveSet(refused)
		set, _ := b.IPSet() // the ranges are valid
		for _, part := range set.Ranges() {
			out = append(out, capsule.Route{Start: part.From(), End: part.To(), Protocol: protocol})
		}
	}
	slices.SortFunc(out, func(a, b capsule.Route) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), a.Start.Compare(b.Start))
	})
	return out
}

// refusedRanges returns the addresses that acceptableRoutes leaves out.
func (c *Client) refusedRanges(routes []capsule.Route) *netipx.IPSet {
	var b netipx.IPSetBuilder
	networks := c.hostNetworks()
	if c.cfg.InstallRoutes {
		tunnel, _ := acceptedPrefixes(routes, c.cfg.Accept) // the ranges are valid
		state := routing.State{Routes: tunnel, HostRoutes: c.cfg.HostRoutes,
			Private: c.cfg.AdvertiseRoutes}
		b = localRanges(slices.DeleteFunc(slices.Clone(networks), func(n routing.HostNetwork) bool {
			return !state.HostFirst(n.Address.Masked())
		}), tunnel)
	}
	for _, n := range networks {
		b.Add(n.Address.Addr())
	}
	for _, p := range slices.Concat(c.cfg.AdvertiseRoutes, c.cfg.Exclude) {
		b.AddPrefix(p)
	}
	var others netipx.IPSetBuilder
	others.AddPrefix(everything4)
	others.AddPrefix(everything6)
	for _, p := range c.cfg.Accept {
		others.RemovePrefix(p)
	}
	notAccepted, _ := others.IPSet()
	b.AddSet(notAccepted)
	set, _ := b.IPSet()
	return set
}

// localRanges returns the networks of this host without more specific routes of
// the tunnel, as the kernel selects routes.
func localRanges(networks []routing.HostNetwork, tunnel []netip.Prefix) (b netipx.IPSetBuilder) {
	shorterFirst := slices.SortedFunc(slices.Values(networks), func(x, y routing.HostNetwork) int {
		return cmp.Compare(x.Address.Bits(), y.Address.Bits())
	})
	for _, n := range shorterFirst {
		network := n.Address.Masked()
		b.AddPrefix(network)
		for _, r := range tunnel {
			if r.Bits() > network.Bits() && network.Contains(r.Addr()) {
				b.RemovePrefix(r)
			}
		}
	}
	return b
}
