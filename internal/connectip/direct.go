//go:build quicpatch

package connectip

import (
	"time"

	"github.com/quic-go/quic-go"
)

// quicConn returns the connection, or nil if a test replaced it.
func (d *datagrams) quicConn() *quic.Conn {
	conn, _ := d.conn.(*quic.Conn)
	return conn
}

// ready reports whether send would not block.
func (d *datagrams) ready() bool {
	conn := d.quicConn()
	return conn != nil && !conn.DatagramsWaiting()
}

// isDirect reports whether datagrams arrive through direct. Otherwise they
// arrive through Stream.ReceiveDatagram.
func (d *datagrams) isDirect() bool { return d.quicConn() != nil }

// direct makes the goroutine that runs the connection pass each datagram of the
// stream to in, until stop is called. This saves a queue and the waking of a
// goroutine.
func (d *datagrams) direct(in *inbox) (stop func()) {
	conn := d.quicConn()
	if conn == nil {
		return func() {}
	}
	conn.HandleDatagrams(d.id, in)
	return func() { conn.HandleDatagrams(d.id, nil) }
}

// oldestReceived returns for how long the connection's oldest received packet
// has been waiting for QUIC to process it, or 0 if none waits.
func (d *datagrams) oldestReceived() time.Duration {
	if conn := d.quicConn(); conn != nil {
		return conn.OldestReceived()
	}
	return 0
}

// sendNow sends a frame, or returns errNoRoom if QUIC's queue is full.
func (d *datagrams) sendNow(frame []byte) error {
	conn := d.quicConn()
	if conn == nil {
		return d.conn.SendDatagram(frame)
	}
	taken, err := conn.SendDatagramNow(frame)
	if err == nil && !taken {
		err = errNoRoom
	}
	return err
}
