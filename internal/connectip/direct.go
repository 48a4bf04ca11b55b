//go:build quicpatch

package connectip

import "github.com/quic-go/quic-go"

// isDirect reports whether direct does that.
func (d *datagrams) isDirect() bool {
	_, ok := d.conn.(*quic.Conn)
	return ok
}

// direct has in called for each datagram, by the goroutine that runs the connection, until stop is called.
func (d *datagrams) direct(in *inbox) (stop func()) {
	if !d.isDirect() {
		return func() {}
	}
	conn := d.conn.(*quic.Conn)
	conn.HandleDatagrams(d.id, in)
	return func() { conn.HandleDatagrams(d.id, nil) }
}
