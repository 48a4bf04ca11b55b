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
	"masquevpn/internal/dial"
	"masquevpn/internal/rescue"
	"masquevpn/routing"
)

const (
	// configTimeout limits the wait for the first assigned addresses and
	// advertised routes.
	configTimeout = 10 * time.Second

	// quietDelay and settleDelay combine changes: they are applied once nothing
	// has changed for quietDelay, and settleDelay after the first at the
	// latest.
	quietDelay  = 2 * time.Millisecond
	settleDelay = 20 * time.Millisecond

	// applyRate (per second) and applyBurst limit how often the proxy can
	// change the kernel's configuration.
	applyRate  = 1
	applyBurst = 10

	// answerInterval is the time between two calls of answerWatch.check. After
	// answerChecks calls, a proxy that acknowledges the probes is assumed to
	// answer none.
	answerInterval = time.Second
	answerChecks   = 3
)

// noticeNoAnswer is the key of the warning that the proxy answers no echo.
const noticeNoAnswer = "no answer"

// session is one accepted CONNECT-IP request and the proxy's configuration.
type session struct {
	c    *Client
	quic *quic.Conn
	conn *connectip.Conn

	wake        chan struct{} // receives a value after changes for apply
	pathChanged chan struct{} // receives a value after changes of path
	failed      chan error    // receives the error that ends the session

	// requests is false if the session waits for unprompted addresses, and then
	// the proxy chooses their families and lengths.
	requests bool

	proxyAddrs []netip.AddrPort // addresses of the proxy outside the tunnel

	mu        sync.Mutex        // guards the fields below, up to path
	installed []netip.Prefix    // assigned addresses that the kernel has
	assigned  []capsule.Address // last ADDRESS_ASSIGN; nil before the first

	// requestedAt is the time of the ADDRESS_REQUEST, zero if none was sent.
	requestedAt time.Time

	// waiting is set until the proxy has answered the request, or has assigned
	// addresses unprompted.
	waiting bool

	routes    []capsule.Route // last ROUTE_ADVERTISEMENT
	hasRoutes bool
	dns       []capsule.DNSConfiguration
	hasDNS    bool // dns is from this session, not from the previous one
	nat64     []netip.Prefix
	path      pathState

	// The fields below are used by run alone.

	// connected is the time at which the session was connected, zero before.
	connected time.Time

	limits     string // last shown text of pathLimits
	configured bool   // the kernel has the proxy's configuration
	full       bool   // the tunnel carries all traffic of a family
	onlyIPv4   bool   // the interface cannot have IPv6

	// The last logged or announced values, so that each is logged or announced
	// once. Empty means none.
	refusedRoutes  []netip.Prefix   // routes that are not installed
	skippedServers []netip.AddrPort // nameservers that are not used
	heldFamily     string           // family that is unreachable in a full tunnel
	familyOutside  string           // text about a family outside the tunnel
	noRoutes       string           // text about a tunnel without routes
	advertised     []netip.Prefix   // routes advertised to the proxy
	assignedPeer   []netip.Prefix   // addresses assigned to the proxy
}

// runSession dials and runs a session. It returns the reason for the end, and
// how long the session was connected.
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
	s := c.newSession(d, str)
	c.mu.Lock()
	c.quicConn, c.currentSession = d.conn, s
	c.status.Proxy.Endpoint = d.remote.String()
	c.status.Proxy.AuthenticatedAs = d.name
	c.status.Peer = c.peerStatus(d)
	c.mu.Unlock()
	c.cfg.Logger.Info("session started", "proxy", c.target.host, "remote", d.remote.String())

	runCtx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.conn.Run(runCtx) }()
	var migrating sync.WaitGroup
	migrating.Go(func() {
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
		migrating.Wait()
		c.mu.Lock()
		c.quicConn, c.currentSession = nil, nil
		c.mu.Unlock()
		c.activeConn.CompareAndSwap(s.conn, nil)
	}()

	err = s.run(ctx, ended)
	if errors.Is(err, errStreamEnded) {
		reason := <-ended
		if errors.Is(reason, capsule.ErrMalformed) || errors.Is(reason, capsule.ErrTooLarge) {
			// The reset of the stream may get lost, so CONNECTION_CLOSE has the
			// error code too (RFC 9114 section 8).
			code = connectip.ErrorCode(reason)
		}
		err = s.explainAddressRequest(explainEnd(reason, s.quic, c.target))
	} else {
		cancel()
		if errors.As(err, new(*lostError)) {
			// A dead path cannot deliver the end of the stream, so do not wait
			// for it.
			_ = d.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		}
		<-ended
	}
	if !s.connected.IsZero() {
		connected = time.Since(s.connected)
	}
	return connected, err
}

