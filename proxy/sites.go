package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/routing"
)

// sites decides which networks are behind which session. Capsules of a gateway
// change only the claim of its session. One goroutine calls decide when it is
// ready for the result, which all sessions then follow. So a client that
// changes its claim often costs the others nothing.
type sites struct {
	// unroute removes a network from the forwarding table.
	unroute func(netip.Prefix)

	// changed receives a value after changes that the next decision has to
	// consider.
	changed chan struct{}

	mu sync.Mutex // guards the fields below and all claims

	rights map[owner]*rights

	// commonRoutes is the number of routes that are advertised to all clients.
	commonRoutes int

	lastNumber uint64   // the highest rank or number of a claim
	claims     []*claim // the first takes precedence

	// routed are the networks of sites in the forwarding table.
	routed map[netip.Prefix]*claim

	// all has the networks and leased addresses of all sites and peers, and
	// ours the networks of sites alone.
	all, ours *netipx.IPSet
}

func newSites(unroute func(netip.Prefix), r map[owner]*rights) *sites {
	return &sites{unroute: unroute, rights: r, changed: make(chan struct{}, 1),
		routed: make(map[netip.Prefix]*claim), all: new(netipx.IPSet), ours: new(netipx.IPSet)}
}

// rightsOf returns the rights of an owner, nil for a user without a site.
func (t *sites) rightsOf(o owner) *rights {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rights[o]
}

// setRights replaces the rights of all owners, also of those with sessions.
func (t *sites) setRights(all map[owner]*rights) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rights = all
	for _, c := range t.claims {
		c.rights = all[c.owner]
	}
	t.schedule()
}

// setCommonRoutes sets the number of routes that are advertised to all clients.
// They and the networks of the sites share the limit of routes that a client
// accepts.
func (t *sites) setCommonRoutes(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.commonRoutes = n
}

// add adds c, which succeeds replaced, the claims of the sessions that its
// session replaces.
func (t *sites) add(c *claim, replaced []*claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.rights = t.rights[c.owner]
	t.lastNumber++
	c.rank, c.number = t.lastNumber, t.lastNumber
	for _, other := range t.claims {
		if other.owner == c.owner {
			c.rank = other.rank
		}
	}
	for _, old := range replaced {
		old.successor = c
	}
	t.claims = append(t.claims, c)
	slices.SortFunc(t.claims, func(a, b *claim) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), -cmp.Compare(a.number, b.number))
	})
}

// remove removes c, the claim of a session that has ended. When it returns, the
// forwarding table has no network of the session. The successor of c inherits
// its networks, so that the other sites and the kernel do not notice a client
// that reconnects. Without a successor the networks are free.
func (t *sites) remove(c *claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.claims = slices.DeleteFunc(t.claims, func(other *claim) bool { return other == c })
	heir := c.successor
	if heir != nil && (heir.updated || !slices.Contains(t.claims, heir)) {
		heir = nil
	}
	for p, holder := range t.routed {
		switch {
		case holder != c:
		case heir != nil:
			t.routed[p] = heir
			heir.route(p)
		default:
			delete(t.routed, p)
			t.unroute(p)
		}
	}
	if heir != nil {
		heir.advertised, heir.assigned, heir.granted = c.advertised, c.assigned, c.granted
		heir.loggedGrant, heir.loggedRefusals = c.loggedGrant, c.loggedRefusals
	}
	t.schedule()
}

// schedule makes changed receive a value. t.mu may be held.
func (t *sites) schedule() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// advertise sets the routes that the client of c advertises, the full list.
func (t *sites) advertise(c *claim, routes []capsule.Route) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.advertised, c.updated = routes, true
	t.schedule()
}

// assign sets the addresses that the client of c assigns to the proxy, the full
// list.
func (t *sites) assign(c *claim, addrs []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.assigned = addrs
	t.schedule()
}

// setLeased sets the addresses of the session of c.
func (t *sites) setLeased(c *claim, addrs []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.leased = addrs
	t.schedule()
}

