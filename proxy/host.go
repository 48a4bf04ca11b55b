package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"masquevpn/internal/endpoint"
	"masquevpn/internal/flowqueue"
	"masquevpn/proxy/internal/addrpool"
	"masquevpn/routing"
	"masquevpn/tun"
)

const (
	// localInterval is the time after which the host's own addresses are read
	// again without a notification of the kernel. Clients may not reach them.
	localInterval = 10 * time.Second

	// settleDelay is the time to collect changes of sites that are made
	// together.
	settleDelay = 20 * time.Millisecond

	// changeRate and changeBurst limit the refreshes because of changed claims,
	// in refreshes per second, so that one site cannot keep all others busy.
	changeRate  = 1
	changeBurst = 10
)

// host keeps this host as the sites and the configuration need it: the device,
// its routes and addresses in the kernel, and the sessions that depend on them.
type host struct {
	cfg      func() *Config
	pool     *addrpool.Pool
	sites    *sites
	sessions *sessions
	access   *access

	supervisor endpoint.Supervisor[*localEndpoint]

	// dispatch takes packets from the device. It is set before start.
	dispatch func([]*flowqueue.Packet)

	// ports are the UDP ports that the proxy listens on. They are set before
	// start.
	ports []uint16

	refreshing sync.Mutex // held during a refresh; guards the fields below

	mtu int // MTU of the device, in bytes

	// installed is the state that the kernel was told last. nil means that the
	// next refresh tells it in any case.
	installed *routing.State

	// local are the host's addresses with the prefix lengths of their networks.
	local []netip.Prefix

	mu     sync.Mutex
	health routing.Health // guarded by mu
}

func newHost(cfg func() *Config, logger *slog.Logger, p *addrpool.Pool, t *sites, l *sessions,
	a *access) *host {
	h := &host{cfg: cfg, pool: p, sites: t, sessions: l, access: a}
	h.supervisor.Open, h.supervisor.Report, h.supervisor.Logger = h.openEndpoint, h.setHealth,
		logger
	return h
}

// name returns the name of the current device.
func (h *host) name() string { return h.supervisor.Current().Name() }

// maintain refreshes when claims of sites or the host's own addresses change,
// until ctx ends.
func (h *host) maintain(ctx context.Context) error {
	tick := time.NewTicker(localInterval)
	defer tick.Stop()
	var addressesChanged <-chan struct{}
	if w, err := routing.Watch(0); err != nil {
		h.cfg().Logger.Warn("cannot follow the host's own addresses and the networks of sites",
			"error", err)
	} else {
		defer w.Close()
		addressesChanged = w.Changed()
	}
	pace := rate.NewLimiter(changeRate, changeBurst)
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C: // retries a failed refresh too
			err = h.readLocal()
		case <-addressesChanged:
			err = h.readLocal()
		case <-h.sites.changed:
			time.Sleep(settleDelay)
			if pace.Wait(ctx) != nil {
				return nil
			}
		}
		if err = errors.Join(err, h.refresh()); err != nil {
			h.cfg().Logger.Warn("cannot follow the host's own addresses and the networks of sites",
				"error", err)
		}
	}
}

// readLocal reads the host's own addresses.
func (h *host) readLocal() error {
	read := h.cfg().LocalNetworks
	if read == nil {
		read = func() ([]netip.Prefix, error) {
			return localNetworks(h.name())
		}
	}
	local, err := read()
	if err != nil {
		return err
	}
	h.refreshing.Lock()
	defer h.refreshing.Unlock()
	h.local = local
	return nil
}

// refresh decides about the sites, with the host's addresses as they were read
// last. It applies the decision to the forwarding table, the sessions and the
// kernel, in this order: packets must be allowed before the kernel sends any.
func (h *host) refresh() error {
	h.refreshing.Lock()
	defer h.refreshing.Unlock()
	var reserved []reservedNetwork
	for _, p := range h.pool.Prefixes() {
		reserved = append(reserved, reservedNetwork{p, "the pool of addresses for clients"})
	}
	for _, p := range h.local {
		reserved = append(reserved, reservedNetwork{p.Masked(), "a network of the proxy's host"})
	}
	h.sites.setCommonRoutes(h.cfg().advertised())
	l := h.sites.decide(reserved)
	if err := h.updateAccess(l); err != nil {
		return err
	}
	for _, ss := range h.sessions.list() {
		if tunnel, ok := ss.(*ipSession); ok {
			if err := tunnel.followSites(); err != nil {
				tunnel.stop(err) // the other sessions go on
			}
		}
	}
	if err := h.install(l); err != nil {
		h.cfg().Logger.Error("the networks of the sites cannot be installed; trying again",
			"retry_in", localInterval.String(), "error", err)
	}
	return nil
}

