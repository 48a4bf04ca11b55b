package connectip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/rescue"
	"masquevpn/internal/worker"
)

const (
	// endTimeout limits the time for which the end of a stream waits for a
	// capsule that is being written.
	endTimeout = time.Second

	// drainTimeout limits the time for which Drain waits for packets that are
	// being sent, before it closes the connection.
	drainTimeout = 5 * time.Second

	// maxAnswers is the capacity of answerQueue in packets.
	maxAnswers = 16
)

// ErrClosedByPeer is returned by Run if the peer ended the stream without an
// error.
var ErrClosedByPeer = errors.New("the peer closed the tunnel")

// Stream is an HTTP/3 request stream after the response: *http3.Stream at the
// proxy, *http3.RequestStream at the client.
type Stream interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	Close() error
	CancelRead(quic.StreamErrorCode)
	CancelWrite(quic.StreamErrorCode)
	SetWriteDeadline(time.Time) error
	StreamID() quic.StreamID

	// Context ends with the sending side of the stream.
	Context() context.Context

	// ReceiveDatagram returns the next HTTP Datagram. The caller owns it.
	ReceiveDatagram(context.Context) ([]byte, error)
}

// Conn is one CONNECT-IP stream. Run must be called once. All other methods may
// be called at any time and concurrently.
//
// A Conn goes through these states:
//
//	New      open: capsules may be sent, packets too once Run has the MTU
//	 |
//	Run      open: capsules and packets are received as well
//	 |       stop is called: by the end of Run's context, the end of the
//	 |       stream, an invalid capsule, a failed write or a panic
//	 v
//	ending   ctx is done; its cause is the result of Run. end sets closed,
//	 |       so sending fails from now on, and closes or resets the stream.
//	 v
//	ended    Run waited for all goroutines and returned
type Conn struct {
	// New sets the following fields, up to answerSender. They do not change
	// afterwards, and their values are safe for concurrent use, except that
	// writeMu guards writes to str.
	cfg        Config
	str        Stream
	datagrams  datagrams
	echo       *echo
	hostErrors errorLimits // ICMP errors about packets of the host
	peerErrors errorLimits // ICMP errors about packets of the peer
	pace       pace        // limits the rate of the peer's capsules

	// ctx ends with the cause that is given to stop. stop(nil) means that
	// Run's context ended.
	ctx  context.Context
	stop context.CancelCauseFunc

	// firstPacket is closed by noteReceived.
	firstPacket chan struct{}

	// answerQueue contains packets to the peer that this endpoint made, each
	// with tun.Headroom free bytes in front. answerSender sends them.
	answerQueue  chan []byte
	answerSender *worker.Worker

	// The following fields are atomic, because no packet may wait for a lock.
	policy    atomic.Pointer[policy]
	maxPacket atomic.Int32 // MTU in bytes: the lesser of quicMTU and mtuCap
	quicMTU   atomic.Int32 // bytes that fit a datagram
	mtuCap    atomic.Int32 // bytes that the path was found to carry; 0: no cap
	newPath   atomic.Bool  // QUIC restarted its MTU discovery
	sentLarge atomic.Bool  // packets were sent that a narrow path may lose
	received  atomic.Bool  // firstPacket is closed
	closed    atomic.Bool  // no capsule or packet may be sent any more
	inboxBusy Busy         // time since the inbox has had packets
	writers   writers

	// writeMu serializes the capsules on the stream and guards truncated. It is
	// locked before mu. It is held while a capsule waits for the peer to read,
	// so code that must not wait for the peer must not lock it.
	writeMu sync.Mutex

	// truncated means that only a part of a capsule was written. The stream can
	// then only be reset.
	truncated bool

	// mu guards the following fields. It is never held during I/O.
	mu            sync.Mutex
	link          link
	lastRequestID uint64 // last ID that Request used; 0: none

	// peerRequestIDs contains all request IDs that the peer used.
	peerRequestIDs map[uint64]struct{}

	// pendingRequests contains this endpoint's unanswered requests by ID.
	pendingRequests map[uint64]netip.Prefix
}

// New returns a Conn for str, an accepted request stream on conn.
func New(str Stream, conn *quic.Conn, cfg Config) *Conn {
	c := &Conn{
		cfg:         cfg,
		str:         str,
		datagrams:   newDatagrams(conn, str.StreamID()),
		pace:        newPace(),
		firstPacket: make(chan struct{}),
		echo:        newEcho(),
		hostErrors:  newErrorLimits(),
		peerErrors:  newErrorLimits(),
		answerQueue: make(chan []byte, maxAnswers),
		link: link{self: cfg.Self, denied: cfg.Denied, withheld: cfg.Withheld,
			assigned: cfg.Static, peerAssigned: cfg.Granted},
		peerRequestIDs:  make(map[uint64]struct{}),
		pendingRequests: make(map[uint64]netip.Prefix),
	}
	c.datagrams.tap = cfg.Tap
	c.ctx, c.stop = context.WithCancelCause(context.Background())
	c.answerSender = worker.New(c.guarded(c.sendAnswers))
	_ = c.updatePolicy() // cannot fail, because the prefixes in cfg are valid
	return c
}

