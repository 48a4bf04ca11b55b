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
	// suspendInterval is how often the clocks are compared, and minSuspend what
	// they have to differ by for the host to count as having been suspended.
	suspendInterval = time.Second
	minSuspend      = time.Second
	// hurryInterval and hurryBurst limit how often the proxy is dialed before
	// its time.
	earlyRetryInterval = time.Second
	earlyRetryBurst    = 3
)

// Uplink tells how packets to the proxy leave this host, outside the tunnel;
// *routing.Watcher is one.
type Underlay interface {
	// NextHop returns the current next hop to an address. If there is none, the
	// error tells the missing part.
	NextHop(to netip.Addr) (routing.NextHop, error)
	// Changed receives a value when ways may have changed.
	Changed() <-chan struct{}
	Close() error
}

// errUnknown says that there is no Uplink.
var errNoUnderlay = errors.New("the network of this host is not known")

// host is what changes under a client: the network that it dials over, and
// time.
type host struct {
	underlay  Underlay // nil: not known
	suspended func() time.Duration
	changed   chan struct{} // receives a value when ways or sleep may be others than before
	total     atomic.Int64  // for how long it has been suspended in all
}

func newHost(suspended func() time.Duration) *host {
	h := &host{suspended: suspended, changed: make(chan struct{}, 1)}
	h.total.Store(int64(suspended()))
	return h
}

// suspended returns for how long in all this host has been suspended since it
// booted: one of the clocks stands still meanwhile.
func suspended() time.Duration {
	var boot, awake unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake) != nil ||
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil {
		return 0
	}
	return time.Duration(boot.Nano() - awake.Nano())
}

// slept returns for how long in all the host has been suspended.
func (h *host) suspendedTotal() time.Duration { return time.Duration(h.total.Load()) }

// way returns the way to an address, or errUnknown.
func (h *host) nextHop(to netip.Addr) (routing.NextHop, error) {
	if h.underlay == nil {
		return routing.NextHop{}, errNoUnderlay
	}
	return h.underlay.NextHop(to)
}

// ways returns the ways to addresses, zero for those that there is none to.
func (h *host) nextHops(to []netip.AddrPort) []routing.NextHop {
	hops := make([]routing.NextHop, len(to))
	for i, a := range to {
		hops[i], _ = h.nextHop(a.Addr())
	}
	return hops
}

// watch follows the host until ctx ends, and calls noteChange when its network
// has changed.
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

// noteHost has the status say what a change of the host's network means for the
// tunnel.
func (c *Client) noteHost() {
	c.noteConflicts()
	c.noteDNSOutside()
}

// noticeConflict is the key of warnings about routes and networks of the host.
const noticeConflict = "conflict"

// noteConflicts says, in the log and in the status, where the tunnel and the
// host's networks and routes are at odds now.
func (c *Client) noteConflicts() {
	c.notingMu.Lock()
	defer c.notingMu.Unlock()
	conflicts, err := c.supervisor.Current().network.FollowHost()
	if err != nil {
		c.cfg.Logger.Debug("conflicts with the host's networks are not known", "error", err)
		return
	}
	c.warnAll(noticeConflict, conflicts)
}

// watchHost follows the host until end is called.
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

// tried is what a client knew of its host when it dialed last.
type dialState struct {
	addrs     []netip.AddrPort // the proxy's addresses
	nextHops  []routing.NextHop
	suspended time.Duration
}

// noteTry is called before and after dialing, which is what finds the addresses
// of the proxy.
func (c *Client) noteDial() {
	c.lastDial.suspended = c.host.suspendedTotal()
	c.lastDial.addrs = c.dialer.lastAddrs
	c.lastDial.nextHops = c.host.nextHops(c.lastDial.addrs)
}

// networkChanged waits until ctx ends, or until the host is another than when
// it dialed last, which it reports.
func (c *Client) awaitNetworkChange(ctx context.Context) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-c.host.changed:
		}
		// Without an address of the proxy, anything may be what was missing to
		// find it.
		if len(c.lastDial.addrs) == 0 || c.host.suspendedTotal() != c.lastDial.suspended ||
			!slices.Equal(c.host.nextHops(c.lastDial.addrs), c.lastDial.nextHops) {
			if c.earlyRetries.Wait(ctx) != nil {
				return false
			}
			c.cfg.Logger.Info("the network of this host has changed, trying again at once")
			return true
		}
	}
}
