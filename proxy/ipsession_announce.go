package proxy

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"masquevpn/capsule"
	"masquevpn/routing"
)

// notify schedules a run of announce. It never blocks.
func (ss *ipSession) notify() { ss.announcer.Wake() }

// announce tells the client its routes and then its DNS configuration, so that
// the route to a DNS server exists before the first query. A client that does
// not read blocks only this goroutine.
func (ss *ipSession) announce() {
	if ss.current() == nil {
		return // run schedules it once there is a conn
	}
	err := ss.advertise()
	select {
	case <-ss.advertised:
	default:
		close(ss.advertised)
	}
	if err == nil {
		err = ss.assignDNS()
	}
	if err != nil {
		ss.stop(err)
	}
}

// advertise tells the client its routes if they changed. It is not called
// concurrently.
func (ss *ipSession) advertise() error {
	routes, changed, err := ss.newRoutes()
	if err != nil || !changed {
		return err
	}
	return ss.conn.Advertise(routes)
}

// newRoutes returns the routes of the client and stores them in
// ss.announcedRoutes. changed reports whether they differ from the routes there
// before.
func (ss *ipSession) newRoutes() (routes []capsule.Route, changed bool, err error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	allowed, own := ss.userState.allowed.Load(), ss.shared.pool.Gateways()
	if ss.link != nil { // a peer reaches networks only
		routes, own = capsule.Routes(setOf(ss.shared.cfg().Advertise).Prefixes(), 0), nil
	} else {
		routes, err = ss.shared.access.routes(ss.scopeSet, allowed, ss.scope.Protocol, ss.uses)
	}
	if err == nil && ss.claim != nil {
		routes, err = ss.shared.sites.routesTo(ss.claim, routes, allowed, own)
	}
	if err == nil && len(routes) > routing.MaxRoutes {
		err = fmt.Errorf("%d ranges are too many to advertise, clients accept %d; "+
			"shorten the lists of the user or of the sites", len(routes), routing.MaxRoutes)
	}
	changed = ss.announcedRoutes == nil || !slices.Equal(routes, ss.announcedRoutes)
	if err == nil {
		ss.announcedRoutes = routes
	}
	return routes, changed, err
}

// uses reports whether the client has, or may still get, addresses or networks
// of a's family. ss.mu is held.
func (ss *ipSession) uses(a netip.Addr) bool {
	if !ss.assigned {
		return ss.shared.pool.Serves(a)
	}
	has := prefixes(ss.addresses)
	if ss.claim != nil {
		has = append(has, ss.shared.sites.grantOf(ss.claim).prefixes...)
	}
	return slices.ContainsFunc(has, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() })
}

// dns returns the DNS configuration for this client: the proxy's, limited to
// addresses in the scope of the request, that the user may reach, and of
// families that the client has addresses of. ss.mu is held.
func (ss *ipSession) dns() DNS {
	d, allowed := *ss.shared.dns.Load(), ss.userState.allowed.Load()
	const udp = 17
	if ss.link != nil {
		return DNS{} // the names of a peer's hosts are its own
	}
	if ss.scope.Protocol != 0 && ss.scope.Protocol != udp {
		return DNS{}
	}
	d.Servers = slices.DeleteFunc(slices.Clone(d.Servers), func(a netip.Addr) bool {
		return ss.scopeSet != nil && !ss.scopeSet.Contains(a) || !ss.uses(a) ||
			allowed != nil && !allowed.Contains(a) &&
				!slices.Contains(ss.shared.pool.Gateways(), a)
	})
	if len(d.Servers) == 0 {
		d.Domains, d.Search = nil, nil
	}
	d.NAT64 = slices.DeleteFunc(slices.Clone(d.NAT64), func(p netip.Prefix) bool {
		return ss.scopeSet != nil && !ss.scopeSet.ContainsPrefix(p) || !ss.uses(p.Addr()) ||
			allowed != nil && !allowed.ContainsPrefix(p)
	})
	return d
}

// assignDNS tells the client the parts of its DNS configuration that changed.
func (ss *ipSession) assignDNS() error {
	ss.mu.Lock()
	before := ss.announcedDNS
	ss.announcedDNS = ss.dns()
	now := ss.announcedDNS
	ss.mu.Unlock()
	if c := now.configurations(); !reflect.DeepEqual(c, before.configurations()) {
		if err := ss.conn.AssignDNS(c); err != nil {
			return err
		}
	}
	if slices.Equal(now.NAT64, before.NAT64) {
		return nil
	}
	return ss.conn.SendPREF64(now.NAT64)
}
