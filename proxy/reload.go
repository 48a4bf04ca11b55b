package proxy

import "reflect"

// Reload changes the configuration of a Server, which may be running. Sessions
// go on, and lose no packet of what is allowed before and after: they are told
// of their new routes and DNS, and held to what is denied from now on; a flow
// of UDP proxying that leads where clients may not go any more ends, and so
// does the session of a user who is, or is no more, a site's, for its client to
// begin anew. Limits count for new sessions.
//
// It returns the keys of the configuration file whose values differ and need a
// restart; they stay as they were. With an error, which is an *Error of
// KindUsage, all stays as it was. Of c, it does not look at Sockets, TLS,
// Users, StatelessResetKey, Journal, Logger, Resolver and the functions.
func (s *Server) Reload(c Config) (restart []string, err error) {
	if c, err = c.withDefaults(); err != nil {
		return nil, err
	}
	if _, err := c.templates(); err != nil {
		return nil, err
	}
	rights, err := c.siteRights()
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
	s.config.Store(&next)
	s.connLimiter.SetLimits(next.MaxPending, next.MaxPendingPerAddress)
	s.sites.setRights(rights)
	if err := s.SetDNS(c.DNS); err != nil {
		return nil, err
	}
	select {
	case <-s.ready:
	default:
		return restart, nil // what follows is done when it starts to serve
	}
	s.host.reinstall()
	if err := s.host.refresh(); err != nil {
		s.cfg().Logger.Warn("cannot read the host's own addresses", "error", err)
	}
	for _, ss := range s.sessions.list() {
		ss.configChanged(rights[ss.base().user.Name] != nil)
	}
	return restart, nil
}

// needRestart returns the keys of what Reload does not change and next has
// otherwise.
func (c *Config) needRestart(next Config) []string {
	var keys []string
	for _, x := range []struct {
		key     string
		is, was any
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
		if !reflect.DeepEqual(x.is, x.was) {
			keys = append(keys, x.key)
		}
	}
	return keys
}
