package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
	"masquevpn/internal/udpconn"
	"masquevpn/proxy/internal/addrpool"
	"masquevpn/proxy/internal/connlimit"
	"masquevpn/proxy/internal/loglimit"
	"masquevpn/proxy/internal/smallmtu"
)

const (
	idleTimeout      = 30 * time.Second
	handshakeTimeout = 5 * time.Second
	// initialPacketSize is that of the first QUIC packets, in bytes. It leaves
	// room for an IPv6 packet of 1280 bytes in a datagram and fits, with its
	// headers, a path of 1400 bytes.
	initialPacketSize = 1350
	// smallPacketSize is what every path of QUIC carries.
	smallPacketSize = 1200
	// maxStreams is how many requests one connection may have open.
	maxStreams = 64
	// streamWindow and connWindow are how many bytes a client may send on one
	// stream, and on all of a connection, before they are read. Only capsules
	// come on streams, the longest of which fits, and a client that sends them
	// too fast is kept waiting.
	streamWindow = 128 << 10
	connWindow   = 1 << 20
	// pendingWindow is how many bytes of streams a client may have on its way
	// or unread before a request of it is accepted.
	pendingWindow = 16 << 10
	// pendingStreams is how many requests it may have open, in builds that can
	// raise the number later.
	pendingStreams = 10
	// maxUniStreams is how many unidirectional streams a client may have open.
	// HTTP/3 has three.
	maxUniStreams = 8
	// maxHeaderBytes is the most that the header of a request has, in bytes.
	maxHeaderBytes = 16 << 10
	// unvalidatedRate is how many handshakes are begun in a second for
	// addresses that have not proved to be the sender's; what comes above it
	// has to prove that first (Retry, RFC 9000 section 8.1.2).
	unvalidatedRate = 100
)

// Server is a proxy. Make it with New.
type Server struct {
	shared

	sessions  *sessions
	forwarder *forwarder

	connLimiter *connlimit.Limiter
	smallMTU    smallmtu.Hints
	auth        authenticator

	requests requestCounts
	peerLog  *slog.Logger // for events that clients cause

	reloading sync.Mutex // held during Reload

	ready chan struct{} // closed when the proxy accepts clients

	// The fields of this group are set before ready is closed.

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
	rights, err := cfg.siteRights()
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
	s.sites = newSites(s.table, rights)
	s.access = &access{cfg: s.cfg, dns: s.dns.Load, pool: s.pool}
	s.names.cfg = s.cfg
	s.auth.cfg, s.auth.log = s.cfg, s.peerLog
	s.host = newHost(s.cfg, cfg.Logger, s.pool, s.sites, s.sessions, s.access)
	s.forwarder = newForwarder(s.table, s.pool, s.host.supervisor.Device())
	s.host.dispatch = s.forwarder.dispatch
	s.connLimiter = connlimit.New(s.peerLog, cfg.MaxPending, cfg.MaxPendingPerAddress)
	return s, nil
}

// Ready is closed when the proxy accepts clients.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Run serves until ctx ends, then tells the clients, restores the host and
// returns nil. It may be called once.
func (s *Server) Run(ctx context.Context) (err error) {
	if slices.Contains(s.cfg().Methods, MethodNone) {
		s.cfg().Logger.Warn("authentication is off: everybody who reaches this proxy can use it",
			"methods", MethodNone)
	}
	sockets, err := s.listen(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, c := range sockets {
			c.Close()
		}
	}()
	for _, c := range sockets {
		if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
			s.host.ports = append(s.host.ports, a.AddrPort().Port())
		}
	}
	if err := s.host.supervisor.Start(); err != nil {
		return openError(err)
	}
	defer func() { err = errors.Join(err, s.host.supervisor.Close()) }()
	return s.serve(ctx, sockets)
}

// listen opens the UDP sockets, unless they were given.
func (s *Server) listen(ctx context.Context) ([]*udpconn.Conn, error) {
	sockets := s.cfg().Sockets
	if len(sockets) == 0 {
		var err error
		if sockets, err = listenUDP(ctx, s.cfg().Listen); err != nil {
			return nil, err
		}
	}
	dropped := func(packets int) {
		s.forwarder.unrouted.Receive.DropMany(connectip.DropSocketFull, packets)
	}
	var conns []*udpconn.Conn
	for _, c := range sockets {
		conn, err := udpconn.New(c, s.cfg().Logger, dropped)
		if err == nil && s.cfg().TLS.KeyLogWriter != nil {
			err = conn.DisableOffload()
		}
		if err != nil {
			closeAll(sockets)
			return nil, &Error{Kind: KindFailure,
				Reason: fmt.Sprintf("listening on UDP %v: %v", c.LocalAddr(), err), Err: err}
		}
		conn.LoseUnsent()
		conns = append(conns, conn)
	}
	return conns, nil
}