// newSession returns the session of an accepted request, before its first
// capsule.
func (c *Client) newSession(d *dialed, str *http3.RequestStream) *session {
	// The resolver keeps the previous session's configuration (lastDNS) until
	// the proxy has had time to send one.
	s := &session{
		c: c, quic: d.conn,
		wake: make(chan struct{}, 1), pathChanged: make(chan struct{}, 1),
		failed:     make(chan error, 1),
		requests:   !c.skipRequest && len(c.cfg.Request) > 0,
		proxyAddrs: c.dialer.lastAddrs, installed: c.installed, dns: c.lastDNS,
	}
	s.conn = connectip.New(str, d.conn, connectip.Config{
		Device: c.supervisor.Device(),
		Filter: connectip.Filter{Assigned: s.acceptableAddresses, Routes: c.acceptableRoutes},
		Handler: connectip.Handler{
			Assigned: s.handleAssigned, Requested: s.handleAddressRequest, Routes: s.handleRoutes,
			DNS: s.handleDNS, PREF64: s.handlePREF64, MTU: func(int) { s.changed() },
		},
		Static: c.cfg.Static,
		// A capsule has room for as many routes as the kernel accepts.
		MaxCapsule: routing.MaxRoutes * capsule.MaxRouteLen,
		Stats:      &c.stats,
		Panicked:   c.logPanic,
		Tap:        c.cfg.Tap.At(""),
	})
	return s
}

// fail ends the session with err, unless it already has another error.
func (s *session) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// guard calls f. A panic in f ends the session and not the program.
func (s *session) guard(f func()) {
	if e, ok := errors.AsType[*rescue.Error](rescue.Run(f)); ok {
		s.c.logPanic(e)
		s.fail(e)
	}
}

// errStreamEnded is returned by run after the stream ended. The reason is the
// next value of the channel ended.
var errStreamEnded = errors.New("the session ended")

// run requests addresses and applies the proxy's configuration until ctx is
// done or the session ends.
func (s *session) run(ctx context.Context, ended chan error) error {
	c := s.c
	if err := s.request(); err != nil {
		return explainEnd(err, s.quic, c.target)
	}
	alive, stopKeepAlive := context.WithCancel(ctx)
	defer stopKeepAlive()
	probes, stopProbes := context.WithCancel(alive)
	defer stopProbes()
	defer c.warn(noticeNoAnswer, "")
	configured := time.NewTimer(configTimeout)
	defer configured.Stop()
	var firstPacket <-chan struct{} // nil unless probes are under way
	var settled <-chan time.Time    // nil unless changes wait for apply
	var earliest, latest time.Time  // bounds of the time of the next apply
	applies := rate.NewLimiter(applyRate, applyBurst)
	probing := false
	var unanswered answerWatch
	defer unanswered.stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.failed:
			return err
		case <-s.pathChanged:
			if !s.connected.IsZero() {
				s.showPath(s.limits)
			}
		case err := <-ended:
			ended <- err // runSession receives it again
			return errStreamEnded
		case <-configured.C:
			return s.notConfigured()
		case <-firstPacket:
			firstPacket = nil
			unanswered.stop()
			c.warn(noticeNoAnswer, "")
			if s.connected.IsZero() {
				s.setConnected()
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
			c.warn(noticeNoAnswer, "the proxy acknowledges packets but answers no echo in the tunnel: it may not forward packets")
			c.cfg.Logger.Warn("the proxy answers no echo in the tunnel, but acknowledges packets: the tunnel counts as connected")
			s.setConnected()
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
				return err
			}
			s.showLimits()
			if complete {
				if err := s.announceSite(); err != nil {
					return explainEnd(err, s.quic, c.target)
				}
			}
			if complete && !probing {
				configured.Stop()
				probing = true
				firstPacket = s.conn.FirstPacket()
				unanswered = newAnswerWatch()
				go s.guard(func() { s.conn.Probe(probes) })
				go s.guard(func() { s.conn.KeepAlive(alive, dial.KeepAlive) })
			}
		}
	}
}

