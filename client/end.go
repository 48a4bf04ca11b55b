package client

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"masquevpn/internal/flowqueue"
	"masquevpn/routing"
)

const (
	// steadyDevice is how long a device has to last for the next one to be
	// made at once.
	steadyDevice = 30 * time.Second
	// spareDevices is how many devices are made at once, one after another.
	spareDevices = 3
	// firstDeviceDelay and maxDeviceDelay are the waits before those after them.
	firstDeviceDelay = time.Second
	maxDeviceDelay   = 10 * time.Second
)

// The keys of notices about this host.
const (
	noticeNetwork    = "network"
	noticeDevice     = "device"
	noticeKillSwitch = "kill_switch"
)

// What Status.KernelRepairs counts besides the kinds of routing.Health.
const (
	repairDevice     = "device"
	repairKillSwitch = "kill_switch"
)

// end is this host's end of the tunnel: a device and what belongs to it.
type end struct {
	device   Device
	network  Network
	resolver Resolver // may be nil
	once     sync.Once
}

// openEnd opens an end and makes it the current one.
func (c *Client) openEnd() error {
	e := &end{}
	var err error
	if e.device, err = c.cfg.OpenDevice(); err != nil {
		return privileged(err, "")
	}
	if e.network, err = c.cfg.OpenNetwork(e.device); err != nil {
		return privileged(errors.Join(err, e.close()), "setting up the network: ")
	}
	if c.cfg.OpenResolver != nil {
		if e.resolver, err = c.cfg.OpenResolver(e.device); err != nil {
			return privileged(errors.Join(err, e.close()), "")
		}
	}
	c.mu.Lock()
	c.status.Interface = e.device.Name()
	c.mu.Unlock()
	c.end.Store(e)
	return nil
}

// close restores the host: first the resolver, as nothing is to be asked that
// the routes do not lead to. Further calls do nothing.
func (e *end) close() (err error) {
	e.once.Do(func() {
		if e.resolver != nil {
			err = e.resolver.Close()
		}
		if e.network != nil {
			err = errors.Join(err, e.network.Close())
		}
		err = errors.Join(err, e.device.Close())
	})
	return err
}

// iface is the name of the tunnel's interface.
func (c *Client) iface() string { return c.end.Load().device.Name() }

// resolver is the host's, nil if there is none.
func (c *Client) resolver() Resolver {
	if e := c.end.Load(); e != nil {
		return e.resolver
	}
	return nil
}

// currentDevice is the device of the current end. Sessions write to it, and so
// survive a change of devices.
type currentDevice struct{ c *Client }

func (d currentDevice) Write(bufs [][]byte, offset int) (int, error) {
	return d.c.end.Load().device.Write(bufs, offset)
}

func (d currentDevice) BatchSize() int { return d.c.end.Load().device.BatchSize() }

// keepEnd has the kernel's side of the tunnel stay as it was applied, and opens
// a new end where the device is lost, until ctx ends.
func (c *Client) keepEnd(ctx context.Context) {
	var losses losses
	for {
		err := c.useEnd(ctx, c.end.Load())
		if ctx.Err() != nil {
			return
		}
		c.replaceEnd(ctx, err, &losses)
	}
}

// useEnd takes the packets of the device and keeps the kernel's side of it,
// until ctx ends or the device is lost, and returns why.
func (c *Client) useEnd(ctx context.Context, e *end) error {
	calm := time.AfterFunc(steadyDevice, func() { c.degrade(noticeDevice, "") })
	defer calm.Stop()
	ctx, lose := context.WithCancelCause(ctx)
	defer lose(nil)
	c.running.Go(func() {
		if err := flowqueue.ReadFrom(e.device, c.dispatch); err != nil {
			lose(fmt.Errorf("reading from %s: %w", e.device.Name(), err))
		}
	})
	err := e.network.Keep(ctx, c.noteHealth)
	if err == nil || errors.Is(err, routing.ErrInterfaceGone) {
		if err == nil {
			err = context.Cause(ctx)
		}
		return err
	}
	text := fmt.Sprintf("it is not noticed when another program changes this host's network: %v", err)
	c.cfg.Logger.Warn("it is not noticed when another program changes this host's network", "error", err)
	c.degrade(noticeNetwork, text)
	<-ctx.Done()
	return context.Cause(ctx)
}

