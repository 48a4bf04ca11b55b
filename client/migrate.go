//go:build quicpatch

package client

import "context"

// migrate moves the connection to a new socket, once the proxy has answered
// there (RFC 9000 section 9). The old socket receives packets under way until
// closePrevious is called. The new socket is not bound to an address, so the
// kernel chooses its source address and interface by the current routes.
func (d *dialed) migrate(ctx context.Context, dialer *dialer) error {
	t, socket, err := dialer.dial.Open(ctx, d.remote)
	if err != nil {
		return err
	}
	socket.IgnoreSendErrors()
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
	d.closePrevious()
	previous := *d
	d.closePrevious = func() {
		if previous.path != nil {
			_ = previous.path.Close()
		}
		_ = previous.transport.Abandon()
		_ = previous.socket.Close()
		d.closePrevious = func() {}
	}
	d.transport, d.socket, d.path = t, socket, path
	return nil
}
