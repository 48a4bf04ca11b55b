package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// End is one end of a link: an interface of a host and its addresses.
type End struct {
	Host  *Host
	Name  string // interface name
	Addrs []netip.Prefix
}

// LinkOptions configures a link. The zero value is a veth pair without a rate
// limit and an MTU of 1500 bytes.
type LinkOptions struct {
	MTU int // bytes; 0: 1500
	// Rate limits each direction by a token bucket, in bits per second. 0: no
	// limit.
	Rate uint64
}

const defaultMTU = 1500

// readyTimeout limits the wait for the kernel to bring an interface up in the
// background.
const readyTimeout = 10 * time.Second

// Connect makes a veth pair between two hosts. It returns when both interfaces
// are up and their addresses usable. For a link with delay or loss use
// [Lab.Wire].
func (l *Lab) Connect(a, b End, o LinkOptions) error {
	if o.MTU == 0 {
		o.MTU = defaultMTU
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.Name, o.MTU
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace, veth.PeerMTU = b.Name, netlink.NsFd(b.Host.netFD),
		uint32(o.MTU)
	if err := a.Host.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("lab: connect %s %s to %s %s: %w", a.Host.name, a.Name, b.Host.name,
			b.Name, err)
	}
	if o.Rate > 0 {
		for _, e := range []End{a, b} {
			if err := e.limit(o.Rate); err != nil {
				return err
			}
		}
	}
	return bringUp(l.ctx, a, b)
}

// Bridge connects any number of ends to one LAN. It returns the host that is
// the switch, whose interfaces are "port0" for the first end, and so on.
func (l *Lab) Bridge(name string, o LinkOptions, ends ...End) (*Host, error) {
	sw, err := l.Host(name)
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "bridge"
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := sw.nl.LinkAdd(bridge); err != nil {
		return nil, fmt.Errorf("lab: bridge %s: %w", name, err)
	}
	if err := sw.nl.LinkSetUp(bridge); err != nil {
		return nil, fmt.Errorf("lab: bridge %s: %w", name, err)
	}
	for i, e := range ends {
		port := End{Host: sw, Name: fmt.Sprintf("port%d", i)}
		if err := l.Connect(e, port, o); err != nil {
			return nil, err
		}
		link, err := sw.nl.LinkByName(port.Name)
		if err == nil {
			err = sw.nl.LinkSetMaster(link, bridge)
		}
		if err != nil {
			return nil, fmt.Errorf("lab: bridge %s: %w", name, err)
		}
	}
	return sw, nil
}

// limit adds a token bucket to the end's interface.
func (e End) limit(rate uint64) error {
	link, err := e.Host.nl.LinkByName(e.Name)
	if err == nil {
		byteRate := rate / 8
		burst := max(byteRate/250, 64<<10) // 4 ms, at least one offloaded packet
		err = e.Host.nl.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index,
				Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:   byteRate,
			Limit:  uint32(burst + byteRate/20), // 50 ms
			Buffer: uint32(float64(burst) / float64(byteRate) * netlink.TIME_UNITS_PER_SEC * netlink.TickInUsec()),
		})
	}
	if err != nil {
		return fmt.Errorf("lab: limit the rate of %s %s: %w: the kernel needs sch_tbf; Wire has a rate limit that does not", e.Host.name, e.Name, err)
	}
	return nil
}

// bringUp adds addresses to interfaces, sets them up and waits until they are
// usable.
func bringUp(ctx context.Context, ends ...End) error {
	for _, e := range ends {
		link, err := e.Host.nl.LinkByName(e.Name)
		if err != nil {
			return fmt.Errorf("lab: host %s: %s: %w", e.Host.name, e.Name, err)
		}
		if err := e.Host.nl.LinkSetUp(link); err != nil {
			return fmt.Errorf("lab: host %s: set %s up: %w", e.Host.name, e.Name, err)
		}
		for _, p := range e.Addrs {
			if err := e.Host.AddAddr(e.Name, p); err != nil {
				return err
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, e := range ends {
		if err := e.waitUp(ctx); err != nil {
			return err
		}
	}
	return nil
}

// waitUp waits until the interface has a carrier and its link-local address.
func (e End) waitUp(ctx context.Context) error {
	for {
		link, err := e.Host.nl.LinkByName(e.Name)
		if err != nil {
			return fmt.Errorf("lab: host %s: %s: %w", e.Host.name, e.Name, err)
		}
		state := link.Attrs().OperState
		if state == netlink.OperUp || state == netlink.OperUnknown {
			addrs, err := e.Host.nl.AddrList(link, netlink.FAMILY_V6)
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				return fmt.Errorf("lab: host %s: addresses of %s: %w", e.Host.name, e.Name, err)
			}
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					return nil
				}
			}
			if link.Attrs().MTU < 1280 { // too small for IPv6
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lab: host %s: %s does not come up: %w", e.Host.name, e.Name,
				ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// AddAddr adds an address with a prefix length to an interface.
func (h *Host) AddAddr(iface string, p netip.Prefix) error {
	link, err := h.nl.LinkByName(iface)
	if err == nil {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		err = h.nl.AddrAdd(link, a)
	}
	if err != nil {
		return fmt.Errorf("lab: host %s: add %s to %s: %w", h.name, p, iface, err)
	}
	return nil
}

// AddRoute adds a route through a gateway.
func (h *Host) AddRoute(dst netip.Prefix, via netip.Addr) error {
	err := h.nl.RouteAdd(&netlink.Route{Dst: ipNet(dst.Masked()), Gw: via.AsSlice()})
	if err != nil {
		return fmt.Errorf("lab: host %s: route %s via %s: %w", h.name, dst, via, err)
	}
	return nil
}

// AddDefaultRoute adds the default route of the gateway's family.
func (h *Host) AddDefaultRoute(via netip.Addr) error {
	if via.Is4() {
		return h.AddRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), via)
	}
	return h.AddRoute(netip.PrefixFrom(netip.IPv6Unspecified(), 0), via)
}

// SetMTU sets the MTU of an interface, in bytes. A router with a small MTU on
// its next link answers with Packet Too Big. Use [Impairment] to drop packets
// silently.
func (h *Host) SetMTU(iface string, mtu int) error {
	return h.changeLink(iface, fmt.Sprintf("MTU %d", mtu), func(l netlink.Link) error {
		return h.nl.LinkSetMTU(l, mtu)
	})
}

// SetUp sets an interface up or down.
func (h *Host) SetUp(iface string, up bool) error {
	if !up {
		return h.changeLink(iface, "down", h.nl.LinkSetDown)
	}
	return h.changeLink(iface, "up", h.nl.LinkSetUp)
}

func (h *Host) changeLink(iface, change string, f func(netlink.Link) error) error {
	link, err := h.nl.LinkByName(iface)
	if err == nil {
		err = f(link)
	}
	if err != nil {
		return fmt.Errorf("lab: host %s: set %s %s: %w", h.name, iface, change, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
