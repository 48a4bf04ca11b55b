// Package connectip is one CONNECT-IP request stream (RFC 9484) after its
// request was accepted: the capsules that assign addresses and advertise
// routes, the IP packets in datagrams, and the policy that follows from the
// capsules. It is the same for both roles; client and proxy differ in what they
// say and in what they do with what they hear.
package connectip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/capture"
	"masquevpn/internal/rescue"
	"masquevpn/internal/worker"
)

const (
	// bytes of a capsule that are written before the next deadline
	writeChunk      = 16 << 10
	maxPeerRequests = 1024 // addresses that a peer may ask for on one stream
	// for a chunk of a capsule; a peer that does not read for so long is gone
	writeTimeout = 10 * time.Second
	endTimeout   = time.Second     // for a capsule that is being written at the end
	maxAnswers   = 16              // that wait to be sent
	drainTimeout = 5 * time.Second // for packets that are being sent at the end
)

// MaxAssigned is how many addresses a peer may assign to an endpoint, which
// looks at each for every packet.
const MaxAssigned = 64

// MaxCapsule is the longest capsule that an endpoint takes unless its Config
// says otherwise, in bytes without type and length: some 1,900 IPv6 routes or
// 6,500 IPv4 routes.
const MaxCapsule = 64 << 10

// Protocol is the value of :protocol (RFC 9484 section 4.2).
const Protocol = "connect-ip"

// InstanceHeader is a header field of requests: a random token by which a
// client that comes back, perhaps before the proxy noticed that it was gone, is
// told from a second client of the same user. It is optional and of this
// project only.
const InstanceHeader = "Masque-Instance"

// InstallationHeader is a header field of requests: a token that stays the same
// when a client program is started anew, by which the proxy finds the addresses
// that the user had on this device last. It is optional and of this project
// only.
const InstallationHeader = "Masque-Installation"

// maxToken is the longest value of InstanceHeader and InstallationHeader, in
// bytes: the proxy keeps it for as long as it remembers whose an address was.
const maxToken = 64

