//go:build quicpatch

package client

import "context"

// move moves the connection to a new socket, once packets have come from the
// proxy there (RFC 9000 section 9). The former one serves what is under way
// until leave is called. The socket is not bound to an address, so the new path
// begins where the kernel sends packets to the proxy from now.
func (d *dialed) migrate(ctx context.Context, dialer *dialer) error {
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
	d.closeFormer()
	previous := *d
	d.closeFormer = func() {
		if previous.path != nil {
			_ = previous.path.Close()
		}
		_ = previous.transport.Abandon()
		_ = previous.socket.Close()
		d.closeFormer = func() {}
	}
	d.transport, d.socket, d.path = t, socket, path
	return nil
}
