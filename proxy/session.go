package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/rescue"
	"masquevpn/internal/worker"
	"masquevpn/routing"
	"masquevpn/tun"
)

const (
	// maxAddresses is how many leases one session may hold, of both families
	// together.
	maxAddresses = 8
	// maxBlocks is how many of them may be blocks, of each family.
	maxBlocks = 1
	// unpromptedDelay is how long a client has to ask for addresses before it
	// is assigned some unprompted. Clients that wait for that give up after 5
	// seconds.
	unpromptedDelay = 500 * time.Millisecond
)

// session is one accepted request.
type session struct {
	server *Server
	id     string
	user   User   // as it was let in
	method string // authentication method
	// userState is shared by the sessions of the user and set when the session
	// is added to the running ones; follows is its reach as the session has it.
	userState *userState
	follows   *netipx.IPSet
	// instance tells the runs of a client program apart: a session replaces an
	// older one of the same instance, which is how a client whose path broke
	// gets its addresses back before the proxy has noticed. "" when the client
	// sends none.
	instance string
	// installation tells the devices of a user apart, over restarts of their
	// programs; "" when the client does not say.
	installation string
	scope        connectip.Scope
	reach        *netipx.IPSet // the addresses of scope, nil for all
	claim        *claim        // the site that the client is the gateway of; nil: none
	since        time.Time
	quic         *quic.Conn
	connection   *connection // the same, as Server.connections has it
	queue        *flowqueue.Queue
	sender       connectip.Busy // packets taken from queue
	uplink       uplink
	// nil for IP proxying; else all that is about addresses and packets of the
	// device is unused
	udp   *udpFlow
	stats connectip.Stats
	log   *slog.Logger
	ctx   context.Context // ends when the session has to
	stop  context.CancelCauseFunc
	// closed when everything it held is given back and it is not among the
	// running ones
	done chan struct{}

	announcer *worker.Worker // woken when what the client was told may have changed
	// closed when the client was told its routes for the first time, or cannot
	// be
	advertised chan struct{}
	saidNoSite bool // used by the goroutine that handles capsules

	// orders lists of addresses on the wire; taken before mu, which is not held
	// while the client does not read
	assigning sync.Mutex

	mu        sync.Mutex
	conn      *connectip.Conn   // nil until the request is answered
	addresses []capsule.Address // granted, as assigned to the client
	// the client asked for addresses, or was assigned some unprompted, or the
	// session has ended
	assigned bool
	routes   []capsule.Route // as advertised; nil before the first time
	told     DNS             // as the client was told
}

// The causes for which the proxy ends a session.
var (
	errKicked     = errors.New("ended by the operator")
	errProhibited = errors.New("clients may not reach its target any more")
	errRenewed    = errors.New("the user has other credentials now")
	errReplaced   = errors.New("replaced by a newer session of the same client")
	errSite       = errors.New("its user has become a site's, or is no more")
	errRevoked    = errors.New("the user was removed")
	errShutdown   = errors.New("the proxy is stopping")
)