// IsToken reports whether s may be the value of InstanceHeader or
// InstallationHeader: 1 to 64 letters, digits and any of "-._~+/=".
func IsToken(s string) bool {
	if s == "" || len(s) > maxToken {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c &&
			c <= '9', strings.IndexByte("-._~+/=", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// ErrClosedByPeer is returned by Run when the peer ended the stream in good
// order.
var ErrClosedByPeer = errors.New("the peer closed the tunnel")

// Device takes the packets that come out of the tunnel. Write hands over
// bufs[i][offset:], which it may overwrite from offset-16 on but does not keep;
// it may be called from several goroutines.
type Device interface {
	Write(bufs [][]byte, offset int) (int, error)
	BatchSize() int
}

// Handler is told of the peer's capsules, one at a time, after the policy
// follows them. An error aborts the stream. What an endpoint does not handle,
// it does not take: without Assigned the peer assigns nothing, and without
// Routes it advertises nothing, so that it cannot widen the policy. Without
// Requested, all requests are refused.
type Handler struct {
	// the peer's full list of addresses for this endpoint, refusals included
	Assigned func([]capsule.Address) error
	// the peer wants these; every one is to be answered with Assign
	Requested func([]capsule.Address) error
	Routes    func([]capsule.Route) error // the peer's full list of routes

	// DNS and PREF64 get the peer's full lists
	// (draft-ietf-masque-connect-ip-dns-06). Whether the peer is to be trusted
	// with them is theirs to decide.
	DNS    func([]capsule.DNSConfiguration) error
	PREF64 func([]netip.Prefix) error

	MTU func(int) // the largest packet that fits changed; called at the start too
}

// Filter decides what counts of the capsules that are handled. Its functions
// are given each full list before the policy follows, and return the part that
// counts: what they leave out permits no packet, neither by its source nor by
// its destination. They are called with locks held and must not call the Conn.
// Nil functions accept everything.
type Filter struct {
	Assigned func([]capsule.Address) []capsule.Address
	Routes   func([]capsule.Route) []capsule.Route
}

// Config is what a Conn needs besides its stream.
type Config struct {
	Device  Device
	Filter  Filter
	Handler Handler
	Self    []netip.Addr // this endpoint's tunnel addresses besides those that the peer assigns
	// prefixes that count as assigned to this endpoint although the peer does
	// not say so
	Static []netip.Prefix
	// prefixes that count as assigned to the peer until it is told with Assign
	Granted []netip.Prefix
	Denied  []netip.Prefix // destinations that packets of the peer may not reach
	// Withheld are destinations that are denied to this peer although they are
	// advertised to others: it is told that they are prohibited, where it would
	// be told that there is no route.
	Withheld []netip.Prefix
	// PeerIsHost drops ICMP errors that the peer passes on from others: behind
	// it is no network, so the sources of all its packets are addresses that it
	// has. Otherwise any router may be the source of an error (RFC 9484 section
	// 7.2.1).
	PeerIsHost bool
	// MaxCapsule is the longest capsule that the peer may send, in bytes; 0:
	// the constant of that name.
	MaxCapsule int
	// KernelHopLimit leaves the hop limit of packets to the kernel's forwarding
	// alone.
	KernelHopLimit bool
	Stats          *Stats
	// Panicked, which may be nil, is told of a panic of one of the goroutines
	// that serve the Conn. Run ends with it then.
	Panicked func(*rescue.Error)
	// sees what is sent and received, but for what is dropped; the zero value
	// sees nothing
	Tap capture.Point
}

// Conn is one CONNECT-IP stream. Run has to be called once; all other methods
// may be called at any time, from any goroutine.
type Conn struct {
	cfg       Config
	str       Stream
	datagrams datagrams
	maxPacket atomic.Int32 // MTU of the link: the smaller of the next two
	quicMTU   atomic.Int32 // what fits in a datagram
	mtuCap    atomic.Int32 // what the path was found to carry, 0 if it carries all
	newPath   atomic.Bool  // QUIC has begun to look for the MTU anew
	sentLarge atomic.Bool  // packets went out that a narrow path may lose
	policy    atomic.Pointer[policy]
	closed    atomic.Bool
	echo      *echo
	firstIn   chan struct{} // closed when the first packet came in
	sawPacket atomic.Bool
	toHost    errorLimits // ICMP errors about packets of the host
	toPeer    errorLimits // and about packets of the peer
	// packets of this endpoint itself that answer the peer's, behind
	// tun.Headroom free bytes
	toSend chan []byte
	sender *worker.Worker // sends the packets in toSend

	life context.Context // ends with the cause for which Run has to
	stop context.CancelCauseFunc

	filling Busy // the connection's goroutine has packets for the inbox
	writers writers

	pace pace // limits the rate of the peer's capsules

	// orders capsules on the wire; taken before mu, which is not held while the
	// peer does not read
	writing sync.Mutex
	cut     bool // a capsule was written in part

	mu      sync.Mutex // guards what follows
	link    link
	lastID  uint64
	peerIDs map[uint64]struct{}
	answers map[uint64]netip.Prefix // our requests that are not answered yet
}

// New makes a Conn of an accepted request stream on conn.
func New(str Stream, conn *quic.Conn, cfg Config) *Conn {
	c := &Conn{
		cfg:       cfg,
		str:       str,
		datagrams: newDatagrams(conn, str.StreamID()),
		pace:      newPace(),
		firstIn:   make(chan struct{}),
		echo:      newEcho(),
		toHost:    newErrorLimits(),
		toPeer:    newErrorLimits(),
		toSend:    make(chan []byte, maxAnswers),
		link: link{self: cfg.Self, denied: cfg.Denied, withheld: cfg.Withheld,
			assigned: cfg.Static, peer: cfg.Granted},
		peerIDs: make(map[uint64]struct{}),
		answers: make(map[uint64]netip.Prefix),
	}
	c.datagrams.tap = cfg.Tap
	c.life, c.stop = context.WithCancelCause(context.Background())
	c.sender = worker.New(c.guarded(c.sendAnswers))
	_ = c.update() // an empty link has a policy
	return c
}

// Run carries capsules and packets until the stream or ctx ends, and leaves no
// goroutine behind. It returns nil when ctx ended, ErrClosedByPeer when the
// peer finished, and otherwise what went wrong. The stream is closed or reset
// then.
func (c *Conn) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { c.stop(nil) })()
	defer context.AfterFunc(c.str.Context(), func() {
		var stop *quic.StreamError // STOP_SENDING
		switch cause := context.Cause(c.str.Context()); {
		case !errors.As(cause, &stop) || !stop.Remote:
		case IsNoError(uint64(stop.ErrorCode)):
			c.stop(ErrClosedByPeer)
		default:
			c.stop(fmt.Errorf("the peer takes no more capsules: %w", cause))
		}
	})()
	ended := make(chan struct{})
	context.AfterFunc(c.life, func() { // which ends readCapsules too
		defer close(ended)
		defer rescue.Catch(c.panicked)
		c.end(c.cause())
	})
	c.updateMTU()
	in := newInbox(c)
	link := newLinkWatch(c)
	var wg sync.WaitGroup
	wg.Go(c.guarded(c.receive))
	wg.Go(c.guarded(in.deliver))
	defer c.datagrams.direct(in)()

	c.guarded(func() { c.stop(c.readCapsules()) })()
	<-ended
	c.Drain(func() {
		wg.Wait()
		link.close()
		c.sender.Close()
		in.close()
	})
	return c.cause()
}

// panicked ends c because of a panic. It is called while nothing of c is
// locked.
func (c *Conn) panicked(e *rescue.Error) {
	if c.cfg.Panicked != nil {
		c.cfg.Panicked(e)
	}
	c.stop(e)
}

// guarded returns f as c's goroutines run it: a panic ends c alone.
func (c *Conn) guarded(f func()) func() {
	return func() {
		defer rescue.Catch(c.panicked)
		f()
	}
}

// cause is why c.life ended, nil for the end of Run's context.
func (c *Conn) cause() error {
	if err := context.Cause(c.life); err != context.Canceled {
		return err
	}
	return nil
}

// Drain calls wait, which waits for goroutines that may be in Send, as the
// function Drain does.
func (c *Conn) Drain(wait func()) { Drain(c.datagrams.conn, wait) }

// Drain calls wait, which may wait for room in QUIC's queue of datagrams,
// however long that takes. So a connection that takes no packet for some
// seconds is closed, with all its streams: its peer is gone, or means to hold
// us up.
func Drain(conn closer, wait func()) {
	stuck := time.AfterFunc(drainTimeout, func() {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
	})
	defer stuck.Stop()
	wait()
}

// closer is what is needed of a *quic.Conn to end it.
type closer interface {
	CloseWithError(quic.ApplicationErrorCode, string) error
}

// end closes or resets the stream, as err deserves.
func (c *Conn) end(err error) {
	c.closed.Store(true)
	code := ErrorCode(err)
	// The stream must not be closed while a capsule is being written, nor in
	// the middle of one. Whoever wants to write from now on sees that it is
	// closed.
	_ = c.str.SetWriteDeadline(time.Now().Add(endTimeout))
	if code != http3.ErrCodeNoError {
		c.str.CancelWrite(quic.StreamErrorCode(code))
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.cut {
		c.str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	} else if code == http3.ErrCodeNoError {
		_ = c.str.Close()
	}
	c.str.CancelRead(quic.StreamErrorCode(code))
}

// ErrorCode is that by which the peer is told that a stream ended with err,
// which Run returned.
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

// readCapsules handles capsules until the stream ends.
func (c *Conn) readCapsules() error {
	r := capsule.NewReader(c.str, cmp.Or(c.cfg.MaxCapsule, MaxCapsule))
	r.Skipped = c.cfg.Stats.Receive.countCapsule
	for {
		next, err := r.Next()
		if err == io.EOF {
			return ErrClosedByPeer
		}
		if closedWithoutError(err) {
			return ErrClosedByPeer // the connection ended before the end of the stream was read
		}
		if err != nil {
			return err
		}
		c.cfg.Stats.Receive.countCapsule(next.Type())
		if err := c.pace.wait(c.life, next); err != nil {
			return err
		}
		switch x := next.(type) {
		case *capsule.AddressAssign:
			err = c.handleAssign(x.Addresses)
		case *capsule.AddressRequest:
			err = c.handleRequest(x.Addresses)
		case *capsule.RouteAdvertisement:
			err = c.handleRoutes(x.Routes)
		case *capsule.DNSAssign:
			if c.cfg.Handler.DNS != nil {
				err = c.cfg.Handler.DNS(x.Configurations)
			}
		case *capsule.PREF64:
			if c.cfg.Handler.PREF64 != nil {
				err = c.cfg.Handler.PREF64(x.Prefixes)
			}
		case *capsule.Datagram: // RFC 9297 section 3.5
			c.handleDatagram(x.Payload, unbatched{c, &c.writers.capsules})
		}
		if err != nil {
			return fmt.Errorf("%v capsule: %w", next.Type(), err)
		}
	}
}

func (c *Conn) handleAssign(addrs []capsule.Address) error {
	if c.cfg.Handler.Assigned == nil {
		return nil
	}
	if n := len(granted(addrs)); n > MaxAssigned {
		return fmt.Errorf("%w: %d addresses assigned, at most %d are accepted", capsule.ErrTooLarge,
			n, MaxAssigned)
	}
	if err := c.accept(func() {
		for _, a := range addrs {
			delete(c.answers, a.RequestID)
		}
		accepted := addrs
		if accept := c.cfg.Filter.Assigned; accept != nil {
			accepted = accept(addrs)
		}
		c.setAssigned(granted(accepted))
	}); err != nil {
		return err
	}
	return c.cfg.Handler.Assigned(addrs)
}

// accept makes a change to the link, and the policy follow it, with c.mu held.
func (c *Conn) accept(change func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	return c.update()
}

// setAssigned replaces what the peer assigned to this endpoint. c.mu is held.
func (c *Conn) setAssigned(prefixes []netip.Prefix) {
	c.link.assigned = append(slices.Clone(c.cfg.Static), prefixes...)
}

// granted returns the prefixes of an ADDRESS_ASSIGN capsule without the
// refusals.
func granted(addrs []capsule.Address) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		if !a.Refused() {
			out = append(out, a.Prefix)
		}
	}
	return out
}

