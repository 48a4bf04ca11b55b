package client

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// fakeHosts records the devices and networks that a client opens.
type fakeHosts struct {
	mu       sync.Mutex
	devices  []*tuntest.Device
	networks []*routingtest.Network
}

func (h *fakeHosts) config(c *Config) {
	c.OpenDevice = func() (Device, error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		d := tuntest.New(1400)
		h.devices = append(h.devices, d)
		return d, nil
	}
	c.OpenNetwork = func(Device) (Network, error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		n := &routingtest.Network{Health: make(chan routing.Health), Lost: make(chan error, 1)}
		h.networks = append(h.networks, n)
		return n, nil
	}
}

// last returns the device and the network that were opened last.
func (h *fakeHosts) last() (*tuntest.Device, *routingtest.Network) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.devices[len(h.devices)-1], h.networks[len(h.networks)-1]
}

// healthy is the health of a kernel that has the whole configuration.
var healthy = routing.Health{
	Interface: "tuntest", Addresses: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32"),
		netip.MustParsePrefix("fd77::2/128")},
}

// If another program deletes the device, the client opens another one with the
// same addresses and routes, and the session survives.
func TestDeletedDevice(t *testing.T) {
	f := startProxy(t, nil)
	h, k := &fakeHosts{}, &killSwitch{}
	n := startClient(t, f, func(c *Config) {
		h.config(c)
		c.KillSwitch = k
	})
	n.awaitConnected(t)
	session := f.Sessions()[0].ID
	_, before := h.last()
	before.Lost <- routing.ErrInterfaceGone
	n.await(t, "on another device", func(s Status) bool { return s.KernelRepairs["device"] == 1 })
	device, after := h.last()
	if after == before || !before.Closed() {
		t.Fatal("the previous network is not closed")
	}
	if got, want := after.States()[0], before.Last(); !slices.Equal(got.Routes, want.Routes) ||
		!slices.Equal(got.Addresses, want.Addresses) {
		t.Errorf("the kernel has %+v, want %+v", got, want)
	}
	k.mu.Lock()
	if n := len(k.events); n < 3 || k.events[n-1] != `close but for "tuntest"` {
		t.Errorf("the kill switch does not follow the new device: %q", k.events)
	}
	k.mu.Unlock()
	after.Health <- healthy
	n.awaitConnected(t)
	n.device = device
	carries(t, n, f, "10.77.0.2", "192.0.2.2")
	if s := f.Sessions(); len(s) != 1 || s[0].ID != session || n.Status().Reconnects != 0 {
		t.Errorf("sessions %+v, want %s alone", s, session)
	}
}

// The state is degraded while the kernel lacks part of the configuration, and
// the status has the addresses that remain.
func TestStatusFollowsTheKernel(t *testing.T) {
	f := startProxy(t, nil)
	h := &fakeHosts{}
	n := startClient(t, f, h.config)
	n.awaitConnected(t)
	_, kernel := h.last()
	lost := healthy
	lost.Addresses, lost.Problem, lost.Repairs = healthy.Addresses[1:], "another program undoes it",
		map[string]uint64{"address": 6}
	kernel.Health <- lost
	n.await(t, "degraded", func(s Status) bool {
		return s.State == StateDegraded && s.Reason == "another program undoes it" &&
			s.KernelRepairs["address"] == 6 &&
			slices.Equal(s.Addresses, lost.Addresses)
	})
	kernel.Health <- healthy
	n.await(t, "well again", func(s Status) bool {
		return s.State == StateConnected && slices.Equal(s.Addresses, healthy.Addresses)
	})
}

// The client reacts when IPv6 is turned off or on during a session.
func TestIPv6TurnedOffLater(t *testing.T) {
	f := startProxy(t, nil)
	h := &fakeHosts{}
	n := startClient(t, f, h.config)
	n.awaitConnected(t)
	_, kernel := h.last()
	kernel.SetHeld(routing.ErrIPv6Disabled)
	held := healthy
	held.IPv6Held, held.Addresses = true, healthy.Addresses[:1]
	kernel.Health <- held
	n.await(t, "without IPv6", func(s Status) bool {
		return len(s.Routes) == 1 && slices.Equal(s.Addresses, held.Addresses)
	})
	kernel.SetHeld(nil)
	kernel.Health <- healthy
	n.await(t, "with IPv6", func(s Status) bool {
		return len(s.Routes) == 2 && slices.Equal(s.Addresses, healthy.Addresses)
	})
}

// The state is degraded while another program keeps the kill switch open.
func TestOpenedKillSwitch(t *testing.T) {
	f := startProxy(t, nil)
	k := &killSwitch{health: make(chan routing.KillSwitchHealth)}
	n := startClient(t, f, func(c *Config) { c.KillSwitch = k })
	n.awaitConnected(t)
	k.health <- routing.KillSwitchHealth{Closed: true, Repairs: 1}
	n.await(t, "closed again", func(s Status) bool {
		return s.State == StateConnected && s.KillSwitch == KillSwitchClosed &&
			s.KernelRepairs["kill_switch"] == 1
	})
	k.health <- routing.KillSwitchHealth{Problem: "no memory", Repairs: 1}
	n.await(t, "open", func(s Status) bool {
		return s.State == StateDegraded && s.KillSwitch == KillSwitchOpen &&
			s.Reason == "the kill switch is open: no memory"
	})
	k.health <- routing.KillSwitchHealth{Closed: true, Repairs: 2}
	n.await(t, "well again", func(s Status) bool {
		return s.State == StateConnected && s.KillSwitch == KillSwitchClosed
	})
}

// The state is degraded while the resolver lacks the tunnel's settings.
func TestLostDNS(t *testing.T) {
	f := startProxy(t, pushing(corp))
	r := &fakeResolver{}
	n := startClient(t, f, r.config)
	n.await(t, "applied", func(s Status) bool { return s.State == StateConnected && s.DNS.Applied })
	r.change("", errors.New("somebody else's file"))
	n.noteDNS(r.Check())
	if s := n.Status(); s.State != StateDegraded || s.DNS.Applied ||
		s.DNS.Reason != "somebody else's file" {
		t.Errorf("lost: %+v", s)
	}
	r.change("the servers", nil)
	n.noteDNS(r.Check())
	if s := n.Status(); s.State != StateConnected || !s.DNS.Applied || s.DNS.Reason != "" ||
		s.KernelRepairs["dns"] != 1 {
		t.Errorf("restored: %+v", s)
	}
}
