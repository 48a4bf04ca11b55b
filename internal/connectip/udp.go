package connectip

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
)

// MaxUDPPayload is the maximum length in bytes of a payload that a UDPStream
// carries. DNS answers commonly have up to 4096 bytes (RFC 6891 section 6.2.5).
const MaxUDPPayload = 8 << 10

// DatagramStream is a request stream that also sends HTTP Datagrams.
type DatagramStream interface {
	Stream

	// SendDatagram sends a copy of its argument. It blocks while QUIC's queue
	// is full.
	SendDatagram([]byte) error
}

// UDPStream carries the payloads of one request for UDP proxying (RFC 9298)
// after the response. It sends each payload in an HTTP Datagram, or in a
// DATAGRAM capsule on the stream if it is too long for a datagram (RFC 9297
// section 3.5). A peer that skips such capsules only loses payloads that it
// could not receive otherwise.
//
// Send, ReceiveDatagrams and ReceiveCapsules may each run in a goroutine of
// their own.
type UDPStream struct {
	str DatagramStream

	// Only Send and, after it, Close access the following fields.
	buf       []byte // reused by each call of Send
	truncated bool   // only a part of a capsule was written
}

// NewUDPStream returns a UDPStream for an accepted request stream.
func NewUDPStream(str DatagramStream) *UDPStream { return &UDPStream{str: str} }

// udpHeader is the maximum length in bytes of the type, the length and the
// context ID in front of a payload in a capsule.
const udpHeader = 1 + 8 + 1

// Send sends a payload and does not retain it. It blocks while QUIC's queue of
// datagrams is full, and at most 10 seconds while the peer does not read a
// capsule.
func (s *UDPStream) Send(payload []byte) error {
	s.buf = append(append(s.buf[:0], 0), payload...) // context ID 0
	err := s.str.SendDatagram(s.buf)
	if !errors.As(err, new(*quic.DatagramTooLargeError)) {
		return err
	}
	b := make([]byte, 0, udpHeader+len(payload))
	b = quicvarint.Append(b, uint64(capsule.TypeDatagram))
	b = quicvarint.Append(b, uint64(len(s.buf)))
	_ = s.str.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := s.str.Write(append(b, s.buf...)); err != nil {
		s.truncated = true
		return err
	}
	return nil
}

// Interrupt ends a Send that waits for the peer to read a capsule. Later
// capsules fail as well.
func (s *UDPStream) Interrupt() { s.str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeNoError)) }

// ReceiveDatagrams calls deliver with each payload that arrives in a datagram,
// until ctx or the stream ends. deliver must not retain the payload.
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

// ReceiveCapsules calls deliver with each payload that arrives in a DATAGRAM
// capsule, and tooLong for each payload that exceeds MaxUDPPayload. deliver
// must not retain the payload, because the next one overwrites it. All other
// capsules are skipped. ReceiveCapsules returns when the peer ends the stream,
// or after Close.
func (s *UDPStream) ReceiveCapsules(deliver func(payload []byte), tooLong func()) {
	var buf []byte // allocated by the first capsule, because most flows have none
	parser := http3.NewCapsuleParser(s.str)
	for {
		t, r, err := parser.Next()
		if err != nil {
			return
		}
		switch size := r.Remaining(); {
		case uint64(t) != uint64(capsule.TypeDatagram):
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

// Close ends the stream. It must not be called during Send.
func (s *UDPStream) Close() {
	if s.truncated {
		s.Interrupt()
	} else {
		_ = s.str.Close()
	}
	s.str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
}
