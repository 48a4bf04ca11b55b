package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The functions of this file change an object of the kernel. They write the
// journal before a change, and after one is undone.

const addrGenNone = 1 // IN6_ADDR_GEN_MODE_NONE

// addAddr adds an address to the interface and records it.
func (k *kernel) addAddr(link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if isIPv6(p) {
		a.Flags |= unix.IFA_F_NODAD
	}
	if k.Mark != 0 {
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	k.rec.addAddr(p)
	if err := k.journal.save(k.rec); err != nil {
		k.rec.dropAddr(p)
		return err
	}
	if err := k.nl.AddrAdd(link, a); err != nil {
		k.rec.dropAddr(p)
		return errors.Join(explain(err), k.journal.save(k.rec))
	}
	return nil
}

// delAddr removes an address and its record. link is nil if the interface is
// gone, as in the other functions that restore settings.
func (k *kernel) delAddr(link netlink.Link, p netip.Prefix) error {
	if link != nil {
		err := k.nl.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)})
		if err := unlessGone(err); err != nil {
			return err
		}
	}
	k.rec.dropAddr(p)
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// setMTU changes the MTU and records the previous one.
func (k *kernel) setMTU(link netlink.Link, mtu, found int) error {
	if k.rec.MTU == 0 {
		k.rec.MTU = found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.MTU = 0
			return err
		}
	}
	return explain(k.nl.LinkSetMTU(link, mtu))
}

// restoreMTU restores the recorded MTU.
func (k *kernel) restoreMTU(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetMTU(link, k.rec.MTU)); err != nil {
			return err
		}
	}
	k.rec.MTU = 0
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// tunnelGroup is the group of the interfaces of all tunnels of this host that
// forward.
const tunnelGroup = 9484

// setGroup puts the interface into tunnelGroup and records the previous group.
func (k *kernel) setGroup(link netlink.Link, found uint32) error {
	if k.rec.Group == nil {
		k.rec.Group = &found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.Group = nil
			return err
		}
	}
	return explain(k.nl.LinkSetGroup(link, tunnelGroup))
}

// restoreGroup restores the recorded group.
func (k *kernel) restoreGroup(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetGroup(link, int(*k.rec.Group))); err != nil {
			return err
		}
	}
	k.rec.Group = nil
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// disableLinkLocal keeps the kernel from generating a link-local address for
// the interface. The peer does not know that address, and with it the host
// sends router solicitations and multicast reports into the tunnel. The mode is
// set through netlink because a write to its sysctl generates addresses.
func (k *kernel) disableLinkLocal(link netlink.Link, found string) error {
	if k.rec.AddrGen == "" {
		k.rec.AddrGen = found
		if err := k.journal.save(k.rec); err != nil {
			k.rec.AddrGen = ""
			return err
		}
	}
	return explain(k.nl.LinkSetIP6AddrGenMode(link, addrGenNone))
}

// restoreAddrGen restores the recorded address generation mode.
func (k *kernel) restoreAddrGen(link netlink.Link) error {
	if mode, err := strconv.Atoi(k.rec.AddrGen); link != nil && err == nil {
		if err := unlessGone(k.nl.LinkSetIP6AddrGenMode(link, mode)); err != nil {
			return err
		}
	}
	k.rec.AddrGen = ""
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

// setUp sets the interface up and records that it was down.
func (k *kernel) setUp(link netlink.Link) error {
	if !k.rec.Down {
		k.rec.Down = true
		if err := k.journal.save(k.rec); err != nil {
			k.rec.Down = false
			return err
		}
	}
	return explain(k.nl.LinkSetUp(link))
}

// restoreDown sets the interface down.
func (k *kernel) restoreDown(link netlink.Link) error {
	if link != nil {
		if err := unlessGone(k.nl.LinkSetDown(link)); err != nil {
			return err
		}
	}
	k.rec.Down = false
	k.noteUndo(k.journal.save(k.rec))
	return nil
}

func (k *kernel) addRoutes(routes []route) error {
	for _, r := range routes {
		if err := k.nl.RouteAdd(r.netlink(k)); err != nil {
			return fmt.Errorf("%v: %w", r.prefix, explain(err))
		}
	}
	return nil
}

func (k *kernel) delRoutes(routes []route) error {
	var errs []error
	for _, r := range routes {
		if err := unlessGone(k.nl.RouteDel(r.netlink(k))); err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", r.prefix, err))
		}
	}
	return errors.Join(errs...)
}