// run carries the session on its stream until that or ss.ctx ends, and gives
// back all that it held. The header of the answer was written.
func (ss *session) run(str *http3.Stream) (err error) {
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

// open makes the session's Conn on its stream.
func (ss *session) open(str *http3.Stream) *connectip.Conn {
	ss.uplink.Device, ss.uplink.ss = currentDevice{ss.server}, ss
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.conn = connectip.New(str, ss.quic, connectip.Config{
		Device: &ss.uplink,
		Filter: connectip.Filter{Assigned: ss.acceptAddresses, Routes: ss.acceptRoutes},
		Handler: connectip.Handler{Requested: ss.addressesRequested,
			Assigned: ss.addressesAssigned, Routes: ss.routesAdvertised},
		Self:           ss.server.pool.gatewayAddrs(),
		Granted:        ss.leaseReserved(),
		Denied:         ss.server.deniedNow().of(ss),
		Withheld:       ss.withheld(),
		PeerIsHost:     ss.claim == nil,
		KernelHopLimit: ss.server.cfg().KernelHopLimit,
		Stats:          &ss.stats,
		Panicked:       ss.panicked,
		Tap:            ss.server.cfg().Tap.At(ss.id),
	})
	return ss.conn
}

// tearDown gives back all that the session held, and waits for its goroutines.
func (ss *session) tearDown(conn *connectip.Conn, routines *sync.WaitGroup) {
	ss.stop(nil)
	// The session leaves the table first, so that no packet for the next holder
	// of an address comes here.
	ss.release()
	ss.queue.Close()
	conn.Drain(func() {
		routines.Wait()
		ss.announcer.Close()
	})
	ss.uplink.close()
}

// panicked ends the session because one of the goroutines that serve it
// panicked. It is called while nothing is locked.
func (ss *session) panicked(e *rescue.Error) {
	ss.server.cfg().Logger.Error("a fault of this program ended a session; please report it with this line",
		"session", ss.id, "user", ss.user.Name, "panic", fmt.Sprint(e.Value), "stack",
		string(e.Stack))
	ss.stop(e)
}

// guarded returns f as the session's goroutines run it: a panic ends the
// session alone.
func (ss *session) guarded(f func()) func() {
	return func() {
		defer rescue.Catch(ss.panicked)
		f()
	}
}

// sendQueued sends what the device handed over for this session, until its
// queue is closed.
func (ss *session) sendQueued(conn *connectip.Conn) {
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

// addressesRequested assigns the client its full list of addresses (RFC 9484
// section 4.7.2). A client that does not read holds up this alone: ss.mu is not
// held.
func (ss *session) addressesRequested(requested []capsule.Address) error {
	select {
	case <-ss.advertised:
	case <-ss.ctx.Done():
		return context.Cause(ss.ctx)
	}
	ss.assigning.Lock()
	defer ss.assigning.Unlock()
	if err := ss.conn.Assign(ss.answer(requested)); err != nil {
		return err
	}
	ss.refresh()
	return nil
}

// acceptAddresses returns what counts of the addresses that the client assigns
// to the proxy.
func (ss *session) acceptAddresses(addrs []capsule.Address) []capsule.Address {
	if ss.claim == nil {
		return nil
	}
	return ss.server.sites.heldAddresses(ss.claim, addrs)
}

// acceptRoutes returns what counts of the routes that the client advertises:
// what it has already. More counts as soon as it is decided upon.
func (ss *session) acceptRoutes(routes []capsule.Route) []capsule.Route {
	if ss.claim == nil {
		return nil
	}
	return ss.server.sites.heldRoutes(ss.claim, routes)
}

func (ss *session) addressesAssigned(addrs []capsule.Address) error {
	if ss.claim == nil {
		ss.noSite(len(addrs))
		return nil
	}
	var granted []netip.Prefix
	for _, a := range addrs {
		if !a.Refused() {
			granted = append(granted, a.Prefix)
		}
	}
	ss.server.sites.assign(ss.claim, granted)
	return nil
}

func (ss *session) routesAdvertised(routes []capsule.Route) error {
	if ss.claim == nil {
		ss.noSite(len(routes))
		return nil
	}
	ss.server.sites.advertise(ss.claim, routes)
	return nil
}

// noSite says, once, that a client wanted to be a gateway.
func (ss *session) noSite(entries int) {
	if entries == 0 || ss.saidNoSite {
		return
	}
	ss.saidNoSite = true
	reason := "no [[site]] names this user"
	if !ss.scope.IsZero() {
		reason = "a request with a scope is not that of a gateway"
	}
	ss.log.Warn("networks of the client are refused", "reason", reason)
}

// followSites makes the policy and what is advertised follow a decision about
// sites.
func (ss *session) followSites() error {
	ss.mu.Lock()
	conn := ss.conn
	ss.mu.Unlock()
	if ss.claim == nil || conn == nil {
		return nil // it begins with what was decided until then
	}
	has := ss.server.sites.held(ss.claim)
	if err := conn.SetFiltered(has.assigned, has.routes); err != nil {
		return err
	}
	ss.refresh()
	return nil
}

// answer leases what the client asks for and returns its full list of
// addresses, refusals included.
func (ss *session) answer(requested []capsule.Address) []capsule.Address {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var refused []capsule.Address
	var reason error
	for _, r := range ss.answerHeld(requested) {
		a, err := ss.lease(r)
		if err != nil {
			refused, reason = append(refused, connectip.Refusal(r)), err
			continue
		}
		ss.addresses = append(ss.addresses, a)
	}
	if len(refused) > 0 {
		ss.log.Warn("addresses refused", "requests", len(refused), "reason", reason)
	}
	ss.noteAssigned("addresses assigned")
	return slices.Concat(ss.addresses, refused)
}

// noteAssigned has the rest of the proxy follow the addresses that the client
// is about to be assigned. ss.mu is held.
func (ss *session) noteAssigned(message string) {
	ss.assigned = true
	if ss.claim != nil {
		ss.server.sites.lease(ss.claim, prefixes(ss.addresses))
	}
	ss.log.Info(message, "addresses", prefixes(ss.addresses))
}

// lease takes an address or a block for the request r and routes it here. ss.mu
// is held.
func (ss *session) lease(r capsule.Address) (capsule.Address, error) {
	if len(ss.addresses) >= maxAddresses {
		return r, fmt.Errorf("the session has %d addresses already", maxAddresses)
	}
	want, blocks := r.Prefix, 0
	for _, held := range ss.addresses {
		if !held.Prefix.IsSingleIP() && held.Prefix.Addr().Is4() == want.Addr().Is4() {
			blocks++
		}
	}
	if blocks >= maxBlocks {
		want = netip.PrefixFrom(want.Addr(), want.Addr().BitLen())
	}
	if n := ss.userState.leases.Add(1); n > ss.maxLeases() {
		ss.userState.leases.Add(-1)
		return r, fmt.Errorf("the user has as many addresses as allowed, %d (limits.addresses_per_user)", n-1)
	}
	p, err := ss.server.pool.lease(ss.user, ss.owner(), want)
	if err != nil {
		ss.userState.leases.Add(-1)
		return r, err
	}
	ss.server.table.insert(p, ss)
	return capsule.Address{RequestID: r.RequestID, Prefix: p}, nil
}

// owner tells whose the leases are once they are given back: the user's on this
// device, or, where nobody is a user, the device's alone, or that of this run
// of a client program. What no client says can make it another user's.
func (ss *session) owner() string {
	if ss.user.Name == "" {
		return cmp.Or(ss.installation, ss.instance)
	}
	return ss.user.Name + "\n" + ss.installation
}

// announce tells the client its routes, and then how names are resolved, so
// that no query leaves outside the tunnel for want of a route. A client that
// does not read holds up this alone.
func (ss *session) announce() {
	ss.mu.Lock()
	conn := ss.conn
	ss.mu.Unlock()
	if conn == nil {
		return // it is told when the request is answered
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

// refresh has the client told what changed. It never blocks.
func (ss *session) refresh() { ss.announcer.Wake() }

// advertise tells the client its routes, unless they are what it was told last.
// It is not called concurrently.
func (ss *session) advertise() error {
	routes, same, err := ss.newRoutes()
	if err != nil || same {
		return err
	}
	return ss.conn.Advertise(routes)
}

// newRoutes works out what the client is to be told, and reports whether that
// is what it was told last.
func (ss *session) newRoutes() (routes []capsule.Route, same bool, err error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	may := ss.userState.reach.Load()
	routes, err = ss.server.routes(ss.reach, may, ss.scope.Protocol, ss.uses)
	if err == nil && ss.claim != nil {
		routes, err = ss.server.sites.routesTo(ss.claim, routes, may, ss.server.pool.gatewayAddrs())
	}
	if err == nil && len(routes) > routing.MaxRoutes {
		err = fmt.Errorf("%d ranges are too many to be advertised, clients take %d: shorten the lists of the user, or of the sites", len(routes), routing.MaxRoutes)
	}
	same = ss.routes != nil && slices.Equal(routes, ss.routes)
	if err == nil {
		ss.routes = routes
	}
	return routes, same, err
}

// uses reports whether the client has, or may still get, addresses or networks
// of a's family. ss.mu is held.
func (ss *session) uses(a netip.Addr) bool {
	if !ss.assigned {
		return ss.server.pool.serves(a)
	}
	has := prefixes(ss.addresses)
	if ss.claim != nil {
		has = append(has, ss.server.sites.held(ss.claim).prefixes...)
	}
	return slices.ContainsFunc(has, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() })
}

// withheld returns what the proxy advertises, but not to the session's user.
func (ss *session) withheld() []netip.Prefix { return ss.server.withheld(ss.userState.reach.Load()) }

// updateDenied has the session held to what its client may not reach now.
func (ss *session) updateDenied() error {
	if ss.udp != nil {
		if !ss.server.reachesByUDP(ss.udp.to.Addr(), ss.userState.reach.Load()) {
			ss.stop(errProhibited)
		}
		return nil
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.conn == nil {
		return nil // it starts with what is denied then
	}
	return ss.conn.SetDenied(ss.server.deniedNow().of(ss), ss.withheld())
}

// release gives back all addresses and networks.
func (ss *session) release() {
	if ss.claim != nil {
		ss.server.sites.remove(ss.claim)
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, a := range ss.addresses {
		ss.server.table.remove(a.Prefix)
	}
	for _, a := range ss.addresses {
		ss.server.pool.release(a.Prefix, ss.owner())
		ss.userState.leases.Add(-1)
	}
	ss.addresses, ss.assigned = nil, true
}

func prefixes(addrs []capsule.Address) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = a.Prefix
	}
	return out
}

// addAges takes into account in a what waits in the session's stages.
func (ss *session) addAges(a *connectip.Ages) {
	if ss.udp != nil {
		return
	}
	a.Note(connectip.StageFlowQueue, ss.queue.Oldest())
	a.Note(connectip.StageSender, ss.sender.Age())
	ss.uplink.addAges(a)
	ss.mu.Lock()
	conn := ss.conn
	ss.mu.Unlock()
	if conn != nil {
		conn.AddAges(a)
	}
}

// SessionStatus describes one session in the words of a client's status.
type SessionStatus struct {
	connectip.Status
	ID     string `json:"id"`
	User   string `json:"user"`
	Remote string `json:"remote"` // address and UDP port
	Kind   string `json:"kind"`   // the :protocol of its request, KindIP or KindUDP
	// host:port that KindUDP leads to, as the client named it
	Target string `json:"target,omitempty"`
	// Networks are behind the client: what it advertised and the proxy
	// accepted.
	Networks []netip.Prefix `json:"networks"`
}

// The kinds of sessions.
const (
	KindIP  = connectip.Protocol
	KindUDP = udpProtocol
)

func (ss *session) status() SessionStatus {
	s := SessionStatus{ID: ss.id, User: ss.user.Name, Remote: ss.quic.RemoteAddr().String()}
	s.Schema, s.Name, s.State, s.Since = connectip.StatusSchema, ss.server.cfg().Name, "connected",
		ss.since
	s.Proxy = connectip.ProxyStatus{Name: ss.server.cfg().Name,
		Endpoint: ss.quic.LocalAddr().String(), HTTP: "h3"}
	s.RTT = ss.quic.ConnectionStats().SmoothedRTT.Microseconds()
	s.SetTraffic(&ss.stats)
	s.Networks = []netip.Prefix{}
	if ss.udp != nil {
		s.Kind, s.Target = KindUDP, ss.udp.target.String()
		s.Addresses = []netip.Prefix{}
		s.SetRoutes(nil)
		s.SetDNS(nil, nil)
		return s
	}
	s.Kind, s.Interface = KindIP, ss.server.supervisor.Current().Name()
	ss.mu.Lock()
	if ss.conn != nil {
		s.MTU = ss.conn.MTU()
	} else {
		s.State = "connecting"
	}
	s.Addresses = prefixes(ss.addresses)
	s.SetRoutes(ss.routes)
	s.SetDNS(ss.told.configurations(), ss.told.NAT64)
	ss.mu.Unlock()
	if ss.claim != nil {
		s.Networks = append(s.Networks, ss.server.sites.held(ss.claim).prefixes...)
	}
	return s
}

// sessions is the set of running sessions, with the limits on it.
type sessions struct {
	mu     sync.Mutex
	lastID uint64
	byID   map[string]*session
	ended  connectip.Stats // the sum of those that are no more

	userStates userStates
}

// add gives ss an ID and takes it in, or says which limit forbids it. It
// returns the sessions that ss replaces, which have to be stopped by the
// caller. While they end they count: a user has one session more than allowed
// at most. Tunnels and flows of UDP count apart.
func (l *sessions) add(ss *session, limit limits) (replaced []*session, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all, ofUser := 0, 0
	for _, other := range l.byID {
		if (other.udp == nil) != (ss.udp == nil) {
			continue
		}
		all++
		if other.user.Name != ss.user.Name {
			continue
		}
		ofUser++
		if ss.replaces(other) {
			replaced = append(replaced, other)
		}
	}
	if len(replaced) > 0 {
		limit.max, limit.maxOfUser = math.MaxInt, limit.maxOfUser+1
	}
	if all >= limit.max {
		return nil, limit.all
	}
	if ofUser >= limit.maxOfUser {
		return nil, limit.ofUser
	}
	l.lastID++
	ss.id = strconv.FormatUint(l.lastID, 10)
	l.byID[ss.id] = ss
	if l.userStates == nil {
		l.userStates = make(userStates)
	}
	ss.userState = l.userStates.open(ss.user)
	ss.follows = ss.userState.reach.Load()
	return replaced, nil
}

// replaces reports whether ss, which is new, is there instead of other, of the
// same user. A client has one tunnel, and flows of UDP on one connection.
func (ss *session) replaces(other *session) bool {
	if ss.instance == "" || ss.instance != other.instance || (ss.udp == nil) != (other.udp == nil) {
		return false
	}
	return ss.udp == nil || ss.quic != other.quic
}

func (l *sessions) remove(ss *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.byID, ss.id)
	l.userStates.close(ss.user.Name)
	ss.stats.AddTo(&l.ended)
}

// addTo adds what all sessions carried so far, those that ended included, to
// sum, and returns how many tunnels and flows of UDP there are now. What it
// adds never gets less.
func (l *sessions) addTo(sum *connectip.Stats) (tunnels, flows int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended.AddTo(sum)
	for _, ss := range l.byID {
		ss.stats.AddTo(sum)
		if ss.udp == nil {
			tunnels++
		} else {
			flows++
		}
	}
	return tunnels, flows
}

// list returns the sessions in the order of their IDs.
func (l *sessions) list() []*session {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*session, 0, len(l.byID))
	for _, ss := range l.byID {
		out = append(out, ss)
	}
	slices.SortFunc(out, func(a, b *session) int {
		x, _ := strconv.ParseUint(a.id, 10, 64)
		y, _ := strconv.ParseUint(b.id, 10, 64)
		return int(x) - int(y)
	})
	return out
}
