package proxy

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"

	"github.com/quic-go/quic-go/http3"
	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/rescue"
	"masquevpn/internal/worker"
	"masquevpn/tun"
)

// ipSession is a session of IP proxying (RFC 9484), a tunnel.
//
// Its methods are in files by subject: the tunnel itself here, its addresses in
// ipsession_addresses.go, routes and DNS for the client in
// ipsession_announce.go, and the networks behind the client in
// ipsession_site.go.
type ipSession struct {
	sessionBase

	// The fields of this group are set before the session starts.

	scope    connectip.Scope // the requested scope
	scopeSet *netipx.IPSet   // addresses in scope; nil: all
	claim    *claim          // nil: the client is not the gateway of a site

	// queue holds packets for the client, from the device. sender is busy while
	// packets taken from it are sent.
	queue  *flowqueue.Queue
	sender connectip.Busy

	// device receives packets from the client.
	device rateLimitedDevice

	announcer *worker.Worker // runs announce

	// advertised is closed after the client was told its first routes, or could
	// not be told.
	advertised chan struct{}

	// siteRefused is set once it was logged that the client is no gateway. Used
	// only by the goroutine that handles capsules.
	siteRefused bool

	// assigning is held while an ADDRESS_ASSIGN capsule is written, which keeps
	// the lists in order. It is taken before mu. A client that does not read
	// blocks its holder.
	assigning sync.Mutex

	mu sync.Mutex // guards the fields below

	// conn is nil until the request is answered. Sessions in the forwarding
	// table have one.
	conn *connectip.Conn

	addresses []capsule.Address // granted, as assigned to the client

	// assigned is set once the client asked for addresses or was assigned some
	// unprompted, and at the end of the session.
	assigned bool

	announcedRoutes []capsule.Route // nil before the first advertisement
	announcedDNS    DNS
}

func newIPSession() *ipSession {
	ss := &ipSession{queue: flowqueue.New(), advertised: make(chan struct{})}
	ss.announcer = worker.New(ss.guarded(ss.announce))
	return ss
}

// prepare finds the scope of the request and resolves its name.
func (ss *ipSession) prepare(ctx context.Context, path string) *refusal {
	scope, err := ss.shared.templates.match(path)
	if errors.Is(err, errNotServed) {
		return refuse(http.StatusNotFound, "", "%v", err)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "http_request_error", "%v", err)
	}
	set, refused := ss.resolve(ctx, scope)
	ss.scope, ss.scopeSet = scope, set
	if scope.IsZero() && ss.shared.sites.rightsOf(ss.owner()) != nil {
		ss.claim = newClaim(ss.owner(), func(p netip.Prefix) { ss.shared.table.insert(p, ss) })
	}
	return refused
}