func (c *Conn) handleRequest(addrs []capsule.Address) error {
	c.mu.Lock()
	for _, a := range addrs {
		if _, reused := c.peerIDs[a.RequestID]; reused {
			c.mu.Unlock()
			return fmt.Errorf("%w: request ID %d used twice", capsule.ErrMalformed, a.RequestID)
		}
		c.peerIDs[a.RequestID] = struct{}{}
	}
	n := len(c.peerIDs)
	c.mu.Unlock()
	if n > maxPeerRequests {
		return fmt.Errorf("%w: more than %d addresses requested", capsule.ErrTooLarge,
			maxPeerRequests)
	}
	if c.cfg.Handler.Requested != nil {
		return c.cfg.Handler.Requested(addrs)
	}
	// Every entry has to be answered (RFC 9484 section 4.7.2). An endpoint that
	// assigns nothing refuses all.
	refused := make([]capsule.Address, len(addrs))
	for i, a := range addrs {
		refused[i] = Refusal(a)
	}
	return c.Assign(refused)
}

// Refusal is the answer to a request for an address that is not granted: the
// address of all zeros (section 4.7.2).
func Refusal(request capsule.Address) capsule.Address {
	a := netip.IPv4Unspecified()
	if request.Prefix.Addr().Is6() {
		a = netip.IPv6Unspecified()
	}
	return capsule.Address{RequestID: request.RequestID, Prefix: netip.PrefixFrom(a, a.BitLen())}
}

