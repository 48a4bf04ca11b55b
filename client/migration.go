package client

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
	"masquevpn/routing"
)

const (
	// pathInterval is how often it is looked whether something came from the
	// proxy.
	livenessInterval = time.Second
	// silence is how long nothing may come after something was sent before the
	// proxy is asked, and then for how long it may not answer. On a path with a
	// long round trip it is silenceRTTs of those.
	maxSilence     = 3 * time.Second
	maxSilenceRTTs = 4
	// probeTime is how long a new path may take to prove that it reaches the
	// proxy.
	probeTimeout = 3 * time.Second
	// pingInterval and pings are what is sent on a path that the connection has
	// just moved to. The proxy needs a few packets before it has verified that
	// it may send there.
	pingInterval = 100 * time.Millisecond
	pingCount    = 10
)

// errCannotMove says that a connection cannot move to another path. Its socket
// is bound to none, and so is on the new one already.
var errCannotMigrate = errors.New("this build cannot move connections")

// lostError is why a path to the proxy is given up.
type lostError pathState

func (e *lostError) Error() string { return e.reason }

func lostPath(p pathState) error {
	e := lostError(p)
	return fail(causeLost, &e, e.reason, "")
}

// pathState is what there is to say of a session's path, the zero value for
// nothing.
type pathState struct {
	reason string
	down   bool // nothing comes through
	local  bool // nothing leaves this host
}

// setPath has the status say what is up with the path.
func (s *session) setPath(p pathState) {
	s.mu.Lock()
	same := s.path == p
	s.path = p
	s.mu.Unlock()
	if !same {
		select {
		case s.pathChanged <- struct{}{}:
		default:
		}
	}
}

// showPath makes the status that of a connected session, with the state of its
// path, or else what its path does not carry.
func (s *session) showPath(limits string) {
	s.mu.Lock()
	p := s.path
	s.mu.Unlock()
	state, reason := StateConnected, limits
	if p.reason != "" {
		reason = p.reason
	}
	if p.down {
		state = StateReconnecting
	}
	s.c.setState(state, reason)
}

// roamer keeps one session on a path that works.
type migrator struct {
	s               *session
	d               *dialed
	nextHop         routing.NextHop
	noRoute         bool // there is no route to the proxy: any route that comes is another
	suspended       time.Duration
	received        uint64    // packets that came so far
	receivedAt      time.Time // when the last one had come
	sentBefore      uint64    // packets that had been sent by then
	unansweredSince time.Time // when something else had been sent first, zero if nothing was
	probed          bool      // whether the proxy is there
}

func newMigrator(s *session, d *dialed) *migrator {
	r := &migrator{s: s, d: d, suspended: s.c.host.suspendedTotal(), receivedAt: time.Now()}
	r.nextHop, _ = s.c.host.nextHop(d.remote.Addr())
	s.c.showUnderlay(r.nextHop)
	return r
}

