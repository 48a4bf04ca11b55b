package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
	"masquevpn/internal/udpconn"
	"masquevpn/proxy/internal/connlimit"
)

// Run serves until ctx is done. Then it ends the sessions, restores the host
// and returns nil. It may be called once.
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

// listen prepares Config.Sockets, or sockets that listen on Config.Listen.
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
		conn.IgnoreSendErrors()
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
				e.Kind = KindPrivileges
				e.Remedy = "run as root or with the capability CAP_NET_BIND_SERVICE, " +
					"or choose a port above 1023"
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

// serve serves HTTP/3 on the sockets until ctx is done. The device is open.
func (s *Server) serve(ctx context.Context, sockets []*udpconn.Conn) error {
	if err := errors.Join(s.host.readLocal(), s.host.refresh()); err != nil {
		return err
	}
	s.warnOfDNS()
	running, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	server := s.httpServer(running)
	transports := s.transports(sockets)

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
	g.Go(func() error { return s.peers.recheck(gctx) })
	g.Go(func() error {
		s.peerDialer.run(gctx, s.cfg().Peers, &s.cfg().Federation)
		return nil
	})
	g.Go(func() error {
		<-gctx.Done()
		// The sessions end before their connections, so that clients learn the
		// reason and can come back at once.
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

// httpServer returns the HTTP/3 server. Its sessions end when running is done.
func (s *Server) httpServer(running context.Context) *http3.Server {
	return &http3.Server{
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
}

// transports returns a QUIC transport for each socket.
func (s *Server) transports(sockets []*udpconn.Conn) []*quic.Transport {
	unvalidated := rate.NewLimiter(unvalidatedRate, unvalidatedRate)
	var transports []*quic.Transport
	for _, c := range sockets {
		t := &quic.Transport{
			Conn: c, ConnContext: s.connLimiter.Begin,
			VerifySourceAddress: func(net.Addr) bool {
				return !unvalidated.Allow() || s.connLimiter.Crowded()
			},
		}
		if s.cfg().StatelessResetKey != nil {
			t.StatelessResetKey = (*quic.StatelessResetKey)(s.cfg().StatelessResetKey)
		}
		transports = append(transports, t)
	}
	return transports
}
