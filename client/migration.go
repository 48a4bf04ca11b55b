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
	"masquevpn/internal/dial"
	"masquevpn/routing"
)

const (
	// livenessInterval is the time between two checks for received packets.
	livenessInterval = time.Second

	// maxSilence is the time without received packets after which the migrator
	// pings the proxy, and then the time that the proxy has to answer. On a
	// path with a long round trip it is maxSilenceRTTs round-trip times.
	maxSilence     = 3 * time.Second
	maxSilenceRTTs = 4

	// probeTimeout limits the validation of a new path.
	probeTimeout = 3 * time.Second

	// pingInterval and pingCount describe the pings on a new path: the proxy
	// needs a few packets to validate it (RFC 9000 section 9.3).
	pingInterval = 100 * time.Millisecond
	pingCount    = 10
)

// errCannotMigrate is returned by builds without the patches of quic-go. Their
// socket is not bound to an address, so its packets already take the new path.
var errCannotMigrate = errors.New("this build cannot migrate connections")

// lostError is the reason for which the client gives up the path to the proxy.
type lostError pathState

func (e *lostError) Error() string { return e.reason }

// lostPath returns an Error that wraps a lostError.
func lostPath(p pathState) error {
	e := lostError(p)
	return fail(causeLost, &e, e.reason, "")
}

// pathState describes a problem of a session's path. The zero value means none.
type pathState struct {
	reason string // for the status
	down   bool   // no packets arrive
	local  bool   // no packets leave this host
}

// setPath sets the path state and lets run show it.
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

// showPath sets the state of a connected session from the state of its path.
// The reason is the path's, or else limits.
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

// migrator keeps a session on a working path by connection migration (RFC 9000
// section 9). It is used by one goroutine.
type migrator struct {
	s *session
	d *dialed

	// nextHop leads to the proxy. If noRoute is set, there is none, and any
	// next hop is a reason to migrate.
	nextHop routing.NextHop
	noRoute bool

	// suspended is host.suspendedTotal at the last look.
	suspended time.Duration

	// received and sentBefore are the counts of packets at receivedAt, when the
	// last packet was received.
	received   uint64
	receivedAt time.Time
	sentBefore uint64

	// unansweredSince is the time since which packets have been sent without an
	// answer, zero if all are answered. After a ping it is the time of the
	// ping, and probed is set.
	unansweredSince time.Time
	probed          bool
}

func newMigrator(s *session, d *dialed) *migrator {
	m := &migrator{s: s, d: d, suspended: s.c.host.suspendedTotal(), receivedAt: time.Now()}
	m.nextHop, _ = s.c.host.nextHop(d.remote.Addr())
	s.c.showUnderlay(m.nextHop)
	return m
}

