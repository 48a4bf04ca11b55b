package routing

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NextHop is the first step of packets from this host to an address.
type NextHop struct {
	Interface string
	Source    netip.Addr // source address of the packets
	Gateway   netip.Addr // zero if the destination is on the link
}

func (n NextHop) String() string { return fmt.Sprintf("%v on %s", n.Source, n.Interface) }

// LookUpNextHop asks the kernel for the next hop of packets to an address. The
// packets come from a socket that has the mark and is not bound. LookUpNextHop
// returns an error if there is no route.
func LookUpNextHop(to netip.Addr, mark uint32) (NextHop, error) {
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	if err != nil {
		return NextHop{}, fmt.Errorf("no route to %v: %w", to, err)
	}
	if len(routes) == 0 {
		return NextHop{}, fmt.Errorf("no route to %v", to)
	}
	r := routes[0]
	hop := NextHop{}
	hop.Source, _ = netip.AddrFromSlice(r.Src)
	hop.Source = hop.Source.Unmap()
	hop.Gateway, _ = netip.AddrFromSlice(r.Gw)
	hop.Gateway = hop.Gateway.Unmap()
	link, err := netlink.LinkByIndex(r.LinkIndex)
	if err != nil {
		return NextHop{}, fmt.Errorf("no route to %v: %w", to, err)
	}
	hop.Interface = link.Attrs().Name
	// The kernel keeps routes through an unplugged cable unless
	// ignore_routes_with_linkdown is set.
	if attrs := link.Attrs(); attrs.RawFlags&unix.IFF_UP != 0 &&
		attrs.RawFlags&unix.IFF_LOWER_UP == 0 {
		return NextHop{}, fmt.Errorf("no route to %v: %s has no carrier", to, hop.Interface)
	}
	return hop, nil
}

// DefaultInterface returns the name of the interface through which the kernel
// sends packets to the internet outside all tunnels. It is empty if there is no
// route for the family.
func DefaultInterface(ipv6 bool) string {
	to := netip.MustParseAddr("203.0.113.1") // for documentation, RFC 5737
	if ipv6 {
		to = netip.MustParseAddr("2001:db8::1") // RFC 3849
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ""
	}
	defer h.Close()
	routes, err := h.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: DefaultMark})
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := h.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}

// PolicyRouting returns nil if the kernel has policy routing, which
// Config.Mark requires, and otherwise the reason.
func PolicyRouting() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return explain(err)
	}
	defer h.Close()
	_, err = h.RuleList(unix.AF_INET)
	return explain(err)
}

// LeavesHost returns nil if the kernel sends packets for an address to exactly
// one other host. The error matches os.ErrPermission for addresses of this
// host, including anycast addresses, and for broadcast and multicast addresses.
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
