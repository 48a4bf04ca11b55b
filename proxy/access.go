package proxy

import (
	"net/netip"
	"slices"
	"sync"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/special"
	"masquevpn/proxy/internal/addrpool"
)

// access decides which destinations clients may reach and which routes they are
// told. Its methods may be called concurrently.
//
// A limit called allowed is the set of addresses that one user may reach; nil
// means no limit.
type access struct {
	cfg  func() *Config
	dns  func() *DNS
	pool *addrpool.Pool

	mu     sync.Mutex
	denied denied // guarded by mu
}

// denied are the destinations that clients may not reach: clients that are the
// gateway of a site, and other clients.
type denied struct{ clients, sites []netip.Prefix }

// of returns the destinations that a client may not reach, whoever its user is.
// site reports whether the client is the gateway of a site.
func (d denied) of(site bool) []netip.Prefix {
	if site {
		return d.sites
	}
	return d.clients
}

// deniedNow returns the destinations that clients may not reach now.
func (a *access) deniedNow() denied {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.denied
}

// update changes the denied destinations for a host with the addresses local,
// and for the sites in l. It returns the destinations denied before and now.
//
// Denied are the built-in and the configured destinations, the proxy's own
// addresses outside the tunnel, and other clients and sites unless
// Config.ClientToClient is set. Sites reach each other in any case.
func (a *access) update(local []netip.Prefix, l layout) (before, now denied, err error) {
	var b netipx.IPSetBuilder
	for _, p := range special.Local() {
		b.AddPrefix(p)
	}
	for _, p := range l.networks {
		b.RemovePrefix(p)
	}
	for _, p := range slices.Concat(local, l.addresses) {
		b.Add(p.Addr())
	}
	cfg := a.cfg()
	for _, p := range a.pool.Prefixes() {
		if cfg.ClientToClient {
			b.RemovePrefix(p)
		} else {
			b.AddPrefix(p)
		}
	}
	for _, g := range a.pool.Gateways() {
		b.Remove(g)
	}
	forClients, forSites := b.Clone(), &b
	if !cfg.ClientToClient {
		for _, p := range l.networks {
			forClients.AddPrefix(p)
		}
	}
	for _, p := range l.leased {
		forSites.RemovePrefix(p)
	}
	for _, p := range cfg.Deny { // last, because nothing may remove them
		forClients.AddPrefix(p)
		forSites.AddPrefix(p)
	}
	for _, b := range []*netipx.IPSetBuilder{forClients, forSites} {
		if err := addEmbedded(b, a.dns().NAT64); err != nil {
			return before, now, err
		}
	}
	clients, err := forClients.IPSet()
	if err != nil {
		return before, now, err
	}
	sites, err := forSites.IPSet()
	if err != nil {
		return before, now, err
	}
	now = denied{clients.Prefixes(), sites.Prefixes()}
	a.mu.Lock()
	defer a.mu.Unlock()
	before, a.denied = a.denied, now
	return before, now, nil
}

// routes returns the routes to advertise: Config.Advertise limited to allowed,
// plus the proxy's own addresses, limited to scope (nil: no limit). They are
// for protocol (0: all), and of the families that serves reports.
func (a *access) routes(scope, allowed *netipx.IPSet, protocol uint8,
	serves func(netip.Addr) bool) ([]capsule.Route, error) {
	var b netipx.IPSetBuilder
	for _, p := range a.cfg().Advertise {
		b.AddPrefix(p)
	}
	if allowed != nil {
		b.Intersect(allowed)
	}
	for _, g := range a.pool.Gateways() {
		b.Add(g)
	}
	if scope != nil {
		b.Intersect(scope)
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, err
	}
	routes := []capsule.Route{}
	for _, r := range set.Ranges() {
		if serves(r.From()) {
			routes = append(routes, capsule.Route{Start: r.From(), End: r.To(), Protocol: protocol})
		}
	}
	return routes, nil
}

// withheld returns the advertised destinations that are not in allowed.
func (a *access) withheld(allowed *netipx.IPSet) []netip.Prefix {
	if allowed == nil {
		return nil
	}
	var b netipx.IPSetBuilder
	for _, p := range a.cfg().Advertise {
		b.AddPrefix(p)
	}
	b.RemoveSet(allowed)
	set, _ := b.IPSet() // the prefixes are valid
	return set.Prefixes()
}

// reachesAny reports whether a client may reach an address in routes.
func (a *access) reachesAny(routes []capsule.Route) bool {
	var b netipx.IPSetBuilder
	for _, r := range routes {
		b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	for _, p := range a.deniedNow().clients {
		b.RemovePrefix(p)
	}
	set, err := b.IPSet()
	return err == nil && len(set.Ranges()) > 0
}

// reachesByUDP reports whether the proxy sends UDP packets to dst for its
// clients: to the destinations of their tunnels, except for multicast and the
// proxy's own addresses. Those packets have the proxy's source address, which
// some hosts trust more than a client's (RFC 9298 section 7).
func (a *access) reachesByUDP(dst netip.Addr, allowed *netipx.IPSet) bool {
	contains := func(p netip.Prefix) bool { return p.Contains(dst) }
	return slices.ContainsFunc(a.cfg().Advertise, contains) &&
		!slices.ContainsFunc(a.deniedNow().clients, contains) &&
		!slices.Contains(a.pool.Gateways(), dst) && !dst.IsMulticast() &&
		(allowed == nil || allowed.Contains(dst))
}
