package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settleTime is how long a Watcher waits for more of the changes that come together, and maxSettleTime for how long in all.
	settleTime    = 100 * time.Millisecond
	maxSettleTime = time.Second
)

// Way is how packets to an address leave this host.
type Way struct {
	Interface string
	Source    netip.Addr // of the packets
	Gateway   netip.Addr // the zero Addr where the destination is on the link
}

func (w Way) String() string { return fmt.Sprintf("%v on %s", w.Source, w.Interface) }

// WayTo asks the kernel for the way of packets to an address, from a socket with the given mark that is not bound. It fails when
// there is none.
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
	// A route through a cable that is not plugged in leads nowhere. The kernel keeps it unless ignore_routes_with_linkdown is set.
	if attrs := link.Attrs(); attrs.RawFlags&unix.IFF_UP != 0 && attrs.RawFlags&unix.IFF_LOWER_UP == 0 {
		return Way{}, fmt.Errorf("no route to %v: %s has no carrier", to, way.Interface)
	}
	return way, nil
}

// Watcher tells when this host's network changes: its interfaces, addresses, routes and rules.
type Watcher struct {
	mark    uint32
	file    *os.File // a netlink socket
	changed chan struct{}
	done    chan struct{}
}

// Watch starts to watch the network namespace of the calling thread, for the sake of sockets with the given mark.
func Watch(mark uint32) (*Watcher, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("routing: watching the network: %w", err)
	}
	groups := []uint{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	}
	address := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for _, g := range groups {
		address.Groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, address); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("routing: watching the network: %w", err)
	}
	w := &Watcher{mark: mark, file: os.NewFile(uintptr(fd), "netlink"), changed: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w, nil
}

// Way returns the way to an address as it is now, see WayTo.
func (w *Watcher) Way(to netip.Addr) (Way, error) { return WayTo(to, w.mark) }

// Changed receives a value soon after changes, one for those that come together.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Close ends the watch. Nothing comes from Changed after that.
func (w *Watcher) Close() error {
	err := w.file.Close()
	<-w.done
	return err
}

// run waits for messages, whatever they say, until the socket is closed.
func (w *Watcher) run() {
	defer close(w.done)
	var message [1 << 14]byte
	for {
		_ = w.file.SetReadDeadline(time.Time{})
		if _, err := w.file.Read(message[:]); errors.Is(err, os.ErrClosed) {
			return
		} // else there was a message, or there were more than the socket had room for
		for end := time.Now().Add(maxSettleTime); time.Now().Before(end); {
			_ = w.file.SetReadDeadline(time.Now().Add(settleTime))
			_, err := w.file.Read(message[:])
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}