// updateAccess applies the destinations that clients may not reach, with the
// sites in l, to the sessions. h.refreshing is held.
func (h *host) updateAccess(l layout) error {
	before, now, err := h.access.update(h.local, l)
	if err != nil {
		return err
	}
	for _, ss := range h.sessions.list() {
		if d := now.of(ss.isSite()); !slices.Equal(d, before.of(ss.isSite())) {
			if err := ss.updateDenied(); err != nil {
				ss.base().stop(err) // the other sessions go on
			}
		}
	}
	return nil
}

// install configures the kernel for the sites in l, if that changes the state
// installed last. Between changes localEndpoint.Maintain keeps the state.
func (h *host) install(l layout) error {
	state := h.state(l)
	if h.installed != nil && slices.Equal(state.Routes, h.installed.Routes) &&
		slices.Equal(state.Addresses, h.installed.Addresses) {
		return nil
	}
	err := h.supervisor.Current().network.Apply(state)
	if errors.Is(err, routing.ErrInterfaceGone) || errors.Is(err, os.ErrClosed) {
		err = nil // openEndpoint applies it to the next endpoint
	}
	if err != nil {
		return err
	}
	h.installed = &state
	return nil
}

// reinstall makes the next refresh configure the kernel in any case.
func (h *host) reinstall() {
	h.refreshing.Lock()
	defer h.refreshing.Unlock()
	h.installed = nil
}

// state returns the kernel state for the sites in l.
func (h *host) state(l layout) routing.State {
	state := routing.State{
		MTU: h.mtu, Forward: true,
		Addresses: slices.Concat(h.pool.GatewayPrefixes(), l.addresses),
		Routes:    l.networks,
	}
	if h.cfg().Masquerade {
		state.Masquerade = h.pool.Prefixes()
		state.Listen = h.ports
	}
	return state
}

// openEndpoint opens an endpoint and applies the configuration of the previous
// one.
func (h *host) openEndpoint() (_ *localEndpoint, err error) {
	e := &localEndpoint{dispatch: h.dispatch}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	// A device or network is assigned only without an error: with one, it may
	// be a nil pointer in a non-nil interface.
	device, err := h.openDevice()
	if err != nil {
		return nil, err
	}
	e.device = device
	network, err := h.openNetwork(e.device)
	if err != nil {
		return nil, fmt.Errorf("setting up the network: %w", err)
	}
	e.network = network
	h.refreshing.Lock()
	defer h.refreshing.Unlock()
	if h.installed == nil {
		h.mtu = e.device.MTU()
		state := h.state(layout{})
		h.installed = &state
	}
	if err := e.network.Apply(*h.installed); err != nil {
		return nil, fmt.Errorf("setting up the network: %w", err)
	}
	return e, nil
}

func (h *host) openDevice() (Device, error) {
	if open := h.cfg().OpenDevice; open != nil {
		return open()
	}
	c := h.cfg().TUN
	c.Logger = h.cfg().Logger
	if c.MTU == 0 {
		c.MTU = autoMTU
	}
	return tun.Open(c)
}

func (h *host) openNetwork(d Device) (Network, error) {
	if open := h.cfg().OpenNetwork; open != nil {
		return open(d)
	}
	return routing.Open(routing.Config{Instance: "proxy-" + d.Name(), Interface: d.Name(),
		Journal: h.cfg().Journal, Logger: h.cfg().Logger})
}

// setHealth notes the health of the device's configuration in the kernel.
func (h *host) setHealth(health routing.Health) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.health = health
}

// healthNow returns the health of the device's configuration in the kernel.
func (h *host) healthNow() routing.Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.health
}

// localNetworks returns the addresses of this host's interfaces, all except
// one, with the prefix lengths of their networks.
func localNetworks(except string) ([]netip.Prefix, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var own []net.Addr
	if i := slices.IndexFunc(interfaces, func(i net.Interface) bool {
		return i.Name == except
	}); i >= 0 {
		if own, err = interfaces[i].Addrs(); err != nil {
			return nil, err
		}
	}
	out := addrPrefixes(all)
	for _, p := range addrPrefixes(own) {
		if i := slices.Index(out, p); i >= 0 {
			out = slices.Delete(out, i, i+1)
		}
	}
	return out, nil
}

func addrPrefixes(addrs []net.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if local, ok := netip.AddrFromSlice(n.IP); ok {
				bits, _ := n.Mask.Size()
				out = append(out, netip.PrefixFrom(local.Unmap(), bits))
			}
		}
	}
	return out
}
