package client

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go4.org/netipx"
	"golang.org/x/time/rate"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
	"masquevpn/routing"
)

const (
	// configTimeout is how long the proxy may take to assign addresses and to
	// advertise routes.
	configTimeout = 10 * time.Second
	// quietDelay and settleDelay let capsules and MTU changes that come
	// together be applied together: when nothing has changed for the one, and
	// at the latest after the other.
	quietDelay  = 2 * time.Millisecond
	settleDelay = 20 * time.Millisecond
	// applyRate and applyBurst are how often the kernel follows a proxy that
	// changes its mind, in a second and at once.
	applyRate  = 1
	applyBurst = 10
	// answerInterval is how often it is looked whether the far end acknowledges
	// what it does not answer, and answerChecks after how many looks it is
	// believed to answer nothing.
	answerInterval = time.Second
	answerChecks   = 3
)

// noticeNoAnswer is the key of the warning that the proxy answers no echo.
const noticeNoAnswer = "no answer"

// session is one accepted request and what the proxy said on it.
type session struct {
	c           *Client
	quic        *quic.Conn
	conn        *connectip.Conn
	wake        chan struct{} // something below changed
	failed      chan error    // why there is no path to the proxy any more
	pathChanged chan struct{} // path changed

	requests   bool             // for addresses; else the proxy assigns what it likes
	proxyAddrs []netip.AddrPort // where the proxy may be reached

	mu          sync.Mutex
	installed   []netip.Prefix    // addresses that the kernel has
	assigned    []capsule.Address // the last ADDRESS_ASSIGN; nil before the first
	requestedAt time.Time         // when addresses were asked for; zero: they were not
	// for the answer to a request for addresses, or for the first unprompted
	// ones
	waiting   bool
	routes    []capsule.Route
	hasRoutes bool
	dns       []capsule.DNSConfiguration
	hasDNS    bool // dns is of this session, and not of the last one
	nat64     []netip.Prefix
	path      pathState

	// What follows is of keep alone.
	configured     bool             // the kernel has had what the proxy said
	full           bool             // all traffic of a family goes through the tunnel
	onlyIPv4       bool             // the tunnel's interface cannot have IPv6
	refusedRoutes  []netip.Prefix   // routes of the proxy that are not installed
	skippedServers []netip.AddrPort // nameservers that are not used
	// the family that has no way through a tunnel for everything, "" for none
	heldFamily string
	// what was said of a family that leaves outside the tunnel, "" for nothing
	familyOutside string
	noRoutes      string         // what was said of a tunnel without routes, "" for nothing
	advertised    []netip.Prefix // routes last advertised to the proxy
	assignedPeer  []netip.Prefix // addresses last assigned to the proxy
}