// Run receives capsules and packets until the stream or ctx ends, closes or
// resets the stream, and waits for all goroutines of the Conn. It returns nil
// if ctx ended, ErrClosedByPeer if the peer ended the stream without an error,
// and otherwise the error that ended the stream.
func (c *Conn) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { c.stop(revocation(ctx)) })()
	defer context.AfterFunc(c.str.Context(), func() {
		var stop *quic.StreamError // STOP_SENDING
		switch cause := context.Cause(c.str.Context()); {
		case !errors.As(cause, &stop) || !stop.Remote:
		case IsNoError(uint64(stop.ErrorCode)):
			c.stop(ErrClosedByPeer)
		default:
			c.stop(fmt.Errorf("the peer accepts no more capsules: %w", cause))
		}
	})()
	ended := make(chan struct{})
	context.AfterFunc(c.ctx, func() {
		defer close(ended)
		defer rescue.Catch(c.panicked)
		c.end(c.cause()) // makes readCapsules return
	})
	c.updateMTU()
	in := newInbox(c)
	watcher := newMTUWatcher(c)
	var wg sync.WaitGroup
	wg.Go(c.guarded(c.receive))
	wg.Go(c.guarded(in.deliver))
	defer c.datagrams.direct(in)()

	c.guarded(func() { c.stop(c.readCapsules()) })()
	<-ended
	c.Drain(func() {
		wg.Wait()
		watcher.close()
		c.answerSender.Close()
		in.close()
	})
	return c.cause()
}

// ErrRevoked is the error of a tunnel whose permission was taken back. If the
// cause of the end of Run's context wraps it, Run resets the stream with
// H3_REQUEST_CANCELLED instead of closing it.
var ErrRevoked = errors.New("revoked")

// revocation returns the cause of the end of ctx if it wraps ErrRevoked, and
// nil otherwise.
func revocation(ctx context.Context) error {
	if cause := context.Cause(ctx); errors.Is(cause, ErrRevoked) {
		return cause
	}
	return nil
}

// panicked ends c after a panic. It is called without any lock of c held.
func (c *Conn) panicked(e *rescue.Error) {
	if c.cfg.Panicked != nil {
		c.cfg.Panicked(e)
	}
	c.stop(e)
}

// guarded returns a function that calls f and ends only c if f panics.
func (c *Conn) guarded(f func()) func() {
	return func() {
		defer rescue.Catch(c.panicked)
		f()
	}
}

// cause returns the error that ended c.ctx, or nil if Run's context ended.
func (c *Conn) cause() error {
	if err := context.Cause(c.ctx); err != context.Canceled {
		return err
	}
	return nil
}

// Drain calls wait, which waits for goroutines that may be in Send. Like the
// function Drain it closes the connection if that takes too long.
func (c *Conn) Drain(wait func()) { Drain(c.datagrams.conn, wait) }

// Drain calls wait, which may wait for room in QUIC's queue of datagrams. If
// wait takes longer than 5 seconds, Drain closes the connection with all of its
// streams: the peer is unreachable or does not acknowledge packets on purpose.
func Drain(conn closer, wait func()) {
	stuck := time.AfterFunc(drainTimeout, func() {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
	})
	defer stuck.Stop()
	wait()
}

// closer is the part of *quic.Conn that Drain needs.
type closer interface {
	CloseWithError(quic.ApplicationErrorCode, string) error
}

// end closes the stream, or resets it if err requires that.
func (c *Conn) end(err error) {
	c.closed.Store(true)
	code := ErrorCode(err)
	// A stream must not be closed while a capsule is being written, or after
	// a part of one. The deadline ends a write that waits for the peer; later
	// writes see that c is closed.
	_ = c.str.SetWriteDeadline(time.Now().Add(endTimeout))
	if code != http3.ErrCodeNoError {
		c.str.CancelWrite(quic.StreamErrorCode(code))
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.truncated {
		c.str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	} else if code == http3.ErrCodeNoError {
		_ = c.str.Close()
	}
	c.str.CancelRead(quic.StreamErrorCode(code))
}

// ErrorCode returns the code that tells the peer that the stream ended with
// err, the result of Run.
func ErrorCode(err error) http3.ErrCode {
	switch {
	case err == nil || errors.Is(err, ErrClosedByPeer):
		return http3.ErrCodeNoError
	case errors.Is(err, capsule.ErrMalformed):
		return http3.ErrCodeMessageError // RFC 9297 section 3.3
	case errors.Is(err, capsule.ErrTooLarge):
		return http3.ErrCodeExcessiveLoad
	}
	return http3.ErrCodeRequestCanceled
}

// FirstPacket returns a channel that is closed when the first packet, or the
// first answer to Probe, was received through the tunnel.
func (c *Conn) FirstPacket() <-chan struct{} { return c.firstPacket }

// noteReceived records that the tunnel carries packets.
func (c *Conn) noteReceived() {
	if !c.received.Load() && c.received.CompareAndSwap(false, true) {
		close(c.firstPacket)
	}
}