// grantedRoutes returns the parts of routes that c is granted already.
func (t *sites) grantedRoutes(c *claim, routes []capsule.Route) []capsule.Route {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []capsule.Route
	for _, r := range routes[:min(len(routes), maxSiteRanges)] {
		for _, granted := range c.granted.networks.Ranges() {
			if part, ok := intersection(netipx.IPRangeFrom(r.Start, r.End), granted); ok {
				out = append(out, capsule.Route{Start: part.From(), End: part.To(),
					Protocol: r.Protocol})
			}
		}
	}
	return out
}

// grantedAddresses returns the addresses in addrs that c was granted to assign
// to the proxy already.
func (t *sites) grantedAddresses(c *claim, addrs []capsule.Address) []capsule.Address {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(addrs), func(a capsule.Address) bool {
		return !slices.Contains(c.granted.assigned, a.Prefix)
	})
}

// grantOf returns the present grant of c.
func (t *sites) grantOf(c *claim) grant {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.granted
}

// layout is the result of a decision about all sites.
type layout struct {
	networks  []netip.Prefix // networks of all sites
	addresses []netip.Prefix // the proxy's addresses, with the lengths of their networks
	leased    []netip.Prefix // addresses of the sites' sessions
}

// decide grants the claims in their order of precedence, and updates the
// forwarding table. No site gets a part of reserved.
func (t *sites) decide(reserved []reservedNetwork) layout {
	t.mu.Lock()
	var l layout
	var all, ours netipx.IPSetBuilder
	routed := make(map[netip.Prefix]*claim)
	var logs []func()
	room := routing.MaxRoutes - t.commonRoutes
	for i, c := range t.claims {
		c.granted = c.decide(reserved, t.claims[:i], room)
		room -= len(c.granted.prefixes)
		logs = append(logs, c.report()...)
		for _, p := range c.granted.prefixes {
			routed[p] = c
			l.networks = append(l.networks, p)
		}
		for _, a := range c.granted.assigned {
			l.addresses = append(l.addresses, c.onLink(a))
		}
		for _, a := range c.leased {
			l.leased = append(l.leased, a)
			all.AddPrefix(a)
		}
		all.AddSet(c.granted.networks)
		if !c.isPair() {
			ours.AddSet(c.granted.networks)
		}
	}
	t.all, _ = all.IPSet() // the prefixes are valid
	t.ours, _ = ours.IPSet()
	for p, c := range routed {
		if t.routed[p] != c {
			c.route(p)
		}
	}
	for p := range t.routed {
		if routed[p] == nil {
			t.unroute(p)
		}
	}
	t.routed = routed
	t.mu.Unlock()
	for _, log := range logs {
		log()
	}
	return l
}

// routesTo returns the routes to advertise to the client of c: common, which
// are advertised to every client, plus the networks and leased addresses of the
// other sites, limited to the reach of its site and to allowed (nil: no limit).
// Addresses in own, the proxy's, that are in common are advertised in any case.
// A peer is told networks of sites, but neither leased addresses nor networks
// of peers.
func (t *sites) routesTo(c *claim, common []capsule.Route, allowed *netipx.IPSet,
	own []netip.Addr) ([]capsule.Route, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b netipx.IPSetBuilder
	if c.isPair() {
		b.AddSet(t.ours)
	} else {
		b.AddSet(t.all)
	}
	for _, other := range t.claims {
		if other.owner == c.owner && !c.isPair() {
			b.RemoveSet(other.granted.networks)
			for _, a := range other.leased {
				b.RemovePrefix(a)
			}
		}
	}
	var always []netip.Addr
	for _, r := range common {
		addresses := netipx.IPRangeFrom(r.Start, r.End)
		b.AddRange(addresses)
		for _, a := range own {
			if addresses.Contains(a) {
				always = append(always, a)
			}
		}
	}
	if c.rights != nil && c.rights.reach != nil {
		b.Intersect(c.rights.reach)
	}
	if c.rights != nil && c.rights.withheld != nil {
		b.RemoveSet(c.rights.withheld)
	}
	if allowed != nil {
		b.Intersect(allowed)
	}
	for _, a := range always {
		b.Add(a)
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, err
	}
	routes := []capsule.Route{}
	for _, r := range set.Ranges() {
		routes = append(routes, capsule.Route{Start: r.From(), End: r.To()})
	}
	return routes, nil
}
