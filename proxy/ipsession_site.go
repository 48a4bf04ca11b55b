package proxy

import (
	"net/netip"

	"masquevpn/capsule"
	"masquevpn/internal/federation"
)

func (ss *ipSession) isSite() bool { return ss.claim != nil }

// added enters the claim of a gateway into the table of sites, where it takes
// over the networks of the sessions that this one replaces.
func (ss *ipSession) added(replaced []session) {
	if ss.claim == nil {
		return
	}
	ss.claim.session, ss.claim.log = ss.id, ss.log
	var old []*claim
	for _, r := range replaced {
		if tunnel, ok := r.(*ipSession); ok && tunnel.claim != nil {
			old = append(old, tunnel.claim)
		}
	}
	ss.shared.sites.add(ss.claim, old)
}

// acceptAddresses returns the addresses in addrs, assigned to the proxy by the
// client, that take effect at once: those that the site was granted already.
func (ss *ipSession) acceptAddresses(addrs []capsule.Address) []capsule.Address {
	if ss.claim == nil {
		return nil
	}
	return ss.shared.sites.grantedAddresses(ss.claim, addrs)
}

// acceptRoutes returns the parts of routes, advertised by the client, that take
// effect at once: those that the site was granted already. Others take effect
// with the next decision about the sites.
func (ss *ipSession) acceptRoutes(routes []capsule.Route) []capsule.Route {
	if ss.claim == nil {
		return nil
	}
	return ss.shared.sites.grantedRoutes(ss.claim, routes)
}

// addressesAssigned notes the addresses that the client assigns to the proxy.
func (ss *ipSession) addressesAssigned(addrs []capsule.Address) error {
	if ss.claim == nil {
		ss.logSiteRefused(len(addrs))
		return nil
	}
	var granted []netip.Prefix
	for _, a := range addrs {
		if !a.Refused() {
			granted = append(granted, a.Prefix)
		}
	}
	ss.shared.sites.assign(ss.claim, granted)
	return nil
}

// routesAdvertised notes the routes that the client advertises.
func (ss *ipSession) routesAdvertised(routes []capsule.Route) error {
	if ss.claim == nil {
		ss.logSiteRefused(len(routes))
		return nil
	}
	ss.shared.sites.advertise(ss.claim, routes)
	return nil
}

// logSiteRefused logs, once for a session, that a client sent entries as if it
// were the gateway of a site.
func (ss *ipSession) logSiteRefused(entries int) {
	if entries == 0 || ss.siteRefused {
		return
	}
	ss.siteRefused = true
	reason := "no [[site]] names this user"
	if !ss.scope.IsZero() {
		reason = "a request with a scope is not that of a gateway"
	}
	ss.log.Warn("networks of the client are refused", "reason", reason)
}

// followSites applies the last decision about the sites to the session: which
// packets it accepts, and which routes it advertises.
func (ss *ipSession) followSites() error {
	conn := ss.current()
	if ss.claim == nil || conn == nil {
		return nil // run calls followSites after it has opened conn
	}
	granted := ss.shared.sites.grantOf(ss.claim)
	if err := conn.SetFiltered(granted.assigned, granted.routes); err != nil {
		return err
	}
	ss.notify()
	return nil
}

// logPeer logs that the session carries a pair now.
func (ss *ipSession) logPeer(remote string) {
	known, _ := ss.shared.peers.connections.proof(ss.link.conn, ss.link.pair)
	policy := federation.Trusted
	if p := ss.shared.peers.of(ss.link.pair); p != nil {
		policy = p.Policy
	}
	ss.log.Info("peer connected", "remote", remote, "domain", ss.link.pair.domain, "local",
		ss.link.pair.local, "identity", known.Identity.String(), "policy", policy.String(),
		"connection", ss.link.conn.id)
}