// session dials, keeps the session until it ends, and returns why it ended and
// how long it was connected.
func (c *Client) runSession(ctx context.Context) (connected time.Duration, err error) {
	if err := c.closeKillSwitch(c.iface()); err != nil {
		return 0, err
	}
	c.noteDial()
	d, str, err := c.dial(ctx)
	if !slices.Equal(c.lastDial.addrs, c.dialer.lastAddrs) {
		c.noteDial()
	}
	if err != nil {
		return 0, err
	}
	c.warn(noticePeer, "")
	code := http3.ErrCodeNoError
	defer func() { d.closeWith(code) }()
	c.readNetworks()
	// Until the proxy has had the time to speak of DNS, the resolver is left as
	// it is.
	s := &session{
		requests: !c.skipRequest && len(c.cfg.Request) > 0, proxyAddrs: c.dialer.lastAddrs, installed: c.installed,
		c: c, quic: d.conn, wake: make(chan struct{}, 1), failed: make(chan error, 1),
		pathChanged: make(chan struct{}, 1), dns: c.lastDNS,
	}
	s.conn = connectip.New(str, d.conn, connectip.Config{
		Device: c.supervisor.Device(),
		Filter: connectip.Filter{Assigned: s.acceptableAddresses, Routes: c.acceptableRoutes},
		Handler: connectip.Handler{
			Assigned: s.handleAssigned, Requested: s.handleAddressRequest, Routes: s.handleRoutes,
			DNS: s.handleDNS, PREF64: s.handlePREF64, MTU: func(int) { s.changed() },
		},
		Static: c.cfg.Static,
		// All routes that the kernel is given, and no more than a trifle
		// besides.
		MaxCapsule: routing.MaxRoutes * capsule.MaxRouteLen,
		Stats:      &c.stats,
		Panicked:   c.logPanic,
		Tap:        c.cfg.Tap.At(""),
	})
	c.mu.Lock()
	c.quicConn, c.currentSession = d.conn, s
	c.status.Proxy.Endpoint = d.remote.String()
	c.status.Proxy.AuthenticatedAs = c.target.verify
	c.mu.Unlock()
	c.cfg.Logger.Info("session started", "proxy", c.target.host, "remote", d.remote.String())

	runCtx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.conn.Run(runCtx) }()
	var roaming sync.WaitGroup
	roaming.Go(func() {
		defer rescue.Catch(func(e *rescue.Error) {
			c.logPanic(e)
			s.fail(e)
		})
		if err := newMigrator(s, d).run(runCtx); err != nil {
			s.fail(err)
		}
	})
	defer func() {
		cancel()
		roaming.Wait()
		c.mu.Lock()
		c.quicConn, c.currentSession = nil, nil
		c.mu.Unlock()
		c.activeConn.CompareAndSwap(s.conn, nil)
	}()

	since, err := s.run(ctx, ended)
	if errors.Is(err, errStreamEnded) {
		reason := <-ended
		if errors.Is(reason, capsule.ErrMalformed) || errors.Is(reason, capsule.ErrTooLarge) {
			// The reset of the stream may get lost with the connection, so that
			// says it as well (RFC 9114 section 8).
			code = connectip.ErrorCode(reason)
		}
		err = s.explainEnd(explainEnd(reason, s.quic, c.target))
	} else {
		cancel()
		if errors.As(err, new(*lostError)) {
			// Nothing that waits for the path is worth waiting for.
			_ = d.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		}
		<-ended
	}
	if !since.IsZero() {
		connected = time.Since(since)
	}
	return connected, err
}

// lose ends the session with err, unless it ends already.
func (s *session) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// guarded calls f. A panic ends the session alone.
func (s *session) guard(f func()) {
	if e, ok := errors.AsType[*rescue.Error](rescue.Run(f)); ok {
		s.c.logPanic(e)
		s.fail(e)
	}
}

// errEnded stands for the end of the stream, whose reason is with its Run.
var errStreamEnded = errors.New("the session ended")

