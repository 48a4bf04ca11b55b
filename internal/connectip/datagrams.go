package connectip

import (
	"errors"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/internal/capture"
	"masquevpn/tun"
)

// maxPrefix is the maximum length in bytes of a datagram's prefix: the quarter
// stream ID and the context ID. Callers of Conn.Send leave tun.Headroom bytes
// free for it.
const maxPrefix = 8 + 1

var _ [tun.Headroom - maxPrefix]struct{} // fails to compile if the prefix does not fit

// contextIPPacket is the context ID of datagrams that contain IP packets (RFC
// 9484 section 6).
const contextIPPacket = 0

// datagrams sends IP packets as HTTP Datagrams of one request stream in QUIC
// DATAGRAM frames (RFC 9297 section 2.1). It builds the prefix in place and
// passes the frame to QUIC directly, which saves the copy that http3 would
// make.
type datagrams struct {
	conn   datagramConn
	id     uint64 // quarter stream ID
	prefix []byte // quarter stream ID and context ID, encoded
	tap    capture.Point
}

// datagramConn is the part of *quic.Conn that datagrams needs. Tests replace
// it. SendDatagram does not retain its argument.
type datagramConn interface {
	closer
	SendDatagram([]byte) error
	ConnectionStats() quic.ConnectionStats
}

func newDatagrams(conn datagramConn, id quic.StreamID) datagrams {
	quarter := uint64(id) / 4
	return datagrams{conn: conn, id: quarter,
		prefix: quicvarint.Append(quicvarint.Append(nil, quarter), contextIPPacket)}
}

// send sends the packet buf[off:], overwriting up to tun.Headroom bytes in
// front of it. It blocks while QUIC's queue is full. QUIC copies the packet, so
// the caller may reuse buf afterwards.
func (d *datagrams) send(buf []byte, off int) error {
	return d.sendWith(d.conn.SendDatagram, buf, off)
}

// trySend is like send, but returns errNoRoom instead of blocking.
func (d *datagrams) trySend(buf []byte, off int) error { return d.sendWith(d.sendNow, buf, off) }

// errNoRoom means that QUIC's queue of datagrams is full.
var errNoRoom = errors.New("no room in the queue of datagrams")

func (d *datagrams) sendWith(send func([]byte) error, buf []byte, off int) error {
	start := off - len(d.prefix)
	copy(buf[start:off], d.prefix)
	err := send(buf[start:])
	if err == nil {
		d.tap.Packet(buf[off:])
	}
	return err
}

// oversized is longer than any datagram. Sending it fails with an error that
// contains the current limit.
var oversized = make([]byte, 1<<16)

// mtu returns the maximum length in bytes of an IP packet that fits a datagram.
// It changes as QUIC discovers the path MTU. It is 0 if the peer accepts only
// datagrams that are too short for a packet.
func (d *datagrams) mtu() (int, error) {
	err := d.conn.SendDatagram(oversized)
	var tooLarge *quic.DatagramTooLargeError
	if errors.As(err, &tooLarge) {
		return max(0, int(tooLarge.MaxDatagramPayloadSize)-len(d.prefix)), nil
	}
	if err == nil {
		err = errors.New("the peer accepts datagrams of any size")
	}
	return 0, err
}

// MaxPayload returns the number of bytes that currently fit a datagram of the
// request stream id on conn, after context ID 0.
func MaxPayload(conn *quic.Conn, id quic.StreamID) (int, error) {
	d := newDatagrams(conn, id)
	return d.mtu()
}
