//go:build quicpatch

package connectip

import "github.com/quic-go/quic-go"

// direct has in called for each datagram, by the goroutine that runs the connection, until stop is called.
func (d *datagrams) direct(in *inbox) (stop func()) {
	conn, ok := d.conn.(*quic.Conn)
	if !ok {
		return func() {}
	}
	conn.HandleDatagrams(d.id, in)
	return func() { conn.HandleDatagrams(d.id, nil) }
}
