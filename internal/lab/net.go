package lab

import (
	"context"
	"fmt"
	"net"
)

// Listen listens in the host, as [net.Listen] does. Lab.Close closes the
// listener if the caller has not.
func (h *Host) Listen(network, address string) (net.Listener, error) {
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen(network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	if !h.lab.own(closeQuietly{ln}) {
		return nil, errClosed
	}
	return ln, nil
}

// ListenPacket listens in the host, as [net.ListenPacket] does. Lab.Close
// closes the socket if the caller has not.
func (h *Host) ListenPacket(network, address string) (net.PacketConn, error) {
	var conn net.PacketConn
	err := h.Do(func() (err error) {
		conn, err = net.ListenPacket(network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	if !h.lab.own(closeQuietly{conn}) {
		return nil, errClosed
	}
	return conn, nil
}

// DialContext connects from the host, and fits [net/http.Transport]. The
// address must be an IP address and a port, because names are not looked up in
// the host's files.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	if net.ParseIP(name) == nil {
		return nil, fmt.Errorf("lab: host %s: dial %s: not an IP address", h.name, address)
	}
	var conn net.Conn
	err = h.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	return conn, nil
}

// closeQuietly ignores errors, because the user may have closed c already.
type closeQuietly struct{ c interface{ Close() error } }

func (c closeQuietly) Close() error {
	c.c.Close()
	return nil
}
