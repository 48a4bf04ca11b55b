package connectip

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
)

// MaxUDPPayload is the longest payload that a UDPStream carries, in bytes:
// answers of DNS have up to 4096 (RFC 6891 section 6.2.5).
const MaxUDPPayload = 8 << 10

// DatagramStream is a request stream that datagrams are sent on by way of
// HTTP/3.
type DatagramStream interface {
	Stream
	SendDatagram([]byte) error
}

// UDPStream carries the payloads of one request for UDP proxying (RFC 9298)
// after its response: in datagrams, and those that are too long for one in
// DATAGRAM capsules on the stream (RFC 9297 section 3.5). Peers that skip such
// capsules lose what they would lose anyway. One goroutine may send while
// others receive.
type UDPStream struct {
	str  DatagramStream
	send []byte // buffer that only Send uses
	cut  bool   // a capsule was written in part
}

// NewUDPStream makes a UDPStream of an accepted request stream.
func NewUDPStream(str DatagramStream) *UDPStream { return &UDPStream{str: str} }

// udpHeader is the room for what stands before a payload in a capsule: its
// type, its length, and the context ID.
const udpHeader = 1 + 8 + 1

// Send sends a payload, which stays the caller's. It waits while QUIC's queue
// of datagrams is full, and for a peer that does not read a capsule, which is
// given up after a while.
func (s *UDPStream) Send(payload []byte) error {
	s.send = append(append(s.send[:0], 0), payload...) // context ID 0
	err := s.str.SendDatagram(s.send)
	if !errors.As(err, new(*quic.DatagramTooLargeError)) {
		return err
	}
	b := quicvarint.Append(make([]byte, 0, udpHeader+len(payload)), 0) // the type
	b = quicvarint.Append(b, uint64(len(s.send)))
	_ = s.str.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := s.str.Write(append(b, s.send...)); err != nil {
		s.cut = true
		return err
	}
	return nil
}

// Interrupt has a Send that waits for the peer to read return soon, and those
// that follow.
func (s *UDPStream) Interrupt() { s.str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeNoError)) }

// ReceiveDatagrams gives the payloads that come in datagrams to deliver, which
// does not keep them, until ctx or the stream ends.
func (s *UDPStream) ReceiveDatagrams(ctx context.Context, deliver func(payload []byte)) {
	for {
		b, err := s.str.ReceiveDatagram(ctx)
		if err != nil {
			return
		}
		if id, n, err := quicvarint.Parse(b); err == nil && id == 0 {
			deliver(b[n:])
		}
	}
}

// ReceiveCapsules gives the payloads that come in DATAGRAM capsules to deliver,
// which does not keep them, and calls tooLong for each that is longer than
// MaxUDPPayload. All other capsules are skipped. It returns when the peer has
// ended the stream, or Close was called.
func (s *UDPStream) ReceiveCapsules(deliver func(payload []byte), tooLong func()) {
	var buf []byte // most flows need none
	parser := http3.NewCapsuleParser(s.str)
	for {
		t, r, err := parser.Next()
		if err != nil {
			return
		}
		switch size := r.Remaining(); {
		case t != 0:
		case size > MaxUDPPayload+1 || size < 0:
			tooLong()
		case size > 0:
			if buf == nil {
				buf = make([]byte, MaxUDPPayload+1)
			}
			if _, err := io.ReadFull(r, buf[:size]); err != nil {
				return
			}
			if id, n, err := quicvarint.Parse(buf[:size]); err == nil && id == 0 {
				deliver(buf[n:size])
			}
		}
		if r.Discard() != nil {
			return
		}
	}
}

// Close ends the stream, once nothing is sent any more.
func (s *UDPStream) Close() {
	if s.cut {
		s.Interrupt()
	} else {
		_ = s.str.Close()
	}
	s.str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
}