// run watches the path until ctx is done. If no path leads to the proxy, it
// returns a lostError.
func (m *migrator) run(ctx context.Context) error {
	tick := time.NewTicker(livenessInterval)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-m.s.c.host.changed:
			err = m.hostChanged(ctx)
		case <-tick.C:
			err = m.checkLiveness(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// hostChanged migrates if the host was suspended or has another next hop to the
// proxy.
func (m *migrator) hostChanged(ctx context.Context) error {
	if m.s.c.networksChanged() {
		m.s.changed() // apply checks the proxy's configuration again
	}
	host := m.s.c.host
	suspended := (host.suspendedTotal() - m.suspended).Round(time.Second)
	m.suspended = host.suspendedTotal()
	if suspended >= dial.IdleTimeout {
		return lostPath(pathState{reason: fmt.Sprintf("this host was suspended for %v", suspended)})
	}
	hop, err := host.nextHop(m.d.remote.Addr())
	switch {
	case errors.Is(err, errNoUnderlay):
	case err != nil:
		m.noRoute = true
		why := pathState{reason: fmt.Sprintf("this host has %v", err), down: true, local: true}
		if slices.ContainsFunc(m.s.c.dialer.lastAddrs, func(a netip.AddrPort) bool {
			_, err := host.nextHop(a.Addr())
			return err == nil
		}) {
			return lostPath(why)
		}
		m.s.c.cfg.Logger.Warn("this host has no route to the proxy", "reason", err)
		m.s.c.showUnderlay(routing.NextHop{})
		m.s.setPath(why)
		return nil
	case m.noRoute || hop != m.nextHop:
		m.noRoute, m.nextHop = false, hop
		m.s.c.showUnderlay(hop)
		return m.migrate(ctx, pathState{reason: fmt.Sprintf("moving: this host sends from %v now", hop)})
	}
	if suspended > 0 {
		return m.migrate(ctx, pathState{reason: fmt.Sprintf("this host was suspended for %v",
			suspended)})
	}
	return nil
}

// checkLiveness migrates if no packets arrive although some were sent. Sent
// acknowledgements get no answer, so it pings the proxy first.
func (m *migrator) checkLiveness(ctx context.Context) error {
	now, stats, unsent := time.Now(), m.d.conn.ConnectionStats(), m.d.socket.Unsent()
	patience := max(maxSilence, maxSilenceRTTs*stats.SmoothedRTT)
	switch {
	case stats.PacketsReceived != m.received && unsent == nil:
		// Received packets prove little while none can leave this host.
		m.noteReceived(stats)
		if m.noRoute { // there is a route after all
			m.noRoute = false
			m.s.setPath(pathState{})
		}
	case m.noRoute, stats.PacketsSent == m.sentBefore:
	case m.unansweredSince.IsZero():
		m.unansweredSince = now
	case now.Sub(m.unansweredSince) < patience:
	case !m.probed:
		m.probed, m.unansweredSince = true, now
		go m.s.conn.Ping() // blocks if the send queue is full
	default:
		why := pathState{reason: fmt.Sprintf("nothing has come from the proxy for %v",
			now.Sub(m.receivedAt).Round(time.Second)), down: true}
		if unsent != nil {
			why.reason, why.local = unsentText(unsent), true
		}
		return m.migrate(ctx, why)
	}
	return nil
}

// noteReceived records that packets have arrived from the proxy.
func (m *migrator) noteReceived(stats quic.ConnectionStats) {
	m.received, m.sentBefore, m.receivedAt = stats.PacketsReceived, stats.PacketsSent, time.Now()
	m.unansweredSince, m.probed = time.Time{}, false
}

// migrate moves the connection to a new path, because of why. It returns a
// lostError if no path leads to the proxy.
func (m *migrator) migrate(ctx context.Context, why pathState) error {
	c := m.s.c
	c.cfg.Logger.Info("migrating to another path", "reason", why.reason)
	m.s.setPath(why)
	before := m.d.conn.ConnectionStats().PacketsReceived
	go m.s.conn.Ping()
	probing, cancel := context.WithTimeout(ctx,
		max(probeTimeout, maxSilenceRTTs*m.d.conn.ConnectionStats().SmoothedRTT))
	defer cancel()
	err := m.d.migrate(probing, c.dialer)
	if errors.Is(err, errCannotMigrate) && m.awaitPackets(probing, before) {
		err = nil
	}
	stats := m.d.conn.ConnectionStats()
	switch {
	case ctx.Err() != nil:
		return nil
	case err == nil:
		c.countMigration()
		c.cfg.Logger.Info("migrated to another path", "uplink", m.nextHop.String())
		m.s.setPath(pathState{})
		m.completeMigration(ctx)
		stats = m.d.conn.ConnectionStats()
	case stats.PacketsReceived > before && m.d.socket.Unsent() == nil:
		// The packets arrived on the old path, because the new one failed.
		c.cfg.Logger.Warn("the connection stays on its path", "reason", err)
	case len(c.host.changed) > 0: // the host's network is changing again
		m.noRoute = true
		return nil
	default:
		if !why.down {
			why.reason += ", and the proxy does not answer"
		}
		return lostPath(why)
	}
	m.noteReceived(stats)
	m.s.setPath(pathState{})
	return nil
}

// completeMigration pings until the proxy has validated the new path and
// packets on the old path have arrived. Then it closes the old path.
func (m *migrator) completeMigration(ctx context.Context) {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for range pingCount {
		if len(m.s.c.host.changed) > 0 { // another migration may be necessary
			break
		}
		go m.s.conn.Ping()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	m.d.closePrevious()
}

// awaitPackets waits until the number of received packets differs from before.
// It returns false if ctx is done first.
func (m *migrator) awaitPackets(ctx context.Context, before uint64) bool {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for m.d.conn.ConnectionStats().PacketsReceived == before {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

// showUnderlay sets the status's next hop outside the tunnel. The zero NextHop
// removes it.
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
