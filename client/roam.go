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
	pathInterval = time.Second
	// silence is how long nothing may come after something was sent before the
	// proxy is asked, and then for how long it may not answer. On a path with a
	// long round trip it is silenceRTTs of those.
	silence     = 3 * time.Second
	silenceRTTs = 4
	// probeTime is how long a new path may take to prove that it reaches the
	// proxy.
	probeTime = 3 * time.Second
	// pingInterval and pings are what is sent on a path that the connection has
	// just moved to. The proxy needs a few packets before it has verified that
	// it may send there.
	pingInterval = 100 * time.Millisecond
	pings        = 10
)

// errCannotMove says that a connection cannot move to another path. Its socket
// is bound to none, and so is on the new one already.
var errCannotMove = errors.New("this build cannot move connections")

// lostError is why a path to the proxy is given up.
type lostError pathState

func (e *lostError) Error() string { return e.reason }

func lost(p pathState) error {
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
		case s.show <- struct{}{}:
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
type roamer struct {
	s      *session
	d      *dialed
	way    routing.NextHop
	noWay  bool // there is no route to the proxy: any route that comes is another
	slept  time.Duration
	heard  uint64    // packets that came so far
	heardT time.Time // when the last one had come
	sent   uint64    // packets that had been sent by then
	since  time.Time // when something else had been sent first, zero if nothing was
	asked  bool      // whether the proxy is there
}

func newRoamer(s *session, d *dialed) *roamer {
	r := &roamer{s: s, d: d, slept: s.c.host.slept(), heardT: time.Now()}
	r.way, _ = s.c.host.way(d.remote.Addr())
	s.c.showUplink(r.way)
	return r
}

// run looks after the path until ctx ends, or until it gives it up and says
// why.
func (r *roamer) run(ctx context.Context) error {
	tick := time.NewTicker(pathInterval)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-r.s.c.host.changed:
			err = r.hostChanged(ctx)
		case <-tick.C:
			err = r.listen(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// hostChanged moves to another path if the host has been suspended or sends
// another way than before.
func (r *roamer) hostChanged(ctx context.Context) error {
	if r.s.c.networksChanged() {
		r.s.changed() // and with them what the proxy may assign and send
	}
	host := r.s.c.host
	slept := (host.slept() - r.slept).Round(time.Second)
	r.slept = host.slept()
	if slept >= idleTimeout {
		return lost(pathState{reason: fmt.Sprintf("this host was suspended for %v", slept)})
	}
	way, err := host.way(r.d.remote.Addr())
	switch {
	case errors.Is(err, errUnknown):
	case err != nil:
		r.noWay = true
		why := pathState{reason: fmt.Sprintf("this host has %v", err), down: true, local: true}
		if slices.ContainsFunc(r.s.c.dialer.lastAddrs, func(a netip.AddrPort) bool {
			_, err := host.way(a.Addr())
			return err == nil
		}) {
			return lost(why)
		}
		r.s.c.cfg.Logger.Warn("there is no way to the proxy", "reason", err)
		r.s.c.showUplink(routing.NextHop{})
		r.s.setPath(why)
		return nil
	case r.noWay || way != r.way:
		r.noWay, r.way = false, way
		r.s.c.showUplink(way)
		return r.move(ctx, pathState{reason: fmt.Sprintf("moving: this host sends from %v now", way)})
	}
	if slept > 0 {
		return r.move(ctx, pathState{reason: fmt.Sprintf("this host was suspended for %v", slept)})
	}
	return nil
}

// listen moves to another path if nothing comes on this one although something
// was sent. What only answers the proxy counts as sent too, so the proxy is
// asked before that means anything.
func (r *roamer) listen(ctx context.Context) error {
	now, stats, unsent := time.Now(), r.d.conn.ConnectionStats(), r.d.socket.Unsent()
	patience := max(silence, silenceRTTs*stats.SmoothedRTT)
	switch {
	case stats.PacketsReceived != r.heard && unsent == nil:
		// what comes is worth little if nothing leaves
		r.hear(stats)
		if r.noWay { // it was mistaken
			r.noWay = false
			r.s.setPath(pathState{})
		}
	case r.noWay, stats.PacketsSent == r.sent:
	case r.since.IsZero():
		r.since = now
	case now.Sub(r.since) < patience:
	case !r.asked:
		r.asked, r.since = true, now
		go r.s.conn.Ping() // which blocks when too much waits to be sent already
	default:
		why := pathState{reason: fmt.Sprintf("nothing has come from the proxy for %v",
			now.Sub(r.heardT).Round(time.Second)), down: true}
		if unsent != nil {
			why.reason, why.local = (&unsentError{unsent}).Error(), true
		}
		return r.move(ctx, why)
	}
	return nil
}

// hear notes that something came from the proxy.
func (r *roamer) hear(stats quic.ConnectionStats) {
	r.heard, r.heardT, r.sent, r.since, r.asked = stats.PacketsReceived, time.Now(),
		stats.PacketsSent, time.Time{}, false
}

// move moves the connection to a new path, for the reason that why says. It
// gives the session up when no path leads to the proxy.
func (r *roamer) move(ctx context.Context, why pathState) error {
	c := r.s.c
	c.cfg.Logger.Info("moving to another path", "reason", why.reason)
	r.s.setPath(why)
	before := r.d.conn.ConnectionStats().PacketsReceived
	go r.s.conn.Ping()
	probing, cancel := context.WithTimeout(ctx,
		max(probeTime, silenceRTTs*r.d.conn.ConnectionStats().SmoothedRTT))
	defer cancel()
	err := r.d.move(probing, c.dialer)
	if errors.Is(err, errCannotMove) && r.hears(probing, before) {
		err = nil
	}
	stats := r.d.conn.ConnectionStats()
	switch {
	case ctx.Err() != nil:
		return nil
	case err == nil:
		c.moved()
		c.cfg.Logger.Info("moved to another path", "uplink", r.way.String())
		r.s.setPath(pathState{})
		r.settle(ctx)
		stats = r.d.conn.ConnectionStats()
	case stats.PacketsReceived > before && r.d.socket.Unsent() == nil:
		// by the old path, because nothing came by the new one
		c.cfg.Logger.Warn("the connection stays where it was", "reason", err)
	case len(c.host.changed) > 0: // the network of this host has not settled yet
		r.noWay = true
		return nil
	default:
		if !why.down {
			why.reason += ", and the proxy does not answer"
		}
		return lost(why)
	}
	r.hear(stats)
	r.s.setPath(pathState{})
	return nil
}

// settle has the proxy move too, and closes the former path when what was under
// way on it has come.
func (r *roamer) settle(ctx context.Context) {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for range pings {
		if len(r.s.c.host.changed) > 0 { // and so this path may be a former one already
			break
		}
		go r.s.conn.Ping()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	r.d.leave()
}

// hears waits until more packets have come than before, which it reports, or
// ctx ends.
func (r *roamer) hears(ctx context.Context, before uint64) bool {
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
func (c *Client) showUplink(way routing.NextHop) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Underlay = nil
	if way.Source.IsValid() {
		c.status.Underlay = &connectip.Underlay{Interface: way.Interface, Source: way.Source}
	}
}

func (c *Client) moved() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Migrations++
}