// keep asks for addresses, applies what comes, and returns when the session or
// ctx ends, or cannot go on.
func (s *session) run(ctx context.Context, ended chan error) (connected time.Time, err error) {
	c := s.c
	if err := s.request(); err != nil {
		return connected, explainEnd(err, s.quic, c.target)
	}
	alive, stopKeepAlive := context.WithCancel(ctx)
	defer stopKeepAlive()
	probes, stopProbes := context.WithCancel(alive)
	defer stopProbes()
	defer c.warn(noticeNoAnswer, "")
	configured := time.NewTimer(configTimeout)
	defer configured.Stop()
	var firstPacket <-chan struct{} // nil until the kernel follows the proxy
	var settled <-chan time.Time    // nil unless there is something to apply
	var earliest, latest time.Time  // when to apply it
	applies := rate.NewLimiter(applyRate, applyBurst)
	probing := false
	limits := ""
	var unanswered answerWatch
	defer unanswered.stop()
	isConnected := func() {
		connected = time.Now()
		limits = s.limits()
		s.showPath(limits)
		c.cfg.Logger.Info("connected", "addresses", c.Status().Addresses, "mtu", s.conn.MTU())
		s.forgetDNS()
	}
	for {
		select {
		case <-ctx.Done():
			return connected, nil
		case err := <-s.failed:
			return connected, err
		case <-s.pathChanged:
			if !connected.IsZero() {
				s.showPath(limits)
			}
		case err := <-ended:
			ended <- err
			return connected, errStreamEnded
		case <-configured.C:
			return connected, s.notConfigured()
		case <-firstPacket:
			firstPacket = nil
			unanswered.stop()
			c.warn(noticeNoAnswer, "")
			if connected.IsZero() {
				isConnected()
			}
		case <-unanswered.C:
			acknowledged, why := unanswered.check(s.quic.ConnectionStats())
			if !acknowledged {
				c.setReason(why)
				break
			}
			// RFC 9484 obliges no peer to answer an echo.
			unanswered.stop()
			stopProbes()
			c.warn(noticeNoAnswer, "the proxy acknowledges packets and answers no echo in the tunnel, so whether it forwards them is not known")
			c.cfg.Logger.Warn("the proxy answers no echo in the tunnel; it acknowledges packets, so the tunnel counts as connected")
			isConnected()
		case <-s.wake:
			if settled == nil {
				pace := applies.Reserve().Delay()
				earliest, latest = time.Now().Add(pace), time.Now().Add(max(pace, settleDelay))
			}
			settled = time.After(min(max(quietDelay, time.Until(earliest)), time.Until(latest)))
		case <-settled:
			settled = nil
			complete, err := s.apply()
			if err != nil {
				return connected, err
			}
			if now := s.limits(); !connected.IsZero() && now != limits {
				limits = now
				s.showPath(limits)
				c.cfg.Logger.Warn("the path has changed", "mtu", s.conn.MTU(), "limits", limits)
			}
			if complete {
				if err := s.announceSite(); err != nil {
					return connected, explainEnd(err, s.quic, c.target)
				}
			}
			if complete && !probing {
				configured.Stop()
				probing = true
				firstPacket = s.conn.FirstPacket()
				unanswered = newAnswerWatch()
				go s.guard(func() { s.conn.Probe(probes) })
				go s.guard(func() { s.conn.KeepAlive(alive, keepAlive) })
			}
		}
	}
}

// request asks for addresses, unless those of the configuration, or those that
// the proxy assigns unprompted, serve.
func (s *session) request() error {
	if len(s.c.cfg.Static) > 0 {
		return nil
	}
	ask := !s.skipsRequest()
	s.mu.Lock()
	s.waiting = true
	if ask {
		s.requestedAt = time.Now()
	}
	s.mu.Unlock()
	if !ask {
		return nil
	}
	return s.conn.Request(s.c.addressesToRequest())
}

// unprompted reports whether the session waits for addresses without asking.
func (s *session) skipsRequest() bool { return s.c.skipRequest || len(s.c.cfg.Request) == 0 }

// explainRequest returns err, with which the far end ended the session, or an
// error that says more: some proxies cannot take ADDRESS_REQUEST, although RFC
// 9484 section 4.7.2 obliges them to answer, end the stream, and had assigned
// addresses unprompted before. The next session then does without asking.
func (s *session) explainEnd(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	granted := slices.ContainsFunc(s.assigned, func(a capsule.Address) bool { return !a.Refused() })
	var e *Error
	switch {
	case !errors.As(err, &e) || e.Kind != KindFailure ||
		errors.As(err, new(*quic.StatelessResetError)):
		return err
	case s.requestedAt.IsZero() || time.Since(s.requestedAt) > configTimeout || !granted ||
		!s.conn.Unanswered():
		return err
	}
	s.c.skipRequest = true
	return fail(causeEnded, e, "the proxy ended the tunnel when it was asked for addresses, although it assigns some unasked",
		"set addresses.request = []; until then each run of the client begins with such a failure")
}

// wanted is what to ask for: the addresses of the last session, where there was
// one, and otherwise those configured.
func (c *Client) addressesToRequest() []netip.Prefix {
	want := slices.Clone(c.cfg.Request)
	had := slices.Clone(c.lastAddrs)
	for _, sameLength := range []bool{true, false} { // a prefix for a prefix, if there was one
		for i, w := range want {
			if !w.Addr().IsUnspecified() {
				continue
			}
			j := slices.IndexFunc(had, func(h netip.Prefix) bool {
				return h.Addr().Is4() == w.Addr().Is4() && (!sameLength || h.Bits() == w.Bits())
			})
			if j >= 0 {
				want[i] = had[j]
				had = slices.Delete(had, j, j+1)
			}
		}
	}
	return want
}

