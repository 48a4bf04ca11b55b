//go:build quicpatch

package connectip

import "github.com/quic-go/quic-go"

// ready reports whether send would not wait.
func (d *datagrams) ready() bool {
	conn, ok := d.conn.(*quic.Conn)
	return ok && !conn.DatagramsWaiting()
}

// isDirect reports whether direct does what it says.
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
