package proxy

import (
	"context"
	"net/http"
	"net/netip"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
)

// builtinDenied are the destinations that no client reaches through a proxy:
// the proxy itself, its links, and cloud metadata services, which trust whoever
// asks from the proxy's address.
var builtinDenied = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("192.0.0.192/32"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
	netip.MustParsePrefix("fd20:ce::254/128"),
	// IPv4 addresses as IPv6 ones (RFC 4291 section 2.5.5), which sockets and
	// tunnels of the host take for those. Others are in embeddings.
	netip.MustParsePrefix("::/96"),
	netip.MustParsePrefix("::ffff:0:0/96"),
}

// reach returns the addresses that a request with the given scope is about, nil
// for all, with its name resolved (RFC 9484 section 4.6). Of a name's addresses
// it has those that clients may reach; a scope of which they reach nothing is
// refused.
func (s *Server) reach(ctx context.Context, user User, scope connectip.Scope) (*netipx.IPSet,
	*refusal) {
	var b netipx.IPSetBuilder
	switch {
	case scope.Name != "":
		addrs, refused := s.resolve(ctx, user, scope.Name)
		if refused != nil {
			return nil, refused
		}
		for _, a := range addrs {
			b.Add(a)
		}
		for _, p := range s.deniedNow().clients {
			b.RemovePrefix(p)
		}
	case scope.Prefix.IsValid():
		b.AddPrefix(scope.Prefix)
	default:
		return nil, nil
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, refuse(http.StatusInternalServerError, "proxy_internal_error", "%v: %v",
			scope, err)
	}
	if routes, err := s.routes(set, user.reach(), scope.Protocol, s.pool.Serves); err != nil ||
		s.allDenied(routes) {
		return nil, refuse(http.StatusForbidden, "destination_ip_prohibited",
			"%v: the client may reach nothing of it", scope)
	}
	return set, nil
}

// routes returns what is advertised to a client whose request is about the
// addresses of reach, nil for all, and one protocol, 0 for all: as far as the
// scope reaches, the proxy's routes, of them only what may has, nil for all,
// and its own addresses. A family without addresses for the client has no use
// for routes; families says which have some.
func (s *Server) routes(reach, may *netipx.IPSet, protocol uint8,
	families func(netip.Addr) bool) ([]capsule.Route, error) {
	var b netipx.IPSetBuilder
	for _, p := range s.cfg().Advertise {
		b.AddPrefix(p)
	}
	if may != nil {
		b.Intersect(may)
	}
	for _, g := range s.pool.Gateways() {
		b.Add(g)
	}
	if reach != nil {
		b.Intersect(reach)
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, err
	}
	routes := []capsule.Route{}
	for _, r := range set.Ranges() {
		if families(r.From()) {
			routes = append(routes, capsule.Route{Start: r.From(), End: r.To(), Protocol: protocol})
		}
	}
	return routes, nil
}

// allDenied reports whether routes lead nowhere that a client may go.
func (s *Server) allDenied(routes []capsule.Route) bool {
	var b netipx.IPSetBuilder
	for _, r := range routes {
		b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	for _, p := range s.deniedNow().clients {
		b.RemovePrefix(p)
	}
	set, err := b.IPSet()
	return err != nil || len(set.Ranges()) == 0
}
