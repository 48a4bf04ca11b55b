package proxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
)

// builtinDenied are the destinations that no client reaches through a proxy: the proxy itself, its links, and cloud
// metadata services, which trust whoever asks from the proxy's address.
var builtinDenied = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
}

// routesFor returns what is advertised to a client that asked for scope (RFC 9484 section 4.6): the proxy's routes and its
// own addresses, as far as the scope reaches.
func (s *Server) routesFor(_ context.Context, scope connectip.Scope) ([]capsule.Route, *refusal) {
	if !scope.IsZero() {
		return nil, refuse(http.StatusForbidden, "destination_ip_prohibited", "%v: scoped requests are not served", scope)
	}
	advertise := slices.Clone(s.cfg.Advertise)
	for _, g := range s.pool.gatewayAddrs() {
		advertise = append(advertise, netip.PrefixFrom(g, g.BitLen()))
	}
	// A family without addresses has no use for routes.
	advertise = slices.DeleteFunc(advertise, func(p netip.Prefix) bool { return s.pool.family(p.Addr()) == nil })
	return capsule.Routes(advertise, scope.Protocol), nil
}

// refreshDenied works out where packets of clients may not go: the built-in and the configured destinations, the proxy's
// own addresses other than those in the tunnel, and other clients unless they may be reached.
func (s *Server) refreshDenied() error {
	var b netipx.IPSetBuilder
	for _, p := range slices.Concat(builtinDenied, s.cfg.Deny) {
		b.AddPrefix(p)
	}
	local, err := s.cfg.LocalAddrs()
	if err != nil {
		return err
	}
	for _, a := range local {
		b.Add(a)
	}
	for _, p := range s.pool.prefixes() {
		if s.cfg.ClientToClient {
			b.RemovePrefix(p)
		} else {
			b.AddPrefix(p)
		}
	}
	for _, g := range s.pool.gatewayAddrs() {
		b.Remove(g)
	}
	set, err := b.IPSet()
	if err != nil {
		return err
	}
	denied := set.Prefixes()
	s.mu.Lock()
	same := slices.Equal(denied, s.denied)
	s.denied = denied
	s.mu.Unlock()
	if same {
		return nil
	}
	for _, ss := range s.sessions.list() {
		if err := ss.setDenied(denied); err != nil {
			return err
		}
	}
	return nil
}

// interfaceAddrs returns the addresses of this host's interfaces.
func interfaceAddrs() ([]netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if local, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, local.Unmap())
			}
		}
	}
	return out, nil
}

func (s *Server) deniedNow() []netip.Prefix {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.denied
}

// watchLocal follows changes of the host's own addresses until ctx ends.
func (s *Server) watchLocal(ctx context.Context) error {
	tick := time.NewTicker(localInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := s.refreshDenied(); err != nil {
				s.cfg.Logger.Warn("cannot read the host's own addresses", "error", err)
			}
		}
	}
}