// replaceEnd closes the current end, whose device is lost for the reason why,
// and opens another one, again and again until that succeeds or ctx ends. The
// session goes on.
func (c *Client) replaceEnd(ctx context.Context, why error, losses *losses) {
	lost := c.end.Load()
	name := lost.device.Name()
	c.degrade(noticeDevice, fmt.Sprintf("interface %s was lost and is made anew: %v", name, why))
	if err := lost.close(); err != nil {
		c.cfg.Logger.Warn("a lost interface leaves something behind", "interface", name, "error", err)
	}
	for {
		wait := losses.add(time.Now())
		c.cfg.Logger.Warn("the tunnel's interface is lost: making it anew", "interface", name, "reason", why, "retry_in", wait.String())
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if why = c.reopen(); why == nil {
			break
		}
		c.degrade(noticeDevice, fmt.Sprintf("interface %s was lost and cannot be made anew: %v", name, why))
	}
	text := ""
	if losses.many() {
		text = fmt.Sprintf("another program deletes interface %s again and again: stop it", name)
	}
	c.degrade(noticeDevice, text)
}

// reopen opens a new end, with what the last one had.
func (c *Client) reopen() error {
	if err := c.openEnd(); err != nil {
		return err
	}
	e := c.end.Load()
	c.mu.Lock()
	state, s := c.lastState, c.latest
	c.former.add(c.repairs)
	c.former.add(map[string]uint64{repairDevice: 1})
	c.repairs = nil
	c.setRepairs()
	c.mu.Unlock()
	err := c.closeKillSwitch(e.device.Name()) // which names it by a number
	if err == nil && state != nil {
		err = e.network.Apply(*state)
	}
	if err != nil {
		return errors.Join(err, e.close())
	}
	if s != nil {
		s.changed() // for DNS
	}
	return nil
}

// losses are devices that were lost one soon after another.
type losses struct {
	n    int
	last time.Time
}

// add counts a loss, or an attempt to make a device that failed, and returns
// how long to wait before the next attempt.
func (l *losses) add(now time.Time) time.Duration {
	if now.Sub(l.last) >= steadyDevice {
		l.n = 0
	}
	l.n++
	l.last = now
	if !l.many() {
		return 0
	}
	return min(firstDeviceDelay<<min(l.n-spareDevices-1, 16), maxDeviceDelay)
}

// many reports whether so many were lost that the next one has to wait.
func (l *losses) many() bool { return l.n > spareDevices }

// repairs are how often something was put right on this host, by kind.
type repairs map[string]uint64

func (r repairs) add(more map[string]uint64) {
	for kind, n := range more {
		r[kind] += n
	}
}

// noteHealth has the status say what the kernel has.
func (c *Client) noteHealth(h routing.Health) {
	c.degrade(noticeNetwork, h.Problem)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Interface = h.Interface
	c.present = h.Addresses
	c.showAddresses()
	c.repairs = h.Repairs
	c.setRepairs()
	if c.latest != nil && h.IPv6Held != c.ipv6Held {
		c.latest.changed()
	}
	c.ipv6Held = h.IPv6Held
	c.notify()
}

// noteKillSwitch has the status say whether the kill switch holds.
func (c *Client) noteKillSwitch(h routing.KillSwitchHealth) {
	switch {
	case h.Problem == "" && !h.Closed:
		h.Problem = "the kill switch is open"
	case !h.Closed:
		h.Problem = "the kill switch is open: " + h.Problem
	}
	c.degrade(noticeKillSwitch, h.Problem)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.KillSwitch = KillSwitchOpen
	if h.Closed {
		c.status.KillSwitch = KillSwitchClosed
	}
	c.killSwitchRepairs = h.Repairs
	c.setRepairs()
	c.notify()
}

// keepKillSwitch has the kill switch stay closed until ctx ends.
func (c *Client) keepKillSwitch(ctx context.Context) {
	if err := c.cfg.KillSwitch.Keep(ctx, c.noteKillSwitch); err != nil {
		c.cfg.Logger.Warn("it is not noticed when another program opens the kill switch", "error", err)
		c.degrade(noticeKillSwitch, fmt.Sprintf("it is not noticed when another program opens the kill switch: %v", err))
	}
}

// setRepairs fills in the status. c.mu is held.
func (c *Client) setRepairs() {
	all := make(repairs)
	all.add(c.former)
	all.add(c.repairs)
	if c.killSwitchRepairs > 0 {
		all[repairKillSwitch] = c.killSwitchRepairs
	}
	c.status.KernelRepairs = all
}

// assigned is an address of the tunnel, or a prefix, and the address that the
// interface has for it.
type assigned struct{ prefix, host netip.Prefix }

// showAddresses fills in the addresses that the interface has. c.mu is held.
func (c *Client) showAddresses() {
	c.status.Addresses = []netip.Prefix{}
	for _, a := range c.assigned {
		if slices.Contains(c.present, a.host) {
			c.status.Addresses = append(c.status.Addresses, a.prefix)
		}
	}
}
