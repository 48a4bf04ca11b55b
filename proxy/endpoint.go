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
	device   Device  // nil if it could not be opened
	network  Network // nil if it could not be opened
	dispatch func([]*flowqueue.Packet)
	overflow endpoint.Overflow
}

// openError returns the *Error for err, which opening the first endpoint
// returned.
func openError(err error) error {
	e := &Error{Kind: KindFailure, Reason: err.Error(), Err: err}
	if errors.Is(err, tun.ErrPermission) || errors.Is(err, os.ErrPermission) {
		e.Kind = KindPrivileges
	}
	return e
}

func (e *localEndpoint) Name() string { return e.device.Name() }

func (e *localEndpoint) Device() endpoint.Device { return e.device }

// Read dispatches packets from the device to their sessions until the device is
// closed.
func (e *localEndpoint) Read() error {
	if err := flowqueue.ReadFrom(e.device, e.dispatch); err != nil {
		return fmt.Errorf("reading from %s: %w", e.device.Name(), err)
	}
	return nil
}

func (e *localEndpoint) Maintain(ctx context.Context, report func(routing.Health)) error {
	return e.network.Maintain(ctx, report)
}

// Close restores the host. The network is closed before the device, because it
// removes addresses and routes from the device.
func (e *localEndpoint) Close() (err error) {
	if e.network != nil {
		err = e.network.Close()
	}
	if e.device != nil {
		err = errors.Join(err, e.device.Close())
	}
	return err
}
