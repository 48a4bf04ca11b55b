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
	hurryInterval = time.Second
	hurryBurst    = 3
)

// Uplink tells how packets to the proxy leave this host, outside the tunnel;
// *routing.Watcher is one.
type Uplink interface {
	// NextHop returns the current next hop to an address. If there is none, the
	// error tells the missing part.
	NextHop(to netip.Addr) (routing.NextHop, error)
	// Changed receives a value when ways may have changed.
	Changed() <-chan struct{}
	Close() error
}

// errUnknown says that there is no Uplink.
var errUnknown = errors.New("the network of this host is not known")

// host is what changes under a client: the network that it dials over, and
// time.
type host struct {
	uplink    Uplink // nil: not known
	suspended func() time.Duration
	changed   chan struct{} // receives a value when ways or sleep may be others than before
	sleep     atomic.Int64  // for how long it has been suspended in all
}

func newHost(suspended func() time.Duration) *host {
	h := &host{suspended: suspended, changed: make(chan struct{}, 1)}
	h.sleep.Store(int64(suspended()))
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
func (h *host) slept() time.Duration { return time.Duration(h.sleep.Load()) }

// way returns the way to an address, or errUnknown.
func (h *host) way(to netip.Addr) (routing.NextHop, error) {
	if h.uplink == nil {
		return routing.NextHop{}, errUnknown
	}
	return h.uplink.NextHop(to)
}

// ways returns the ways to addresses, zero for those that there is none to.
func (h *host) ways(to []netip.AddrPort) []routing.NextHop {
	ways := make([]routing.NextHop, len(to))
	for i, a := range to {
		ways[i], _ = h.way(a.Addr())
	}
	return ways
}

// watch follows the host until ctx ends, and calls noteChange when its network
// has changed.
func (h *host) watch(ctx context.Context, noteChange func()) {
	var changed <-chan struct{}
	if h.uplink != nil {
		changed = h.uplink.Changed()
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
			if now-h.slept() < minSuspend {
				continue
			}
			h.sleep.Store(int64(now))
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
	c.noting.Lock()
	defer c.noting.Unlock()
	conflicts, err := c.supervisor.Current().network.FollowHost()
	if err != nil {
		c.cfg.Logger.Debug("conflicts with the host's networks are not known", "error", err)
		return
	}
	c.warnAll(noticeConflict, conflicts)
}

// watchHost follows the host until end is called.
func (c *Client) watchHost(ctx context.Context) (end func(), err error) {
	if c.cfg.OpenUplink != nil {
		if c.host.uplink, err = c.cfg.OpenUplink(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { c.host.watch(ctx, c.noteHost) })
	return func() {
		cancel()
		watching.Wait()
		if c.host.uplink != nil {
			_ = c.host.uplink.Close()
		}
	}, nil
}

// tried is what a client knew of its host when it dialed last.
type tried struct {
	addrs []netip.AddrPort // the proxy's addresses
	ways  []routing.NextHop
	slept time.Duration
}

// noteTry is called before and after dialing, which is what finds the addresses
// of the proxy.
func (c *Client) noteTry() {
	c.tried.slept = c.host.slept()
	c.tried.addrs = c.dialer.lastAddrs
	c.tried.ways = c.host.ways(c.tried.addrs)
}

// networkChanged waits until ctx ends, or until the host is another than when
// it dialed last, which it reports.
func (c *Client) networkChanged(ctx context.Context) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-c.host.changed:
		}
		// Without an address of the proxy, anything may be what was missing to
		// find it.
		if len(c.tried.addrs) == 0 || c.host.slept() != c.tried.slept ||
			!slices.Equal(c.host.ways(c.tried.addrs), c.tried.ways) {
			if c.hurry.Wait(ctx) != nil {
				return false
			}
			c.cfg.Logger.Info("the network of this host has changed, trying again at once")
			return true
		}
	}
}
