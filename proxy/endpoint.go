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
