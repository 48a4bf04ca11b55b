package routing

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settleTime is how long a Watcher waits for more of the changes that come
	// together, and maxSettleTime for how long in all.
	settleTime    = 100 * time.Millisecond
	maxSettleTime = time.Second
)

// Way is how packets to an address leave this host.
type Way struct {
	Interface string
	Source    netip.Addr // source address of the packets
	Gateway   netip.Addr // the zero Addr where the destination is on the link
}

func (w Way) String() string { return fmt.Sprintf("%v on %s", w.Source, w.Interface) }

// WayTo asks the kernel for the way of packets to an address, from a socket
// with the given mark that is not bound. It fails when there is none.
func WayTo(to netip.Addr, mark uint32) (Way, error) {
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	if err != nil {
		return Way{}, fmt.Errorf("no route to %v: %w", to, err)
	}
	if len(routes) == 0 {
		return Way{}, fmt.Errorf("no route to %v", to)
	}
	r := routes[0]
	way := Way{}
	way.Source, _ = netip.AddrFromSlice(r.Src)
	way.Source = way.Source.Unmap()
	way.Gateway, _ = netip.AddrFromSlice(r.Gw)
	way.Gateway = way.Gateway.Unmap()
	link, err := netlink.LinkByIndex(r.LinkIndex)
	if err != nil {
		return Way{}, fmt.Errorf("no route to %v: %w", to, err)
	}
	way.Interface = link.Attrs().Name
	// A route through a cable that is not plugged in leads nowhere. The kernel
	// keeps it unless ignore_routes_with_linkdown is set.
	if attrs := link.Attrs(); attrs.RawFlags&unix.IFF_UP != 0 &&
		attrs.RawFlags&unix.IFF_LOWER_UP == 0 {
		return Way{}, fmt.Errorf("no route to %v: %s has no carrier", to, way.Interface)
	}
	return way, nil
}

// LeavesHost returns nil when the kernel sends packets to an address to one
// other host. For addresses of this host, also anycast ones, and for those of
// many, the error is os.ErrPermission.
func LeavesHost(to netip.Addr) error {
	routes, err := netlink.RouteGet(to.AsSlice())
	switch {
	case err != nil:
		return fmt.Errorf("no route to %v: %w", to, err)
	case len(routes) == 0:
		return fmt.Errorf("no route to %v", to)
	case routes[0].Type != unix.RTN_UNICAST:
		return fmt.Errorf("%v is an address of this host, or of several: %w", to, os.ErrPermission)
	}
	return nil
}

// Watcher tells when this host's network changes: its interfaces, addresses,
// routes and rules.
type Watcher struct {
	mark    uint32
	events  *notifications
	changed chan struct{}
}

// Watch starts to watch the network namespace of the calling thread, for the
// sake of sockets with the given mark.
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

// Way returns the way to an address as it is now, see WayTo.
func (w *Watcher) Way(to netip.Addr) (Way, error) { return WayTo(to, w.mark) }

// Changed receives a value soon after changes, one for those that come
// together.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Close ends the watch. Nothing comes from Changed after that.
func (w *Watcher) Close() error { return w.events.close() }
