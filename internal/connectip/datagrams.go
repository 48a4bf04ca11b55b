package connectip

import (
	"context"
	"errors"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/internal/capture"
	"masquevpn/tun"
)

// maxPrefix is the length in bytes of the longest prefix of a datagram: the
// quarter stream ID and the context ID. Callers of Conn.Send leave tun.Headroom
// bytes free for it.
const maxPrefix = 8 + 1

var _ [tun.Headroom - maxPrefix]struct{} // fails to compile if the prefix does not fit

// contextIPPacket is the context of datagrams that are whole IP packets (RFC
// 9484 section 6).
const contextIPPacket = 0

// datagrams sends IP packets as HTTP Datagrams of one request stream in QUIC
// DATAGRAM frames (RFC 9297 section 2.1). It builds the prefix in place and
// hands the frame to QUIC itself, which saves the copy that http3 would make.
type datagrams struct {
	conn   sender
	id     uint64 // quarter stream ID
	prefix []byte // that and the context ID
	tap    capture.Point
}

// sender is what is needed of a *quic.Conn.
type sender interface {
	closer
	SendDatagram([]byte) error
	ConnectionStats() quic.ConnectionStats
}

func newDatagrams(conn sender, id quic.StreamID) datagrams {
	quarter := uint64(id) / 4
	return datagrams{conn: conn, id: quarter,
		prefix: quicvarint.Append(quicvarint.Append(nil, quarter), contextIPPacket)}
}

// send sends buf[off:] and overwrites up to tun.Headroom bytes before it. The
// buffer stays the caller's. It blocks while QUIC's queue is full.
func (d *datagrams) send(buf []byte,
	off int) error {
	return d.sendBy(d.conn.SendDatagram, buf, off)
}

// trySend is send that returns errNoRoom where that would block.
func (d *datagrams) trySend(buf []byte, off int) error { return d.sendBy(d.sendNow, buf, off) }

// errNoRoom says that QUIC's queue of datagrams is full.
var errNoRoom = errors.New("no room in the queue of datagrams")

func (d *datagrams) sendBy(send func([]byte) error, buf []byte, off int) error {
	start := off - len(d.prefix)
	copy(buf[start:off], d.prefix)
	err := send(buf[start:])
	if err == nil {
		d.tap.Packet(buf[off:])
	}
	return err
}

// oversized is larger than any datagram: sending it fails, and the error names
// the limit.
var oversized = make([]byte, 1<<16)

// mtu returns the largest IP packet that fits in a datagram now, in bytes; it
// changes as QUIC discovers the path's MTU. It is 0 when the peer takes only
// datagrams that are too short for any packet.
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

// MaxPayload returns the most that fits behind context ID 0 in a datagram of
// the request stream id on conn now, in bytes.
func MaxPayload(conn *quic.Conn, id quic.StreamID) (int, error) {
	d := newDatagrams(conn, id)
	return d.mtu()
}

// Stream is an HTTP/3 request stream after the response: *http3.Stream at the
// proxy, *http3.RequestStream at the client.
type Stream interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	Close() error
	CancelRead(quic.StreamErrorCode)
	CancelWrite(quic.StreamErrorCode)
	SetWriteDeadline(time.Time) error
	Context() context.Context // ends with the sending side of the stream
	StreamID() quic.StreamID
	ReceiveDatagram(context.Context) ([]byte, error)
}
