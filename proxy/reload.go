package proxy

import "reflect"

// Reload applies c to a Server, which may be running. Sessions continue and
// lose no packets that are allowed before and after. Their clients get new
// routes and DNS settings. A UDP flow ends if its target is denied now, and the
// session of a user who becomes or ceases to be a site ends, so that its client
// connects again. The session of a peer ends if its [[peer]] is gone or asks
// for another identity. Limits apply to new sessions.
//
// Reload returns the configuration keys whose values in c differ and need a
// restart. It ignores Sockets, TLS, Users, StatelessResetKey, Journal, Logger,
// Resolver and the functions. If c is invalid, the error is an *Error of
// KindUsage, and the configuration stays as it was.
func (s *Server) Reload(c Config) (restart []string, err error) {
	if c, err = c.withDefaults(); err != nil {
		return nil, err
	}
	if _, err := c.templates(); err != nil {
		return nil, err
	}
	rights, err := c.rights()
	if err != nil {
		return nil, err
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	next := *s.cfg()
	restart = next.needRestart(c)
	next.Advertise, next.Deny, next.ClientToClient = c.Advertise, c.Deny, c.ClientToClient
	next.MaxSessions, next.MaxSessionsPerUser, next.MaxAddressesPerUser = c.MaxSessions,
		c.MaxSessionsPerUser, c.MaxAddressesPerUser
	next.MaxPending, next.MaxPendingPerAddress = c.MaxPending, c.MaxPendingPerAddress
	next.MaxUDPFlows, next.MaxUDPFlowsPerUser = c.MaxUDPFlows, c.MaxUDPFlowsPerUser
	next.ConnectUDP, next.Sites = c.ConnectUDP, c.Sites
	next.Federation, next.Peers = c.Federation, c.Peers
	former := s.peers.formerly()
	s.config.Store(&next)
	s.peers.set(&next)
	s.connLimiter.SetLimits(next.MaxPending, next.MaxPendingPerAddress)
	s.sites.setRights(rights)
	if err := s.SetDNS(c.DNS); err != nil {
		return nil, err
	}
	select {
	case <-s.ready:
	default:
		return restart, nil // Run does the rest
	}
	s.host.reinstall()
	if err := s.host.refresh(); err != nil {
		s.cfg().Logger.Warn("cannot read the host's own addresses", "error", err)
	}
	s.peers.reloaded(former)
	s.peerDialer.setPeers(next.Peers, &next.Federation)
	for _, ss := range s.sessions.list() {
		ss.configChanged(rights[ss.base().owner()] != nil)
	}
	return restart, nil
}

// needRestart returns the keys whose values differ in next and that Reload
// cannot change.
func (c *Config) needRestart(next Config) []string {
	var keys []string
	for _, x := range []struct {
		key            string
		value, current any
	}{
		{"name", next.Name, c.Name},
		{"listen", next.Listen, c.Listen},
		{"template", next.Template, c.Template},
		{"auth.methods", next.Methods, c.Methods},
		{"tun.name", next.TUN.Name, c.TUN.Name},
		{"tun.mtu", next.TUN.MTU, c.TUN.MTU},
		{"tun.offload", next.TUN.Offload, c.TUN.Offload},
		{"tunnel.congestion", next.Congestion, c.Congestion},
		{"pool.ipv4", next.Pool4, c.Pool4},
		{"pool.ipv6", next.Pool6, c.Pool6},
		{"pool.delegate_ipv4", next.Delegate4, c.Delegate4},
		{"pool.delegate_ipv6", next.Delegate6, c.Delegate6},
		{"pool.hold", next.Hold, c.Hold},
		{"nat.masquerade", next.Masquerade, c.Masquerade},
		{"forwarding.hop_limit", next.KernelHopLimit, c.KernelHopLimit},
	} {
		if !reflect.DeepEqual(x.value, x.current) {
			keys = append(keys, x.key)
		}
	}
	return keys
}