// setConnected shows the session as connected.
func (s *session) setConnected() {
	s.connected = time.Now()
	s.limits = s.pathLimits()
	s.showPath(s.limits)
	s.c.cfg.Logger.Info("connected", "addresses", s.c.Status().Addresses, "mtu", s.conn.MTU())
	s.forgetDNS()
}

// showLimits shows the limits of the path if they have changed since the
// session was connected.
func (s *session) showLimits() {
	limits := s.pathLimits()
	if s.connected.IsZero() || limits == s.limits {
		return
	}
	s.limits = limits
	s.showPath(limits)
	s.c.cfg.Logger.Warn("the path has changed", "mtu", s.conn.MTU(), "limits", limits)
}

// request sends the ADDRESS_REQUEST, unless the session uses static or
// unprompted addresses.
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

// skipsRequest reports whether the session waits for unprompted addresses.
func (s *session) skipsRequest() bool { return s.c.skipRequest || len(s.c.cfg.Request) == 0 }

// explainAddressRequest returns the error for a session that the proxy ended
// with err. Some proxies assign addresses unprompted and end the stream at an
// ADDRESS_REQUEST, although RFC 9484 section 4.7.2 requires an answer. For
// these the next session skips the request, and the error names the setting.
func (s *session) explainAddressRequest(err error) error {
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
	return fail(causeEnded, e, "the proxy assigned addresses unasked, but ended the tunnel at the request for addresses",
		"set addresses.request = [] to send no request")
}

