package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"masquevpn/internal/endpoint"
	"masquevpn/internal/flowqueue"
	"masquevpn/routing"
)

// Keys of notices about this host.
const (
	noticeHost       = "host"
	noticeKillSwitch = "kill_switch"
	noticeResolver   = "resolver"
)

// checkDNSInterval is the time between two checks of the host's resolver.
const checkDNSInterval = 5 * time.Second

// repairKillSwitch and repairDNS are the kinds in Status.KernelRepairs besides
// the kinds of routing.Health.
const (
	repairKillSwitch = "kill_switch"
	repairDNS        = "dns"
)

// localEndpoint is this host's endpoint of the tunnel: a device and its
// configuration in the kernel and the resolver.
type localEndpoint struct {
	device   Device
	dispatch func([]*flowqueue.Packet)
	overflow endpoint.Overflow
	network  Network
	resolver Resolver // may be nil
}

// openEndpoint opens an endpoint and applies the configuration of the previous
// one.
func (c *Client) openEndpoint() (_ *localEndpoint, err error) {
	e := &localEndpoint{dispatch: c.dispatch}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	// The fields of e stay nil on failure: a nil pointer in an interface is not
	// nil.
	device, err := c.cfg.OpenDevice()
	if err != nil {
		return nil, err
	}
	e.device = device
	network, err := c.cfg.OpenNetwork(e.device)
	if err != nil {
		return nil, fmt.Errorf("setting up the network: %w", err)
	}
	e.network = network
	if c.cfg.OpenResolver != nil {
		resolver, err := c.cfg.OpenResolver(e.device)
		if err != nil {
			return nil, err
		}
		e.resolver = resolver
	}
	c.mu.Lock()
	c.status.Interface = e.device.Name()
	state, s := c.lastState, c.currentSession
	c.mu.Unlock()
	if state == nil {
		return e, nil
	}
	// The kill switch refers to the interface by its index, which has changed.
	if err := c.closeKillSwitch(e.device.Name()); err != nil {
		return nil, err
	}
	if err := e.network.Apply(*state); err != nil {
		return nil, err
	}
	if s != nil {
		s.changed() // apply configures the new resolver
	}
	return e, nil
}

func (e *localEndpoint) Name() string { return e.device.Name() }

func (e *localEndpoint) Device() endpoint.Device { return e.device }

// Read passes the packets of the device to dispatch until the device is closed.
func (e *localEndpoint) Read() error {
	if err := flowqueue.ReadFrom(e.device, e.dispatch); err != nil {
		return fmt.Errorf("reading from %s: %w", e.device.Name(), err)
	}
	return nil
}

func (e *localEndpoint) Maintain(ctx context.Context, report func(routing.Health)) error {
	return e.network.Maintain(ctx, report)
}

// Close restores the host. It begins with the resolver, so that no query goes
// to a nameserver without a route.
func (e *localEndpoint) Close() error {
	var errs []error
	if e.resolver != nil {
		errs = append(errs, e.resolver.Close())
	}
	if e.network != nil {
		errs = append(errs, e.network.Close())
	}
	if e.device != nil {
		errs = append(errs, e.device.Close())
	}
	return errors.Join(errs...)
}

// iface returns the name of the tunnel's interface.
func (c *Client) iface() string { return c.supervisor.Current().Name() }

// resolver returns the resolver of the current endpoint, which may be nil.
func (c *Client) resolver() Resolver {
	if e := c.supervisor.Current(); e != nil {
		return e.resolver
	}
	return nil
}

// noteHealth updates the status with the configuration that the kernel has.
func (c *Client) noteHealth(h routing.Health) {
	c.degrade(noticeHost, h.Problem)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Interface = h.Interface
	c.present = h.Addresses
	c.showAddresses()
	c.repairs = h.Repairs
	c.showRepairs()
	if c.currentSession != nil && h.IPv6Held != c.ipv6Held {
		c.currentSession.changed() // apply updates the warning about IPv6
	}
	c.ipv6Held = h.IPv6Held
	c.notify()
}

// noteKillSwitch updates the status of the kill switch.
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
	c.showRepairs()
	c.notify()
}

// maintainKillSwitch keeps the kill switch closed until ctx is done.
func (c *Client) maintainKillSwitch(ctx context.Context) {
	if err := c.cfg.KillSwitch.Maintain(ctx, c.noteKillSwitch); err != nil {
		c.cfg.Logger.Warn("cannot watch the kill switch",
			"error", err)
		c.degrade(noticeKillSwitch,
			fmt.Sprintf("cannot watch the kill switch, which other programs may open: %v", err))
	}
}

// showRepairs updates Status.KernelRepairs. c.mu is held.
func (c *Client) showRepairs() {
	all := make(map[string]uint64)
	maps.Copy(all, c.repairs)
	if c.killSwitchRepairs > 0 {
		all[repairKillSwitch] = c.killSwitchRepairs
	}
	if c.dnsRepairs > 0 {
		all[repairDNS] = c.dnsRepairs
	}
	c.status.KernelRepairs = all
}

// maintainDNS restores the resolver's settings when other programs change them,
// until ctx is done, and updates the status.
func (c *Client) maintainDNS(ctx context.Context) {
	tick := time.NewTicker(checkDNSInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if r := c.resolver(); r != nil {
			c.noteDNS(r.Check())
		}
	}
}

// noteDNS updates the status with the results of Resolver.Check.
func (c *Client) noteDNS(restored string, err error) {
	c.mu.Lock()
	d := c.status.DNS
	wasApplied := d.Applied || c.dnsLost
	if wasApplied {
		d.Applied, d.Reason = err == nil, reason(err)
		c.status.DNS = d
	}
	lost, before := wasApplied && err != nil, c.dnsLost
	c.dnsLost = lost
	if restored != "" {
		c.dnsRepairs++
		c.showRepairs()
	}
	c.mu.Unlock()
	switch {
	case restored != "":
		c.cfg.Logger.Warn("another program changed this host's DNS: restored", "restored",
			restored)
	case lost && !before:
		c.cfg.Logger.Warn("another program changed this host's DNS, and it cannot be restored",
			"error", err)
	}
	text := ""
	if lost {
		text = "another program changed this host's DNS, and it cannot be restored: " + reason(err)
	}
	c.degrade(noticeResolver, text)
}

// assigned is an assigned address or prefix, and the address that the interface
// has from it.
type assigned struct{ prefix, host netip.Prefix }

// showAddresses updates Status.Addresses. c.mu is held.
func (c *Client) showAddresses() {
	c.status.Addresses = []netip.Prefix{}
	for _, a := range c.assigned {
		if slices.Contains(c.present, a.host) {
			c.status.Addresses = append(c.status.Addresses, a.prefix)
		}
	}
}
