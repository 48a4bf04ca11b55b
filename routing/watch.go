package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Watcher reports a burst of changes once: when no change has come for
// settleTime, and at the latest maxSettleTime after the first one.
const (
	settleTime    = 100 * time.Millisecond
	maxSettleTime = time.Second
)

// Watcher reports changes of this host's interfaces, addresses, routes and
// rules.
type Watcher struct {
	mark    uint32
	events  *notifications
	changed chan struct{}
}

// Watch starts to watch the network namespace of the calling thread. NextHop
// looks up routes for sockets with the mark.
func Watch(mark uint32) (*Watcher, error) {
	events, err := subscribe(unix.NETLINK_ROUTE,
		slices.Concat(linkGroups, routeGroups, ruleGroups), nil)
	if err != nil {
		return nil, fmt.Errorf("routing: watching the network: %w", err)
	}
	w := &Watcher{mark: mark, events: events, changed: make(chan struct{}, 1)}
	go events.follow(w.changed, settleTime, maxSettleTime)
	return w, nil
}

// NextHop returns the current next hop of packets to an address, like
// [LookUpNextHop].
func (w *Watcher) NextHop(to netip.Addr) (NextHop, error) { return LookUpNextHop(to, w.mark) }

// Changed returns a channel that receives a value soon after a burst of
// changes.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Close ends the watch. The channel receives nothing after it.
func (w *Watcher) Close() error { return w.events.close() }
