package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"go4.org/netipx"
	"golang.org/x/time/rate"

	"masquevpn/routing"
)

const (
	// localInterval is the time between looks at the host's own addresses,
	// which clients may not reach, besides those that the kernel asks for by
	// telling of changes.
	localInterval = 10 * time.Second
	// settleDelay lets changes that come together be made together.
	settleDelay = 20 * time.Millisecond
	// changeRate and changeBurst are how often in a second, and how often at
	// once, what sites say has an effect on all others.
	changeRate  = 1
	changeBurst = 10
)

// keepNetwork makes the kernel, the table and the sessions follow what sites
// say, and the host's own addresses, until ctx ends.
func (s *Server) keepNetwork(ctx context.Context) error {
	tick := time.NewTicker(localInterval)
	defer tick.Stop()
	var addressesChanged <-chan struct{}
	if w, err := routing.Watch(0); err != nil {
		s.cfg().Logger.Warn("cannot follow the host's own addresses and the networks of sites",
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
		case <-tick.C: // what failed is tried again
			err = s.readLocal()
		case <-addressesChanged:
			err = s.readLocal()
		case <-s.sites.changed:
			time.Sleep(settleDelay)
			if pace.Wait(ctx) != nil {
				return nil
			}
		}
		if err = errors.Join(err, s.refresh()); err != nil {
			s.cfg().Logger.Warn("cannot follow the host's own addresses and the networks of sites",
				"error", err)
		}
	}
}

// readLocal reads the host's own addresses.
func (s *Server) readLocal() error {
	read := s.cfg().LocalNetworks
	if read == nil {
		read = func() ([]netip.Prefix, error) {
			return localNetworks(s.supervisor.Current().Name())
		}
	}
	local, err := read()
	if err != nil {
		return err
	}
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	s.local = local
	return nil
}

// refresh does once what keepNetwork does, with the host's addresses as they
// were read last.
func (s *Server) refresh() error {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	var reserved []reservedNetwork
	for _, p := range s.pool.Prefixes() {
		reserved = append(reserved, reservedNetwork{p, "the pool of addresses for clients"})
	}
	for _, p := range s.local {
		reserved = append(reserved, reservedNetwork{p.Masked(), "a network of the proxy's host"})
	}
	s.sites.setCommonRoutes(s.cfg().advertised())
	l := s.sites.decide(reserved)
	// What may pass is settled before the kernel sends anything.
	if err := s.deny(l); err != nil {
		return err
	}
	for _, ss := range s.sessions.list() {
		if tunnel, ok := ss.(*ipSession); ok {
			if err := tunnel.followSites(); err != nil {
				tunnel.stop(err) // the other sessions go on
			}
		}
	}
	if err := s.install(l); err != nil {
		s.cfg().Logger.Error("the networks of the sites cannot be installed; trying again",
			"retry_in", localInterval.String(), "error", err)
	}
	return nil
}

// install makes the kernel follow l. What the kernel was told already, it keeps
// by itself, see localEndpoint.Maintain.
func (s *Server) install(l layout) error {
	state := s.networkState(l)
	if s.installed != nil && slices.Equal(state.Routes, s.installed.Routes) &&
		slices.Equal(state.Addresses, s.installed.Addresses) {
		return nil
	}
	err := s.supervisor.Current().network.Apply(state)
	if errors.Is(err, routing.ErrInterfaceGone) || errors.Is(err, os.ErrClosed) {
		err = nil // the next end gets it
	}
	if err != nil {
		return err
	}
	s.installed = &state
	return nil
}

// reinstall has the kernel be told again, by the next refresh, whatever it was
// told before.
func (s *Server) reinstall() {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	s.installed = nil
}

// networkState is what the kernel shall have.
func (s *Server) networkState(l layout) routing.State {
	state := routing.State{
		MTU: s.mtu, Forward: true,
		Addresses: slices.Concat(s.pool.GatewayPrefixes(), l.addresses),
		Routes:    l.networks,
	}
	if s.cfg().Masquerade {
		state.Masquerade = s.pool.Prefixes()
		state.Listen = s.ports
	}
	return state
}

// denied is where packets of clients may not go, for clients that are gateways
// of sites and for others.
type denied struct{ clients, sites []netip.Prefix }

// of returns what is denied to ss, whoever its user is.
func (d denied) of(ss session) []netip.Prefix {
	if ss.isSite() {
		return d.sites
	}
	return d.clients
}

// deny works out where packets of clients may not go: the built-in and the
// configured destinations, the proxy's own addresses other than those in the
// tunnel, and other clients, with the networks behind them, unless they may be
// reached. Sites reach each other all the same.
func (s *Server) deny(l layout) error {
	var b netipx.IPSetBuilder
	for _, p := range builtinDenied {
		b.AddPrefix(p)
	}
	for _, p := range l.networks {
		b.RemovePrefix(p)
	}
	for _, p := range slices.Concat(s.local, l.addresses) {
		b.Add(p.Addr())
	}
	cfg := s.cfg()
	for _, p := range s.pool.Prefixes() {
		if cfg.ClientToClient {
			b.RemovePrefix(p)
		} else {
			b.AddPrefix(p)
		}
	}
	for _, g := range s.pool.Gateways() {
		b.Remove(g)
	}
	forClients, forSites := b.Clone(), &b
	if !cfg.ClientToClient {
		for _, p := range l.networks {
			forClients.AddPrefix(p)
		}
	}
	for _, p := range l.leased {
		forSites.RemovePrefix(p)
	}
	for _, p := range cfg.Deny { // last: what the operator denies stays denied
		forClients.AddPrefix(p)
		forSites.AddPrefix(p)
	}
	for _, b := range []*netipx.IPSetBuilder{forClients, forSites} {
		if err := addEmbedded(b, s.dns.Load().NAT64); err != nil {
			return err
		}
	}
	clients, err := forClients.IPSet()
	if err != nil {
		return err
	}
	sites, err := forSites.IPSet()
	if err != nil {
		return err
	}
	now := denied{clients.Prefixes(), sites.Prefixes()}
	s.mu.Lock()
	before := s.denied
	s.denied = now
	s.mu.Unlock()
	for _, ss := range s.sessions.list() {
		if d := now.of(ss); !slices.Equal(d, before.of(ss)) {
			if err := ss.updateDenied(); err != nil {
				ss.base().stop(err) // the other sessions go on
			}
		}
	}
	return nil
}

func (s *Server) deniedNow() denied {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.denied
}

// localNetworks returns the addresses of this host's interfaces with the
// lengths of their networks, but for those of one.
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