// run looks after the path until ctx ends, or until it gives it up and says
// why.
func (r *migrator) run(ctx context.Context) error {
	tick := time.NewTicker(livenessInterval)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-r.s.c.host.changed:
			err = r.hostChanged(ctx)
		case <-tick.C:
			err = r.checkLiveness(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// hostChanged moves to another path if the host has been suspended or sends
// another way than before.
func (r *migrator) hostChanged(ctx context.Context) error {
	if r.s.c.networksChanged() {
		r.s.changed() // and with them what the proxy may assign and send
	}
	host := r.s.c.host
	suspended := (host.suspendedTotal() - r.suspended).Round(time.Second)
	r.suspended = host.suspendedTotal()
	if suspended >= idleTimeout {
		return lostPath(pathState{reason: fmt.Sprintf("this host was suspended for %v", suspended)})
	}
	hop, err := host.nextHop(r.d.remote.Addr())
	switch {
	case errors.Is(err, errNoUnderlay):
	case err != nil:
		r.noRoute = true
		why := pathState{reason: fmt.Sprintf("this host has %v", err), down: true, local: true}
		if slices.ContainsFunc(r.s.c.dialer.lastAddrs, func(a netip.AddrPort) bool {
			_, err := host.nextHop(a.Addr())
			return err == nil
		}) {
			return lostPath(why)
		}
		r.s.c.cfg.Logger.Warn("there is no way to the proxy", "reason", err)
		r.s.c.showUnderlay(routing.NextHop{})
		r.s.setPath(why)
		return nil
	case r.noRoute || hop != r.nextHop:
		r.noRoute, r.nextHop = false, hop
		r.s.c.showUnderlay(hop)
		return r.migrate(ctx, pathState{reason: fmt.Sprintf("moving: this host sends from %v now", hop)})
	}
	if suspended > 0 {
		return r.migrate(ctx, pathState{reason: fmt.Sprintf("this host was suspended for %v", suspended)})
	}
	return nil
}

// listen moves to another path if nothing comes on this one although something
// was sent. What only answers the proxy counts as sent too, so the proxy is
// asked before that means anything.
func (r *migrator) checkLiveness(ctx context.Context) error {
	now, stats, unsent := time.Now(), r.d.conn.ConnectionStats(), r.d.socket.Unsent()
	patience := max(maxSilence, maxSilenceRTTs*stats.SmoothedRTT)
	switch {
	case stats.PacketsReceived != r.received && unsent == nil:
		// what comes is worth little if nothing leaves
		r.noteReceived(stats)
		if r.noRoute { // it was mistaken
			r.noRoute = false
			r.s.setPath(pathState{})
		}
	case r.noRoute, stats.PacketsSent == r.sentBefore:
	case r.unansweredSince.IsZero():
		r.unansweredSince = now
	case now.Sub(r.unansweredSince) < patience:
	case !r.probed:
		r.probed, r.unansweredSince = true, now
		go r.s.conn.Ping() // which blocks when too much waits to be sent already
	default:
		why := pathState{reason: fmt.Sprintf("nothing has come from the proxy for %v",
			now.Sub(r.receivedAt).Round(time.Second)), down: true}
		if unsent != nil {
			why.reason, why.local = (&unsentError{unsent}).Error(), true
		}
		return r.migrate(ctx, why)
	}
	return nil
}

// hear notes that something came from the proxy.
func (r *migrator) noteReceived(stats quic.ConnectionStats) {
	r.received, r.receivedAt, r.sentBefore, r.unansweredSince, r.probed = stats.PacketsReceived, time.Now(),
		stats.PacketsSent, time.Time{}, false
}

// move moves the connection to a new path, for the reason that why says. It
// gives the session up when no path leads to the proxy.
func (r *migrator) migrate(ctx context.Context, why pathState) error {
	c := r.s.c
	c.cfg.Logger.Info("moving to another path", "reason", why.reason)
	r.s.setPath(why)
	before := r.d.conn.ConnectionStats().PacketsReceived
	go r.s.conn.Ping()
	probing, cancel := context.WithTimeout(ctx,
		max(probeTimeout, maxSilenceRTTs*r.d.conn.ConnectionStats().SmoothedRTT))
	defer cancel()
	err := r.d.migrate(probing, c.dialer)
	if errors.Is(err, errCannotMigrate) && r.awaitPackets(probing, before) {
		err = nil
	}
	stats := r.d.conn.ConnectionStats()
	switch {
	case ctx.Err() != nil:
		return nil
	case err == nil:
		c.countMigration()
		c.cfg.Logger.Info("moved to another path", "uplink", r.nextHop.String())
		r.s.setPath(pathState{})
		r.completeMigration(ctx)
		stats = r.d.conn.ConnectionStats()
	case stats.PacketsReceived > before && r.d.socket.Unsent() == nil:
		// by the old path, because nothing came by the new one
		c.cfg.Logger.Warn("the connection stays where it was", "reason", err)
	case len(c.host.changed) > 0: // the network of this host has not settled yet
		r.noRoute = true
		return nil
	default:
		if !why.down {
			why.reason += ", and the proxy does not answer"
		}
		return lostPath(why)
	}
	r.noteReceived(stats)
	r.s.setPath(pathState{})
	return nil
}

// settle has the proxy move too, and closes the former path when what was under
// way on it has come.
func (r *migrator) completeMigration(ctx context.Context) {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for range pingCount {
		if len(r.s.c.host.changed) > 0 { // and so this path may be a former one already
			break
		}
		go r.s.conn.Ping()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	r.d.closeFormer()
}

// hears waits until more packets have come than before, which it reports, or
// ctx ends.
func (r *migrator) awaitPackets(ctx context.Context, before uint64) bool {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for r.d.conn.ConnectionStats().PacketsReceived == before {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

// showUplink has the status say how packets leave this host, if way is not
// zero.
func (c *Client) showUnderlay(hop routing.NextHop) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Underlay = nil
	if hop.Source.IsValid() {
		c.status.Underlay = &connectip.Underlay{Interface: hop.Interface, Source: hop.Source}
	}
}

func (c *Client) countMigration() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Migrations++
}
