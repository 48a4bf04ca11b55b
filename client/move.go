//go:build quicpatch

package client

import "context"

// move moves the connection to a new socket, once packets have come from the
// proxy there (RFC 9000 section 9). The former one serves what is under way
// until leave is called. The socket is not bound to an address, so the new path
// begins where the kernel sends packets to the proxy from now.
func (d *dialed) move(ctx context.Context, dialer *dialer) error {
	t, socket, err := dialer.open(ctx, d.remote)
	if err != nil {
		return err
	}
	socket.LoseUnsent()
	path, err := d.conn.AddPath(t)
	if err == nil {
		if err = path.Probe(ctx); err == nil {
			err = path.Switch()
		}
		if err != nil {
			_ = path.Close()
		}
	}
	if err != nil {
		_ = t.Abandon()
		_ = socket.Close()
		return err
	}
	d.leave()
	former := *d
	d.leave = func() {
		if former.path != nil {
			_ = former.path.Close()
		}
		_ = former.transport.Abandon()
		_ = former.socket.Close()
		d.leave = func() {}
	}
	d.transport, d.socket, d.path = t, socket, path
	return nil
}
