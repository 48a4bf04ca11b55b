//go:build quicpatch

package connectip

import (
	"time"

	"github.com/quic-go/quic-go"
)

// real is the connection, nil where a test has something else in its place.
func (d *datagrams) real() *quic.Conn {
	conn, _ := d.conn.(*quic.Conn)
	return conn
}

// ready reports whether send would not wait.
func (d *datagrams) ready() bool {
	conn := d.real()
	return conn != nil && !conn.DatagramsWaiting()
}

// isDirect reports whether direct does what it says.
func (d *datagrams) isDirect() bool { return d.real() != nil }

// direct has in called for each datagram, by the goroutine that runs the
// connection, until stop is called.
func (d *datagrams) direct(in *inbox) (stop func()) {
	conn := d.real()
	if conn == nil {
		return func() {}
	}
	conn.HandleDatagrams(d.id, in)
	return func() { conn.HandleDatagrams(d.id, nil) }
}

// oldestReceived returns for how long the oldest packet of the connection waits
// for QUIC to look at it, 0 for none.
func (d *datagrams) oldestReceived() time.Duration {
	if conn := d.real(); conn != nil {
		return conn.OldestReceived()
	}
	return 0
}

// sendNow is send that does not wait: without room in QUIC's queue it returns
// errNoRoom.
func (d *datagrams) sendNow(frame []byte) error {
	conn := d.real()
	if conn == nil {
		return d.conn.SendDatagram(frame)
	}
	taken, err := conn.SendDatagramNow(frame)
	if err == nil && !taken {
		err = errNoRoom
	}
	return err
}