func (s *session) changed() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *session) handleAssigned(addrs []capsule.Address) error {
	s.mu.Lock()
	s.assigned = append(make([]capsule.Address, 0, len(addrs)), addrs...)
	s.waiting = s.conn.Unanswered() || s.requestedAt.IsZero() && len(addrs) == 0
	s.mu.Unlock()
	s.changed()
	return nil
}

func (s *session) handleRoutes(routes []capsule.Route) error {
	s.mu.Lock()
	s.routes, s.hasRoutes = routes, true
	s.mu.Unlock()
	s.changed()
	return nil
}

func (s *session) handleDNS(configurations []capsule.DNSConfiguration) error {
	s.mu.Lock()
	s.dns, s.hasDNS = configurations, true
	s.mu.Unlock()
	s.changed()
	return nil
}

// forgetDNS lets go of what a former session said, unless this one has said
// something too.
func (s *session) forgetDNS() {
	s.mu.Lock()
	forget := !s.hasDNS && len(s.dns) > 0
	if forget {
		s.dns = nil
	}
	s.mu.Unlock()
	if forget {
		s.changed()
	}
}

func (s *session) handlePREF64(prefixes []netip.Prefix) error {
	s.mu.Lock()
	s.nat64 = prefixes
	s.mu.Unlock()
	s.changed()
	return nil
}

// addresses returns what of the tunnel's addresses is on this host's side.
func (s *session) addresses() []netip.Prefix {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.c.cfg.Static)
	for _, a := range s.assigned {
		if !a.Refused() && s.wantsFamily(a.Prefix) && !slices.Contains(out, a.Prefix) {
			// a proxy may assign what is static
			out = append(out, a.Prefix)
		}
	}
	return out
}

// hostAddresses returns the addresses of the interface for what is assigned. A
// prefix has one; the rest of it is for whatever is behind this host.
func (s *session) hostAddresses(assigned []netip.Prefix) []netip.Prefix {
	out := slices.Clone(assigned)
	for i, p := range out {
		if !slices.Contains(s.c.cfg.Static, p) {
			a := connectip.HostAddr(p)
			out[i] = netip.PrefixFrom(a, a.BitLen())
		}
	}
	return out
}

