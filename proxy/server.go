package proxy

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"masquevpn/proxy/internal/addrpool"
	"masquevpn/proxy/internal/connlimit"
	"masquevpn/proxy/internal/loglimit"
	"masquevpn/proxy/internal/smallmtu"
)

// Server is a proxy. Make it with New. Its methods may be called concurrently.
type Server struct {
	shared

	sessions  *sessions
	host      *host
	forwarder *forwarder

	connLimiter *connlimit.Limiter
	smallMTU    smallmtu.Hints
	peerDialer  *peerDialer
	auth        authenticator

	requests requestCounts
	peerLog  *slog.Logger // for events that clients cause

	reloading sync.Mutex // held during Reload

	ready chan struct{} // closed when clients can connect

	// The fields below are set before ready is closed.

	started time.Time
	addrs   []net.Addr // local addresses of the UDP sockets
}

// New checks cfg and creates a Server. It opens nothing.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	served, err := cfg.templates()
	if err != nil {
		return nil, err
	}
	rights, err := cfg.rights()
	if err != nil {
		return nil, err
	}
	var reserved func(netip.Prefix, string) bool
	if cfg.Users != nil {
		reserved = cfg.Users.Reserved
	}
	s := &Server{
		sessions: newSessions(),
		ready:    make(chan struct{}),
		peerLog:  loglimit.New(cfg.Logger),
		requests: newRequestCounts(),
	}
	s.config.Store(&cfg)
	s.dns.Store(&cfg.DNS)
	s.templates = served
	s.pool = addrpool.New(addrpool.Config{
		Spaces: []addrpool.Space{{Prefix: cfg.Pool4, Delegate: cfg.Delegate4},
			{Prefix: cfg.Pool6, Delegate: cfg.Delegate6}},
		Quarantine: cfg.Hold,
		Reserved:   reserved,
	})
	s.table = newTable()
	s.sites = newSites(s.table.remove, rights)
	s.access = &access{cfg: s.cfg, dns: s.dns.Load, pool: s.pool}
	s.names.cfg = s.cfg
	s.peers = &peers{cfg: s.cfg, log: s.peerLog}
	s.peers.set(&cfg)
	s.peerDialer = s.dialPeers()
	s.auth.cfg, s.auth.log = s.cfg, s.peerLog
	s.host = newHost(s.cfg, cfg.Logger, s.pool, s.sites, s.sessions, s.access)
	s.device, s.deviceName = s.host.supervisor.Device(), s.host.name
	s.forwarder = newForwarder(s.table, s.pool, s.device)
	s.host.dispatch = s.forwarder.dispatch
	s.connLimiter = connlimit.New(s.peerLog, cfg.MaxPending, cfg.MaxPendingPerAddress)
	return s, nil
}

// Ready returns a channel that is closed when clients can connect.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Addrs returns the UDP addresses that the proxy listens on. It must not be
// called before Ready is closed.
func (s *Server) Addrs() []net.Addr { return s.addrs }

// Sessions describes the running sessions, oldest first.
func (s *Server) Sessions() []SessionStatus {
	list := s.sessions.list()
	out := make([]SessionStatus, len(list))
	for i, ss := range list {
		out[i] = ss.status()
	}
	return out
}

// Kick ends the session with the given ID and reports whether there was one.
func (s *Server) Kick(id string) bool {
	ss := s.sessions.find(id)
	if ss == nil {
		return false
	}
	if tunnel, ok := ss.(*ipSession); ok && tunnel.link != nil {
		s.peers.revoke(tunnel, errPeerKicked)
	} else {
		ss.base().stop(errKicked)
	}
	<-ss.base().done
	return true
}

// SessionEnds returns a channel that is closed when the session with the given
// ID ends, and whether there is such a session.
func (s *Server) SessionEnds(id string) (<-chan struct{}, bool) {
	ss := s.sessions.find(id)
	if ss == nil {
		return nil, false
	}
	return ss.base().done, true
}