func (c *Conn) handleRoutes(routes []capsule.Route) error {
	if c.cfg.Handler.Routes == nil {
		return nil
	}
	if err := c.accept(func() {
		c.link.peerSend = routes
		if accept := c.cfg.Filter.Routes; accept != nil {
			c.link.peerSend = accept(routes)
		}
	}); err != nil {
		return err
	}
	return c.cfg.Handler.Routes(routes)
}

// update makes the policy follow the link. c.mu is held, or c not shared yet.
func (c *Conn) update() error {
	p, err := c.link.policy()
	if err != nil {
		return err
	}
	c.policy.Store(p)
	return nil
}

// Assign tells the peer its addresses: the full list, which replaces the last
// (RFC 9484 section 4.7.1). Entries that answer a request carry its ID;
// refusals are sent but grant nothing.
func (c *Conn) Assign(addrs []capsule.Address) error {
	return c.send(&capsule.AddressAssign{Addresses: addrs}, func(l *link) {
		l.peer = granted(addrs)
	})
}

// Advertise tells the peer what it can reach through this endpoint, which
// replaces the last advertisement (section 4.7.3).
func (c *Conn) Advertise(routes []capsule.Route) error {
	return c.send(&capsule.RouteAdvertisement{Routes: routes}, func(l *link) { l.routes = routes })
}