func listenUDP(ctx context.Context, addrs []string) ([]*net.UDPConn, error) {
	var sockets []*net.UDPConn
	for _, addr := range addrs {
		var lc net.ListenConfig
		c, err := lc.ListenPacket(ctx, "udp", addr)
		if err != nil {
			closeAll(sockets)
			e := &Error{Kind: KindFailure,
				Reason: fmt.Sprintf("listening on UDP %s: %v", addr, err), Err: err}
			if errors.Is(err, os.ErrPermission) {
				e.Kind, e.Remedy = KindPrivileges,
					"run as root or with the capability CAP_NET_BIND_SERVICE, or choose a port above 1023"
			}
			return nil, e
		}
		sockets = append(sockets, c.(*net.UDPConn))
	}
	return sockets, nil
}

func closeAll(sockets []*net.UDPConn) {
	for _, c := range sockets {
		c.Close()
	}
}

// connKey is the key of the *quic.Conn in the context of a request.
type connKey struct{}

func (s *Server) serve(ctx context.Context, sockets []*udpconn.Conn) error {
	if err := errors.Join(s.host.readLocal(), s.host.refresh()); err != nil {
		return err
	}
	s.warnOfDNS()
	running, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	server := &http3.Server{
		Handler:         handler{s, running},
		EnableDatagrams: true,
		MaxHeaderBytes:  maxHeaderBytes,
		ConnContext: func(ctx context.Context, c *quic.Conn) context.Context {
			s.auth.watchHandshake(c)
			s.connLimiter.Attach(connlimit.FromContext(ctx), c)
			return context.WithValue(context.WithValue(ctx, connKey{}, c), authTurnKey{},
				make(chan struct{}, 1))
		},
	}
	handshakes := rate.NewLimiter(unvalidatedRate, unvalidatedRate)
	var transports []*quic.Transport
	for _, c := range sockets {
		t := &quic.Transport{
			Conn: c, ConnContext: s.connLimiter.Begin,
			VerifySourceAddress: func(net.Addr) bool {
				return !handshakes.Allow() || s.connLimiter.Crowded()
			},
		}
		if s.cfg().StatelessResetKey != nil {
			t.StatelessResetKey = (*quic.StatelessResetKey)(s.cfg().StatelessResetKey)
		}
		transports = append(transports, t)
	}

	g, gctx := errgroup.WithContext(ctx)
	for _, t := range transports {
		ln, err := t.ListenEarly(http3.ConfigureTLSConfig(s.tlsConfig()), s.quicConfig())
		if err != nil {
			return &Error{Kind: KindFailure,
				Reason: fmt.Sprintf("listening on UDP %s: %v", t.Conn.LocalAddr(), err), Err: err}
		}
		g.Go(func() error {
			if err := server.ServeListener(ln); gctx.Err() == nil {
				return fmt.Errorf("serving HTTP/3 on %s: %w", t.Conn.LocalAddr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		s.host.supervisor.Run(gctx)
		return nil
	})
	g.Go(func() error { return s.host.maintain(gctx) })
	g.Go(func() error { return s.endExpired(gctx) })
	g.Go(func() error {
		<-gctx.Done()
		// Sessions end in good order, and their connections with them: clients
		// are told and can come back at once.
		stop(errShutdown)
		for _, ss := range s.sessions.list() {
			<-ss.base().done
		}
		err := server.Close()
		for _, t := range transports {
			err = errors.Join(err, t.Close())
		}
		return errors.Join(err, s.host.supervisor.Close())
	})
	s.started = time.Now()
	for _, c := range sockets {
		s.addrs = append(s.addrs, c.LocalAddr())
		s.cfg().Logger.Info("listening", "address", c.LocalAddr().String(), "template",
			s.templates[0].String())
	}
	close(s.ready)
	return g.Wait()
}

// quicConfig is what connections begin with.
func (s *Server) quicConfig() *quic.Config {
	wide := &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: handshakeTimeout,
		MaxIdleTimeout:       idleTimeout,
		MaxIncomingStreams:   maxStreams,

		MaxIncomingUniStreams: maxUniStreams,
		InitialPacketSize:     initialPacketSize,
		Tracer:                s.cfg().Tracer,

		InitialStreamReceiveWindow:     streamWindow,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: pendingWindow,
		MaxConnectionReceiveWindow:     connWindow,
		AllowConnectionWindowIncrease: func(c *quic.Conn, _ uint64) bool {
			return connlimit.FromContext(c.Context()).Admitted()
		},
	}
	awaitAdmission(wide)
	s.cfg().Congestion.Apply(wide)
	small := wide.Clone()
	small.InitialPacketSize = smallPacketSize
	wide.GetConfigForClient = func(info *quic.ClientInfo) (*quic.Config, error) {
		if s.smallMTU.Begin(info.RemoteAddr, time.Now()) {
			return small, nil
		}
		return wide, nil
	}
	return wide
}

// tlsConfig asks for client certificates as the methods need them.
func (s *Server) tlsConfig() *tls.Config {
	c := s.cfg().TLS.Clone()
	c.MinVersion = tls.VersionTLS13
	switch {
	case !slices.Contains(s.cfg().Methods, MethodMTLS):
		c.ClientAuth = tls.NoClientCert
	case len(s.cfg().Methods) > 1:
		c.ClientAuth = tls.VerifyClientCertIfGiven
	default:
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c
}

// Addrs returns the UDP addresses that the proxy listens on, once Ready is
// closed.
func (s *Server) Addrs() []net.Addr { return s.addrs }

// listening is where the proxy listens: what was configured, or the addresses
// of the sockets that it was given.
func (s *Server) listening() []string {
	if len(s.cfg().Sockets) == 0 {
		return s.cfg().Listen
	}
	var list []string
	for _, a := range s.addrs {
		list = append(list, a.String())
	}
	return list
}

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
	ss.base().stop(errKicked)
	<-ss.base().done
	return true
}

// SessionEnds returns a channel that is closed when the session with the given
// ID has ended, and whether there is one.
func (s *Server) SessionEnds(id string) (<-chan struct{}, bool) {
	ss := s.sessions.find(id)
	if ss == nil {
		return nil, false
	}
	return ss.base().done, true
}

// Status describes the proxy as a whole.
type Status struct {
	Schema int       `json:"schema"`
	Name   string    `json:"name"`
	Since  time.Time `json:"since"`
	// running, or degraded: the host does not keep what clients need
	State string `json:"state"`
	// what the operator should know, one sentence each
	Warnings  []string          `json:"warnings,omitempty"`
	Listen    []string          `json:"listen"`
	Template  string            `json:"template"`
	Interface string            `json:"interface"`
	Sessions  int               `json:"sessions"`  // tunnels
	UDPFlows  int               `json:"udp_flows"` // flows for UDP proxying
	Leased    map[string]int    `json:"leased"`    // addresses and blocks by family
	Packets   connectip.Counts  `json:"packets"`
	Bytes     connectip.Counts  `json:"bytes"`
	Drops     map[string]uint64 `json:"drops"`
	Requests  map[string]uint64 `json:"requests"` // key: outcome
	ICMPSent  uint64            `json:"icmp_sent"`
	// AuthFailures are how often credentials were refused, by method, and under
	// "missing" how often there were none.
	AuthFailures map[string]uint64 `json:"auth_failures"`
	// KernelRepairs are how often the proxy put right what other programs
	// changed on its host, by what it was.
	KernelRepairs map[string]uint64 `json:"kernel_repairs,omitempty"`
	// OldestPacket is the age of the oldest packet in each stage of its way,
	// milliseconds.
	OldestPacket map[string]int64 `json:"oldest_packet_ms"`
	Panics       uint64           `json:"panics"` // that ended a session or a request
}

// The states of a Status.
const (
	StateRunning  = "running"
	StateDegraded = "degraded"
)

// Status describes the proxy; it is meaningful once Ready is closed.
func (s *Server) Status() Status {
	c := s.Counters()
	var st connectip.Status
	st.SetTraffic(&c.Stats)
	requests := make(map[string]uint64)
	for _, r := range c.Requests {
		if r.Count == 0 {
			continue
		}
		requests[strconv.Itoa(r.Status)] += r.Count
	}
	v4, v6 := s.pool.Leased()
	status := Status{
		Schema: connectip.StatusSchema, Name: s.cfg().Name, State: StateRunning, Since: s.started,
		Listen:   s.listening(),
		Template: s.templates[0].String(), Interface: s.host.name(),
		Sessions: c.Sessions,
		UDPFlows: c.UDPFlows,
		Leased:   map[string]int{"ipv4": v4, "ipv6": v6},
		Packets:  st.Packets, Bytes: st.Bytes, Drops: st.Drops,
		Requests: requests, ICMPSent: c.Stats.ICMPSent.Total(), AuthFailures: c.AuthFailures,
		KernelRepairs: c.KernelRepairs,
		OldestPacket:  c.Oldest.Milliseconds(), Panics: c.Panics,
	}
	if problem := s.Problem(); problem != "" {
		status.State, status.Warnings = StateDegraded, []string{problem}
	}
	return status
}

// Problem says which state of this host is not as clients need it, and what to
// do about it. It returns "" if there is no problem.
func (s *Server) Problem() string { return s.host.healthNow().Problem }
