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

// A proxy that has proved who it is may still be wrong about this host, or mean
// it harm. What it says is compared with what it was asked for, and with what
// this host has: an address that is taken here, or that lies in a network of
// this host, would cut the host off from there, or let the proxy in.

// readNetworks reads the addresses of this host besides those of the tunnel. It
// reports whether they are others than before.
func (c *Client) readNetworks() (changed bool) {
	networks, err := c.cfg.HostNetworks(c.iface())
	if err != nil {
		c.cfg.Logger.Warn("the addresses of this host are not known", "error", err)
		return false
	}
	before := c.networks.Swap(&networks)
	return before == nil || !slices.Equal(*before, networks)
}

// networksChanged reports whether readNetworks would find others than before.
func (c *Client) networksChanged() bool {
	networks, err := c.cfg.HostNetworks(c.iface())
	return err == nil && !slices.Equal(networks, c.hostNetworks())
}

// hostNetworks returns what readNetworks read last.
func (c *Client) hostNetworks() []routing.HostNetwork {
	if n := c.networks.Load(); n != nil {
		return *n
	}
	return nil
}

// isOwn reports whether a is an address of this host, those of the tunnel
// included.
func (c *Client) isOwn(a netip.Addr) bool {
	return slices.ContainsFunc(c.hostNetworks(), func(n routing.HostNetwork) bool {
		return n.Address.Addr() == a
	}) ||
		slices.ContainsFunc(c.installed, func(p netip.Prefix) bool { return connectip.HostAddr(p) == a })
}

// taken returns which of the addresses that the proxy assigned are taken: those
// of a family that was asked for, unless the proxy is to choose, and that this
// host can have.
func (s *session) acceptableAddresses(assigned []capsule.Address) []capsule.Address {
	return slices.DeleteFunc(slices.Clone(assigned), func(a capsule.Address) bool {
		return !a.Refused() && (!s.wantsFamily(a.Prefix) || s.whyUnusable(a.Prefix) != "")
	})
}

// wants reports whether p is of a family that the session asks for.
func (s *session) wantsFamily(p netip.Prefix) bool {
	return !s.requests || slices.ContainsFunc(s.c.cfg.Request, func(w netip.Prefix) bool {
		return w.Addr().Is4() == p.Addr().Is4()
	})
}

// unassignable are addresses, besides the reserved ones, that no host has as
// its own (RFC 6890): of IPv4 in another form, which programs and translators
// take for what they hold, of discard, and of IETF protocols.
var unassignable = parsePrefixes("192.0.0.8/29", "192.0.0.170/31", "::/96", "::ffff:0:0/96",
	"64:ff9b::/96", "64:ff9b:1::/48", "100::/64")

func parsePrefixes(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// unfit says why this host cannot have an address or a prefix that the proxy
// assigned, "" if it can.
func (s *session) whyUnusable(p netip.Prefix) string {
	c := s.c
	if slices.Contains(c.cfg.Static, p) {
		return "" // the file says so
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
		return "is larger than what addresses.request asks for"
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
		if p.Contains(n.Address.Addr()) {
			return fmt.Sprintf("holds %v, an address of %s", n.Address.Addr(), n.Interface)
		}
	}
	if n, overlaps := c.overlap(p); overlaps && !slices.Contains(held, p) {
		return fmt.Sprintf("lies in %v, the network of %s", n.Address.Masked(), n.Interface)
	}
	return ""
}

// overlap returns the network of this host that p has addresses of, if there
// is one.
func (c *Client) overlap(p netip.Prefix) (routing.HostNetwork, bool) {
	networks := c.hostNetworks()
	i := slices.IndexFunc(networks, func(n routing.HostNetwork) bool {
		return n.Address.Masked().Overlaps(p)
	})
	if i < 0 {
		return routing.HostNetwork{}, false
	}
	return networks[i], true
}

// follow makes the policy follow what this host has now.
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

// checkAssigned refuses what the proxy assigned if this host cannot have it.
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

// returnTaken takes the addresses of the tunnel from the kernel that another
// network has given to this host meanwhile, as its packets from there would be
// dropped for the tunnel's sake. The routes of the tunnel stay.
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
		c.cfg.Logger.Warn("an address of the tunnel that is this host's otherwise cannot be taken from the interface", "error", err)
		return
	}
	c.installed = nil
	c.mu.Lock()
	c.lastState = &state
	c.mu.Unlock()
}

// noteOverlap has status and log say when this host has come into a network
// that holds an address of the tunnel. The tunnel goes on: it may be all that
// the host has.
func (c *Client) noteOverlap(addrs []netip.Prefix) {
	text := ""
	for _, p := range addrs {
		if n, overlaps := c.overlap(p); overlaps && !slices.Contains(c.cfg.Static, p) {
			text = fmt.Sprintf("the tunnel's address %v lies in %v, the network of %s: hosts there may not be reached; have one of the two renumbered",
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

// acceptable returns what counts of the advertised routes: the proxy sends from
// there, and is sent what goes there. That is what the configuration accepts,
// without what lies behind this host, goes around the tunnel, or belongs to
// this host: its own addresses, and the networks that it is in, but for what
// longer routes of the tunnel take out of them.
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
	not := c.refusedRanges(routes)
	var out []capsule.Route
	for protocol, b := range byProtocol {
		b.RemoveSet(not)
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

// unacceptable is what acceptable leaves out.
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
	rest, _ := others.IPSet()
	b.AddSet(rest)
	set, _ := b.IPSet()
	return set
}

// localFirst returns the networks of this host without what longer routes of
// the tunnel take out of them, as the kernel decides.
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