// apply makes the kernel follow what the proxy said. complete is false while
// the proxy has not said enough.
func (s *session) apply() (complete bool, err error) {
	c := s.c
	s.mu.Lock()
	routes, hasRoutes, dns, nat64, waiting := s.routes, s.hasRoutes, s.dns, s.nat64, s.waiting
	s.mu.Unlock()
	addrs := s.addresses() // after waiting, for both may change in between
	if !hasRoutes || len(addrs) == 0 && waiting && !s.configured {
		return false, nil // more is to come
	}
	if c.readNetworks() {
		if err := s.updateFilter(); err != nil {
			return false, err
		}
	}
	if err := s.checkAssigned(); err != nil {
		c.lastAddrs = nil // it may grant others
		c.removeTakenAddresses()
		return false, err
	}
	if len(addrs) == 0 {
		c.lastAddrs = nil // it may grant others
		return false, fail(causeAddresses, nil, "the proxy assigned no address",
			"its pool may be exhausted; ask its operator")
	}
	if err := c.cfg.checkAssigned(addrs); err != nil {
		return false, err
	}
	state := routing.State{MTU: s.mtu(), Addresses: s.hostAddresses(addrs), Exclude: c.cfg.Exclude,
		HostRoutes: c.cfg.HostRoutes, Private: c.cfg.AdvertiseRoutes,
		Forward: len(c.cfg.AdvertiseRoutes) > 0, Reach: c.cfg.ownNetworks(addrs)}
	inside, err := acceptedPrefixes(routes, c.cfg.Accept)
	if err != nil {
		return false, err
	}
	s.full = routing.IsFull(inside, false) || routing.IsFull(inside, true)
	if c.cfg.InstallRoutes {
		state.HoldDNS = c.cfg.DNS.Hold && s.full
		state.Routes = append(s.holdMissingFamily(s.excludeOwn(inside), addrs), c.cfg.AssignPeer...)
		s.noteNoRoutes(routes, state.Routes)
	}
	c.lastAddrs = addrs
	c.activeConn.Store(s.conn) // before the kernel sends packets here
	network := c.supervisor.Current().network
	err = network.Apply(state)
	if errors.Is(err, routing.ErrInterfaceGone) || errors.Is(err, os.ErrClosed) {
		return false, nil // until there is another one
	}
	if held := network.Held(); err == nil {
		s.noteIPv6Refused(held)
		if s.onlyIPv4 = held != nil; s.onlyIPv4 {
			addrs, routes = onlyIPv4(addrs),
				slices.DeleteFunc(slices.Clone(routes), func(r capsule.Route) bool {
					return r.Start.Is6()
				})
		}
		if len(addrs) == 0 {
			err = held
		}
	}
	if err != nil {
		e := fail(causeAddresses, err,
			fmt.Sprintf("the addresses and routes of the proxy cannot be applied (%v)", err), "")
		if errors.Is(err, routing.ErrTooManyRoutes) {
			e.Remedy = "set routes.accept to fewer of them"
		}
		return false, e
	}
	c.everApplied, c.installed, c.lastDNS, s.configured = true, addrs, dns, true
	s.mu.Lock()
	s.installed = addrs
	s.mu.Unlock()
	c.noteOverlap(addrs)
	c.noteConflicts()
	s.applyDNS(dns, nat64)
	c.mu.Lock()
	c.status.MTU = min(state.MTU, s.conn.MTU())
	c.lastState, c.assigned, c.present = &state, nil, s.hostAddresses(addrs)
	for i, host := range c.present {
		c.assigned = append(c.assigned, assigned{addrs[i], host})
	}
	c.showAddresses()
	c.status.SetRoutes(routes)
	c.notify()
	c.mu.Unlock()
	c.noteDNSOutside()
	return true, nil
}

// mtu is the MTU that the device should have, in bytes. It never goes below
// what IPv6 needs, because the kernel would then take IPv6 off the device, and
// what belongs in the tunnel would leave beside it; a link that carries less
// answers for itself.
func (s *session) mtu() int {
	if m := s.c.cfg.TUN.MTU; m != 0 {
		return m
	}
	return max(minMTU, min(s.conn.MTU(), maxMTU))
}

func onlyIPv4(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool {
		return p.Addr().Is6()
	})
}

// limits says what a connected tunnel does not carry, "" when there is nothing
// to say.
func (s *session) limits() string {
	if mtu := s.conn.MTU(); mtu < minMTU {
		return fmt.Sprintf("the path carries packets of %d bytes; IPv6, which needs %d, is off",
			mtu, minMTU)
	}
	return ""
}

// accepted returns the fewest prefixes that cover what is both advertised and
// accepted.
func acceptedPrefixes(routes []capsule.Route, accept []netip.Prefix) ([]netip.Prefix, error) {
	var advertised, allowed netipx.IPSetBuilder
	for _, r := range routes {
		advertised.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	for _, p := range accept {
		allowed.AddPrefix(p)
	}
	allow, err := allowed.IPSet()
	if err != nil {
		return nil, err
	}
	advertised.Intersect(allow)
	set, err := advertised.IPSet()
	if err != nil {
		return nil, err
	}
	return set.Prefixes(), nil
}

// notConfigured explains what the proxy did not say in time.
func (s *session) notConfigured() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	what, remedy := "advertised no routes", "ask its operator"
	granted := slices.ContainsFunc(s.assigned, func(a capsule.Address) bool { return !a.Refused() })
	if !granted && len(s.c.cfg.Static) == 0 {
		what = "assigned no addresses"
		if s.requestedAt.IsZero() && !s.c.skipRequest {
			what, remedy = "assigned no addresses unasked",
				"remove addresses.request, or ask its operator"
		}
		s.c.skipRequest = false // it may be another proxy of that name
	}
	return fail(causeAddresses, nil,
		fmt.Sprintf("the proxy %s within %v", what, configTimeout), remedy)
}