// addressesToRequest returns the configured requests, with addresses of the
// previous session in place of unspecified ones.
func (c *Client) addressesToRequest() []netip.Prefix {
	want := slices.Clone(c.cfg.Request)
	had := slices.Clone(c.lastAddrs)
	for _, sameLength := range []bool{true, false} { // prefer the requested length
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

// changed makes run call apply soon.
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

// handleDNS takes the proxy's DNS configuration. A peer has none for the names
// of another owner.
func (s *session) handleDNS(configurations []capsule.DNSConfiguration) error {
	if s.c.target.isPeer() {
		return nil
	}
	s.mu.Lock()
	s.dns, s.hasDNS = configurations, true
	s.mu.Unlock()
	s.changed()
	return nil
}

// forgetDNS discards the previous session's DNS configuration, if this session
// has not received one.
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

// handlePREF64 takes the proxy's NAT64 prefixes, but not those of a peer.
func (s *session) handlePREF64(prefixes []netip.Prefix) error {
	if s.c.target.isPeer() {
		return nil
	}
	s.mu.Lock()
	s.nat64 = prefixes
	s.mu.Unlock()
	s.changed()
	return nil
}

// addresses returns the static and the assigned addresses, without duplicates.
func (s *session) addresses() []netip.Prefix {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.c.cfg.Static)
	for _, a := range s.assigned {
		if !a.Refused() && s.wantsFamily(a.Prefix) && !slices.Contains(out, a.Prefix) {
			out = append(out, a.Prefix)
		}
	}
	return out
}

// hostAddresses returns the addresses of the interface. It has one address of
// each assigned prefix: the other addresses are for hosts behind this one.
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

// apply configures the kernel and the resolver as the proxy requests. complete
// is false if the proxy has not sent addresses and routes yet.
func (s *session) apply() (complete bool, err error) {
	c := s.c
	s.mu.Lock()
	routes, hasRoutes, dns, nat64, waiting := s.routes, s.hasRoutes, s.dns, s.nat64, s.waiting
	s.mu.Unlock()
	// waiting is read first: the answer may arrive in between.
	addrs := s.addresses()
	if !hasRoutes || len(addrs) == 0 && waiting && !s.configured {
		return false, nil
	}
	if c.readNetworks() {
		if err := s.updateFilter(); err != nil {
			return false, err
		}
	}
	if err := s.checkAssigned(); err != nil {
		c.lastAddrs = nil // another request may be granted
		c.removeTakenAddresses()
		return false, err
	}
	if len(addrs) == 0 {
		c.lastAddrs = nil // another request may be granted
		return false, fail(causeAddresses, nil, "the proxy assigned no address",
			"its pool may be exhausted; ask its operator")
	}
	if err := c.cfg.checkAssigned(addrs); err != nil {
		return false, err
	}
	state, err := s.desiredState(addrs, routes)
	if err != nil {
		return false, err
	}
	c.lastAddrs = addrs
	c.activeConn.Store(s.conn) // before the kernel sends packets here
	network := c.supervisor.Current().network
	err = network.Apply(state)
	if errors.Is(err, routing.ErrInterfaceGone) || errors.Is(err, os.ErrClosed) {
		return false, nil // the supervisor opens another one
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
	c.noteDelegated(addrs)
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

// desiredState returns the state for the kernel, with the assigned addresses
// and the accepted parts of the advertised routes. It updates s.full.
func (s *session) desiredState(addrs []netip.Prefix, routes []capsule.Route) (routing.State,
	error) {
	c := s.c
	state := routing.State{MTU: s.mtu(), Addresses: s.hostAddresses(addrs), Exclude: c.cfg.Exclude,
		HostRoutes: c.cfg.HostRoutes, Private: c.cfg.AdvertiseRoutes,
		Forward: len(c.cfg.AdvertiseRoutes) > 0, Reach: c.cfg.ownNetworks(addrs)}
	inside, err := acceptedPrefixes(routes, c.cfg.Accept)
	if err != nil {
		return state, err
	}
	s.full = routing.IsFull(inside, false) || routing.IsFull(inside, true)
	if c.cfg.InstallRoutes {
		state.HoldDNS = c.cfg.DNS.Hold && s.full
		state.Routes = append(s.holdMissingFamily(s.excludeOwn(inside), addrs), c.cfg.AssignPeer...)
		s.noteNoRoutes(routes, state.Routes)
	}
	return state, nil
}

// mtu returns the MTU for the device, in bytes. It is never below the minimum
// of IPv6, because the kernel would remove IPv6 from the device, and its
// packets would leave outside the tunnel. For a smaller path, connectip answers
// packets that are too long.
func (s *session) mtu() int {
	if m := s.c.cfg.TUN.MTU; m != 0 {
		return m
	}
	return max(minMTU, min(s.conn.MTU(), maxMTU))
}

// onlyIPv4 returns the IPv4 prefixes.
func onlyIPv4(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool {
		return p.Addr().Is6()
	})
}

// pathLimits describes the packets that the path does not carry, "" for none.
func (s *session) pathLimits() string {
	if mtu := s.conn.MTU(); mtu < minMTU {
		return fmt.Sprintf("the path carries packets of %d bytes, but IPv6 needs %d: IPv6 is off",
			mtu, minMTU)
	}
	return ""
}

// acceptedPrefixes returns the fewest prefixes that cover the intersection of
// routes and accept.
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

// notConfigured returns the error for a proxy that sends no addresses or no
// routes within configTimeout.
func (s *session) notConfigured() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	omission, remedy := "advertised no routes", "ask its operator"
	granted := slices.ContainsFunc(s.assigned, func(a capsule.Address) bool { return !a.Refused() })
	if !granted && len(s.c.cfg.Static) == 0 {
		omission = "assigned no addresses"
		if s.requestedAt.IsZero() && !s.c.skipRequest {
			omission, remedy = "assigned no addresses unasked",
				"remove addresses.request, or ask its operator"
		}
		s.c.skipRequest = false // another proxy may have the name now
	}
	return fail(causeAddresses, nil,
		fmt.Sprintf("the proxy %s within %v", omission, configTimeout), remedy)
}
