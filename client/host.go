package client

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/routing"
)

const (
	// suspendInterval is the time between two comparisons of the host's clocks.
	// A difference of less than minSuspend is ignored.
	suspendInterval = time.Second
	minSuspend      = time.Second

	// earlyRetryInterval and earlyRetryBurst limit the attempts to connect
	// before the backoff ends.
	earlyRetryInterval = time.Second
	earlyRetryBurst    = 3
)

// Underlay is the host's network outside the tunnel. *routing.Watcher
// implements it.
type Underlay interface {
	// NextHop returns the current next hop to an address. If there is none, the
	// error names the missing part, such as a route.
	NextHop(to netip.Addr) (routing.NextHop, error)
	// Changed receives a value when next hops may have changed.
	Changed() <-chan struct{}
	Close() error
}

// errNoUnderlay is returned if there is no Underlay.
var errNoUnderlay = errors.New("the network of this host is not known")

// host watches the host's network outside the tunnel, and its clocks. The
// fields except total are constant while watch runs.
type host struct {
	underlay  Underlay // nil: not known
	suspended func() time.Duration

	// changed receives a value when next hops may have changed, or the host was
	// suspended.
	changed chan struct{}

	// total is the last known value of suspended.
	total atomic.Int64
}

func newHost(suspended func() time.Duration) *host {
	h := &host{suspended: suspended, changed: make(chan struct{}, 1)}
	h.total.Store(int64(suspended()))
	return h
}

// suspended returns the total time that this host has been suspended since it
// booted. CLOCK_BOOTTIME includes that time and CLOCK_MONOTONIC does not.
func suspended() time.Duration {
	var boot, awake unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake) != nil ||
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil {
		return 0
	}
	return time.Duration(boot.Nano() - awake.Nano())
}

// suspendedTotal returns the total time that the host has been suspended.
func (h *host) suspendedTotal() time.Duration { return time.Duration(h.total.Load()) }

// nextHop returns the next hop to an address.
func (h *host) nextHop(to netip.Addr) (routing.NextHop, error) {
	if h.underlay == nil {
		return routing.NextHop{}, errNoUnderlay
	}
	return h.underlay.NextHop(to)
}

// nextHops returns the next hop to each address, zero if there is none.
func (h *host) nextHops(to []netip.AddrPort) []routing.NextHop {
	hops := make([]routing.NextHop, len(to))
	for i, a := range to {
		hops[i], _ = h.nextHop(a.Addr())
	}
	return hops
}

// watch sends to h.changed when the network may have changed or the host was
// suspended, until ctx is done. It calls noteChange first if it was the
// network.
func (h *host) watch(ctx context.Context, noteChange func()) {
	var changed <-chan struct{}
	if h.underlay != nil {
		changed = h.underlay.Changed()
	}
	tick := time.NewTicker(suspendInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			noteChange()
		case <-tick.C:
			now := h.suspended()
			if now-h.suspendedTotal() < minSuspend {
				continue
			}
			h.total.Store(int64(now))
		}
		select {
		case h.changed <- struct{}{}:
		default:
		}
	}
}

// noteHost updates the warnings that depend on the host's network.
func (c *Client) noteHost() {
	c.noteConflicts()
	c.noteDNSOutside()
}

// noticeConflict is the key of warnings about routes and networks of the host.
const noticeConflict = "conflict"

// noteConflicts adapts the tunnel to the host's networks and routes. It warns,
// in the log and in the status, about those that use addresses of the tunnel.
func (c *Client) noteConflicts() {
	c.notingMu.Lock()
	defer c.notingMu.Unlock()
	conflicts, err := c.supervisor.Current().network.FollowHost()
	if err != nil {
		c.cfg.Logger.Debug("cannot check the host's networks for conflicts", "error", err)
		return
	}
	c.warnAll(noticeConflict, conflicts)
}

// watchHost starts to watch the host. end stops it.
func (c *Client) watchHost(ctx context.Context) (end func(), err error) {
	if c.cfg.OpenUnderlay != nil {
		if c.host.underlay, err = c.cfg.OpenUnderlay(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { c.host.watch(ctx, c.noteHost) })
	return func() {
		cancel()
		watching.Wait()
		if c.host.underlay != nil {
			_ = c.host.underlay.Close()
		}
	}, nil
}

// dialState describes the host at a dial.
type dialState struct {
	addrs     []netip.AddrPort // the proxy's addresses
	nextHops  []routing.NextHop
	suspended time.Duration
}

// noteDial updates lastDial. It is called before dialing, and again after it if
// dialing has found other addresses of the proxy.
func (c *Client) noteDial() {
	c.lastDial.suspended = c.host.suspendedTotal()
	c.lastDial.addrs = c.dialer.lastAddrs
	c.lastDial.nextHops = c.host.nextHops(c.lastDial.addrs)
}

// awaitNetworkChange waits until the host differs from lastDial, and then
// returns true. It returns false if ctx is done first.
func (c *Client) awaitNetworkChange(ctx context.Context) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-c.host.changed:
		}
		// Without an address of the proxy, any change may help to resolve it.
		if len(c.lastDial.addrs) == 0 || c.host.suspendedTotal() != c.lastDial.suspended ||
			!slices.Equal(c.host.nextHops(c.lastDial.addrs), c.lastDial.nextHops) {
			if c.earlyRetries.Wait(ctx) != nil {
				return false
			}
			c.cfg.Logger.Info("the network of this host has changed, retrying at once")
			return true
		}
	}
}