// resolve returns the addresses in scope, with its name resolved (RFC 9484
// section 4.6); nil: all. A name stands for the part of its addresses that
// clients may reach. A scope without an address that the client may reach is
// refused.
func (ss *ipSession) resolve(ctx context.Context, scope connectip.Scope) (*netipx.IPSet,
	*refusal) {
	access := ss.shared.access
	var b netipx.IPSetBuilder
	switch {
	case scope.Name != "":
		addrs, refused := ss.shared.names.resolve(ctx, ss.user, scope.Name)
		if refused != nil {
			return nil, refused
		}
		for _, a := range addrs {
			b.Add(a)
		}
		for _, p := range access.deniedNow().clients {
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
	routes, err := access.routes(set, ss.user.allowed(), scope.Protocol, ss.shared.pool.Serves)
	if err != nil || !access.reachesAny(routes) {
		return nil, refuse(http.StatusForbidden, "destination_ip_prohibited",
			"%v: the client may reach no address in it", scope)
	}
	return set, nil
}

// limits returns the limits on the number of tunnels.
func (ss *ipSession) limits() limits {
	return limits{ss.shared.cfg().MaxSessions, ss.maxSessions(), errTooManySessions,
		errTooManyOfUser, "sessions"}
}

// maxSessions returns how many tunnels the user may have.
func (ss *ipSession) maxSessions() int {
	cfg := ss.shared.cfg()
	switch {
	case ss.user.Name == "":
		return cfg.MaxSessions
	case ss.user.Sessions > 0:
		return ss.user.Sessions
	}
	return cfg.MaxSessionsPerUser
}

func (ss *ipSession) kind() string { return KindIP }

// replaces reports whether old is a tunnel of the same client instance: a
// client has one tunnel.
func (ss *ipSession) replaces(old session) bool {
	return ss.instance != "" && ss.instance == old.base().instance && old.kind() == KindIP
}

func (ss *ipSession) discard() { ss.stop(nil) }

func (ss *ipSession) setHeader(http.Header) {}

// serve runs the session in a goroutine of its own, so that the memory of the
// request is freed.
func (ss *ipSession) serve(w http.ResponseWriter, remote string, ended endFunc) {
	if ss.link != nil {
		ss.logPeer(remote)
	} else {
		ss.log.Info("session started", "remote", remote, "scope", ss.scope.String())
	}
	str := w.(http3.HTTPStreamer).HTTPStream()
	go func() { ended(slog.LevelInfo, ss.run(str)) }()
}

// run carries the session on its stream until the stream or ss.ctx ends, and
// releases everything that the session holds.
func (ss *ipSession) run(str connectip.Stream) (err error) {
	defer rescue.Catch(func(e *rescue.Error) {
		err = e
		ss.panicked(e)
	})
	conn := ss.open(str)
	var routines sync.WaitGroup
	defer ss.tearDown(conn, &routines)
	routines.Go(ss.guarded(func() { ss.sendQueued(conn) }))
	routines.Go(ss.guarded(ss.assignUnprompted))
	if err := ss.followSites(); err != nil {
		ss.stop(err)
	}
	ss.announcer.Wake()
	err = conn.Run(ss.ctx)
	ss.stop(err)
	return cmp.Or(context.Cause(ss.ctx), err)
}

// open creates ss.conn on the stream of the session.
func (ss *ipSession) open(str connectip.Stream) *connectip.Conn {
	ss.device.Device, ss.device.ss = ss.shared.device, &ss.sessionBase
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.conn = connectip.New(str, ss.quic, connectip.Config{
		Device: &ss.device,
		Filter: connectip.Filter{Assigned: ss.acceptAddresses, Routes: ss.acceptRoutes},
		Handler: connectip.Handler{Requested: ss.addressesRequested,
			Assigned: ss.addressesAssigned, Routes: ss.routesAdvertised},
		Self:           ss.shared.pool.Gateways(),
		Granted:        ss.leaseReserved(),
		Denied:         ss.shared.access.deniedNow().of(ss.isSite()),
		Withheld:       ss.withheld(),
		PeerIsHost:     ss.claim == nil,
		KernelHopLimit: ss.shared.cfg().KernelHopLimit,
		Stats:          &ss.stats,
		Panicked:       ss.panicked,
		Tap:            ss.shared.cfg().Tap.At(ss.id),
	})
	return ss.conn
}

// tearDown releases everything that the session holds, and waits for its
// goroutines.
func (ss *ipSession) tearDown(conn *connectip.Conn, routines *sync.WaitGroup) {
	ss.stop(nil)
	// The session leaves the forwarding table first, so that no packet for the
	// next holder of an address comes here.
	ss.release()
	ss.queue.Close()
	conn.Drain(func() {
		routines.Wait()
		ss.announcer.Close()
	})
	ss.device.close()
}

// push queues packets for the client and sets their entries to nil. A panic
// ends this session instead of the program.
func (ss *ipSession) push(packets []*flowqueue.Packet) {
	defer rescue.Catch(ss.panicked)
	defer clear(packets)
	ss.stats.Send.DropMany(connectip.DropQueueFull, ss.queue.Push(packets))
}

// sendQueued sends the packets of the queue at the rate of the user, until the
// queue is closed.
func (ss *ipSession) sendQueued(conn *connectip.Conn) {
	var batch [sendBatch]*flowqueue.Packet
	down := &ss.userState.down
	for {
		down.Wait(ss.ctx.Done())
		n, late := ss.queue.Pop(batch[:down.Batch(sendBatch)])
		ss.stats.Send.DropMany(connectip.DropQueueDelay, late)
		if n == 0 {
			return
		}
		bytes := 0
		ss.sender.Begin()
		for _, p := range batch[:n] {
			bytes += p.Size
			conn.Send(p.Bytes(), tun.Headroom)
			p.Free()
		}
		ss.sender.End()
		down.Spend(bytes)
	}
}

// current returns ss.conn, nil before the request is answered.
func (ss *ipSession) current() *connectip.Conn {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.conn
}

// updateDenied applies the destinations that the client may not reach now.
func (ss *ipSession) updateDenied() error {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.conn == nil {
		return nil // open reads them later
	}
	return ss.conn.SetDenied(ss.shared.access.deniedNow().of(ss.isSite()), ss.withheld())
}

// withheld returns the advertised destinations that the user may not reach. For
// a peer they are all destinations that it may not reach.
func (ss *ipSession) withheld() []netip.Prefix {
	if ss.link != nil {
		if r := ss.shared.sites.rightsOf(ss.owner()); r != nil {
			return r.beyond
		}
	}
	return ss.shared.access.withheld(ss.userState.allowed.Load())
}

func (ss *ipSession) configChanged(site bool) {
	if ss.userState.allowed.Load() != nil || ss.link != nil {
		// The destinations withheld from the user depend on the advertised
		// ones.
		if err := ss.updateDenied(); err != nil {
			ss.stop(err)
		}
	}
	if ss.scope.IsZero() && ss.isSite() != site {
		ss.stop(errSite)
	}
	ss.notify()
}

func (ss *ipSession) status() SessionStatus {
	s := ss.baseStatus(KindIP)
	if ss.link != nil {
		s.Kind = KindPeer
	}
	s.Interface = ss.shared.deviceName()
	ss.mu.Lock()
	if ss.conn != nil {
		s.MTU = ss.conn.MTU()
	} else {
		s.State = "connecting"
	}
	s.Addresses = prefixes(ss.addresses)
	s.SetRoutes(ss.announcedRoutes)
	s.SetDNS(ss.announcedDNS.configurations(), ss.announcedDNS.NAT64)
	ss.mu.Unlock()
	if ss.claim != nil {
		s.Networks = append(s.Networks, ss.shared.sites.grantOf(ss.claim).prefixes...)
	}
	return s
}

func (ss *ipSession) addAges(a *connectip.Ages) {
	a.Note(connectip.StageFlowQueue, ss.queue.Oldest())
	a.Note(connectip.StageSender, ss.sender.Age())
	ss.device.addAges(a)
	if conn := ss.current(); conn != nil {
		conn.AddAges(a)
	}
}
