package proxy

import (
	"context"
	"errors"
	"fmt"
	"os"

	"masquevpn/internal/endpoint"
	"masquevpn/internal/flowqueue"
	"masquevpn/routing"
	"masquevpn/tun"
)

// localEndpoint is this host's endpoint of all tunnels: the device and its
// configuration in the kernel.
type localEndpoint struct {
	device   Device
	network  Network
	dispatch func([]*flowqueue.Packet)
	overflow endpoint.Overflow
}

// openEndpoint opens an endpoint and applies the configuration of the previous
// one.
func (s *Server) openEndpoint() (_ *localEndpoint, err error) {
	e := &localEndpoint{dispatch: s.dispatch}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	// What could not be opened is not assigned: it may be a nil pointer in an
	// interface, which is not nil.
	device, err := s.openDevice()
	if err != nil {
		return nil, err
	}
	e.device = device
	network, err := s.openNetwork(e.device)
	if err != nil {
		return nil, fmt.Errorf("setting up the network: %w", err)
	}
	e.network = network
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	if s.installed == nil {
		s.mtu = e.device.MTU()
		state := s.networkState(layout{})
		s.installed = &state
	}
	if err := e.network.Apply(*s.installed); err != nil {
		return nil, fmt.Errorf("setting up the network: %w", err)
	}
	return e, nil
}

func (s *Server) openDevice() (Device, error) {
	if open := s.cfg().OpenDevice; open != nil {
		return open()
	}
	c := s.cfg().TUN
	c.Logger = s.cfg().Logger
	if c.MTU == 0 {
		c.MTU = autoMTU
	}
	return tun.Open(c)
}

func (s *Server) openNetwork(d Device) (Network, error) {
	if open := s.cfg().OpenNetwork; open != nil {
		return open(d)
	}
	return routing.Open(routing.Config{Instance: "proxy-" + d.Name(), Interface: d.Name(),
		Journal: s.cfg().Journal, Logger: s.cfg().Logger})
}

// openError makes an Error of why the first end cannot be opened.
func openError(err error) error {
	e := &Error{Kind: KindFailure, Reason: err.Error(), Err: err}
	if errors.Is(err, tun.ErrPermission) || errors.Is(err, os.ErrPermission) {
		e.Kind = KindPrivileges
	}
	return e
}

func (e *localEndpoint) Name() string { return e.device.Name() }

func (e *localEndpoint) Device() endpoint.Device { return e.device }

// Read takes packets from the device to the sessions they are for, until the
// device is closed.
func (e *localEndpoint) Read() error {
	if err := flowqueue.ReadFrom(e.device, e.dispatch); err != nil {
		return fmt.Errorf("reading from %s: %w", e.device.Name(), err)
	}
	return nil
}

func (e *localEndpoint) Maintain(ctx context.Context, report func(routing.Health)) error {
	return e.network.Maintain(ctx, report)
}

// Close restores the host. The kernel's side goes before the device: addresses
// and routes are removed from it.
func (e *localEndpoint) Close() (err error) {
	if e.network != nil {
		err = e.network.Close()
	}
	if e.device != nil {
		err = errors.Join(err, e.device.Close())
	}
	return err
}

// noteHealth has the status say how the kernel's side is.
func (s *Server) noteHealth(h routing.Health) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.health = h
}

// Problem returns what of the kernel's side is not as clients need it, and what
// to do about it; "" when all is well.
func (s *Server) Problem() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.health.Problem
}