// AssignDNS tells the peer how to resolve names, which replaces what it was
// told before; nothing at all takes it back. The routes to the nameservers are
// to be advertised first, so that no query leaves outside the tunnel
// (draft-ietf-masque-connect-ip-dns-06 section 5).
func (c *Conn) AssignDNS(configurations []capsule.DNSConfiguration) error {
	return c.send(&capsule.DNSAssign{Configurations: configurations}, nil)
}

// SendPREF64 tells the peer the prefixes of NAT64, which replace the last ones;
// none means that there is no NAT64 (section 4 of the same draft).
func (c *Conn) SendPREF64(prefixes []netip.Prefix) error {
	return c.send(&capsule.PREF64{Prefixes: prefixes}, nil)
}

// Request asks the peer for addresses (section 4.7.2): 0.0.0.0/32 and ::/128
// for any, else the preferred ones.
func (c *Conn) Request(prefixes []netip.Prefix) error {
	c.mu.Lock()
	addrs := make([]capsule.Address, len(prefixes))
	for i, p := range prefixes {
		c.lastID++
		addrs[i] = capsule.Address{RequestID: c.lastID, Prefix: p}
		c.answers[c.lastID] = p
	}
	c.mu.Unlock()
	return c.send(&capsule.AddressRequest{Addresses: addrs}, nil)
}

// Unanswered reports whether requests of ours wait for an answer.
func (c *Conn) Unanswered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.answers) > 0
}

// SetFiltered replaces what counts of the peer's last capsules, for when Filter
// would now decide otherwise.
func (c *Conn) SetFiltered(assigned []netip.Prefix, routes []capsule.Route) error {
	return c.accept(func() {
		c.setAssigned(assigned)
		c.link.peerSend = routes
	})
}

// SetDenied replaces the destinations that packets of the peer may not reach,
// see Config.
func (c *Conn) SetDenied(denied, withheld []netip.Prefix) error {
	return c.accept(func() { c.link.denied, c.link.withheld = denied, withheld })
}

// send writes one capsule after change was made to the link. What is granted is
// allowed before the peer hears of it.
func (c *Conn) send(x capsule.Capsule, change func(*link)) error {
	if err := x.Validate(); err != nil {
		return err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	if change != nil {
		if err := c.accept(func() { change(&c.link) }); err != nil {
			return err
		}
	}
	if c.cut {
		return fmt.Errorf("sending %v: %w", x.Type(), errTunnelClosed)
	}
	begun, err := c.writeCapsule(x.Append(nil))
	if err != nil {
		err = fmt.Errorf("sending %v: %w", x.Type(), err)
		if begun {
			c.cut = true
			c.stop(err)
		}
		return err
	}
	c.cfg.Stats.Send.countCapsule(x.Type())
	return nil
}

var errTunnelClosed = errors.New("the tunnel is closed")

// writeCapsule writes b, each chunk of it in its own time: a long list takes a
// while on a slow path. begun reports whether some of it may have been written.
// c.writing is held.
func (c *Conn) writeCapsule(b []byte) (begun bool, err error) {
	for chunk := range slices.Chunk(b, writeChunk) {
		_ = c.str.SetWriteDeadline(time.Now().Add(writeTimeout))
		if c.closed.Load() { // which is looked at after the deadline was set, see end
			return begun, errTunnelClosed
		}
		begun = true
		if _, err := c.str.Write(chunk); err != nil {
			return begun, err
		}
	}
	return begun, nil
}

// FirstPacket is closed once a packet, or an answer to Probe, came in through
// the tunnel.
func (c *Conn) FirstPacket() <-chan struct{} { return c.firstIn }
