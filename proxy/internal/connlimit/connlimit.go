// Package connlimit limits the QUIC connections on which no session runs.
//
// Such a connection is pending if the client had no accepted request yet, so
// that anybody may be at its other end. It is idle if the last session on it
// has ended; its user is known. Connections of both kinds are closed after a
// while. If there are too many, the oldest is closed in favour of the newest.
// Connections with sessions are not limited here.
//
// A server gives [Limiter.Begin] to quic.Transport, finds the [Conn] with
// [FromContext] and tells the Limiter about sessions.
package connlimit

import (
	"container/list"
	"context"
	"log/slog"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/proxy/internal/source"
)

const (
	// firstRequestTimeout is the time that a connection may be pending. It
	// includes the handshake and the lookup of a name in the request.
	firstRequestTimeout = 10 * time.Second

	// nextRequestTimeout is the time that a connection may be idle. Clients
	// that send requests on one connection while they run send at least one
	// per minute.
	nextRequestTimeout = 2 * time.Minute

	// maxPendingBytes is the number of bytes that the client of a pending
	// connection may send. The longest handshake with certificates and a
	// request need less than half of it.
	maxPendingBytes = 40 << 10

	// sweepInterval is the time between checks of the connections, while there
	// are pending or idle ones.
	sweepInterval = 100 * time.Millisecond
)

// The reasons for closing a connection, as in Counts and in the log.
const (
	reasonNoRequest       = "no_request"
	reasonTooManyBytes    = "too_many_bytes"
	reasonTooMany         = "too_many"
	reasonTooManyOfSource = "too_many_of_address"
	reasonTooManyOfUser   = "too_many_of_user"
	reasonIdle            = "idle"
)

var reasons = []string{reasonNoRequest, reasonTooManyBytes, reasonTooMany, reasonTooManyOfSource,
	reasonTooManyOfUser, reasonIdle}

// Limiter limits connections. Make it with New. Its methods may be called
// concurrently, and none waits for a connection.
type Limiter struct {
	log *slog.Logger

	mu sync.Mutex // guards the fields below

	// maxPending and maxPerSource limit the pending connections, in all and
	// from one source.
	maxPending   int
	maxPerSource int

	pending  group             // key: source of the client
	idle     group             // key: name of the user
	closed   map[string]uint64 // number of closed connections by reason
	sweeping bool              // a sweep is scheduled
}

// New makes a Limiter of pending connections, in all and from one source: an
// IPv4 address or a /64 of IPv6. It writes a line to log for each connection
// that it closes, and clients can cause many.
func New(log *slog.Logger, maxPending, maxPerSource int) *Limiter {
	l := &Limiter{log: log, closed: make(map[string]uint64)}
	for _, reason := range reasons {
		l.closed[reason] = 0
	}
	l.SetLimits(maxPending, maxPerSource)
	return l
}

// SetLimits changes the limits of New. They apply when the next connection
// begins.
func (l *Limiter) SetLimits(maxPending, maxPerSource int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.maxPending, l.maxPerSource = maxPending, maxPerSource
}

// Conn is a connection of a client, from its first packet on.
type Conn struct {
	remote net.Addr

	// cancel aborts the handshake if quic-go is built with our patches.
	cancel context.CancelFunc

	admitted atomic.Bool

	// Limiter.mu guards the fields below.

	quic     QUICConn  // nil before Attach
	ended    bool      // closed here, by the client or by quic-go
	sessions int       // running sessions
	deadline time.Time // used by sweep

	// group contains the connection while no session runs. It is nil
	// otherwise.
	group   *group
	element *list.Element // in group.order
	key     string        // in group.count
}

// Admitted reports whether a session has run on the connection.
func (c *Conn) Admitted() bool { return c.admitted.Load() }

// QUICConn is implemented by *[quic.Conn].
type QUICConn interface {
	CloseWithError(quic.ApplicationErrorCode, string) error
	ConnectionStats() quic.ConnectionStats
}

// contextKey is the key of the *Conn in the context of a connection and of its
// requests.
type contextKey struct{}

// FromContext returns the Conn of the context that Begin returned, or of one
// derived from it.
func FromContext(ctx context.Context) *Conn { return ctx.Value(contextKey{}).(*Conn) }

// Begin adds a pending connection when its first packet arrives. It is the
// ConnContext of a quic.Transport.
func (l *Limiter) Begin(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	ctx, cancel := context.WithCancel(ctx)
	c := &Conn{remote: info.RemoteAddr, cancel: cancel,
		deadline: time.Now().Add(firstRequestTimeout)}
	l.mu.Lock()
	l.add(&l.pending, c, source.Key(c.remote), l.maxPending, l.maxPerSource, reasonTooManyOfSource)
	l.mu.Unlock()
	context.AfterFunc(ctx, func() { l.remove(c) })
	return context.WithValue(ctx, contextKey{}, c), nil
}

// Attach sets the QUIC connection of c, which exists once the first flight of
// the client is complete.
func (l *Limiter) Attach(c *Conn, q QUICConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.quic = q
	if c.ended { // before it could be closed, in stock quic-go
		go q.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "")
	}
}

// remove notes that c has ended.
func (l *Limiter) remove(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.ended = true
	c.leaveGroup()
}

// SessionBegins notes that a session begins on c, and reports whether it is the
// first one.
func (l *Limiter) SessionBegins(c *Conn) (first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.sessions++
	c.leaveGroup()
	return !c.admitted.Swap(true)
}

// SessionEnds notes that a session on c has ended. If it was the last one, c is
// idle from now on. maxIdle limits the idle connections of the user.
func (l *Limiter) SessionEnds(c *Conn, user string, maxIdle int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.sessions--; c.sessions > 0 || c.ended {
		return
	}
	c.deadline = time.Now().Add(nextRequestTimeout)
	l.add(&l.idle, c, user, 0, maxIdle, reasonTooManyOfUser)
}

// add adds c to g under key. If g is full, it closes another connection: the
// oldest one of key if there are limitOfKey, or else the oldest one of the
// largest key if there are limit. A limit of 0 means no limit. l.mu is held.
func (l *Limiter) add(g *group, c *Conn, key string, limit, limitOfKey int, reasonOfKey string) {
	switch {
	case g.count[key] >= limitOfKey:
		l.close(g.oldest(key), reasonOfKey)
	case limit > 0 && g.len() >= limit:
		l.close(g.oldestOfLargest(), reasonTooMany)
	}
	g.add(c, key)
	if !l.sweeping {
		l.sweeping = true
		time.AfterFunc(sweepInterval, l.sweep)
	}
}

// close closes c and counts it. l.mu is held.
func (l *Limiter) close(c *Conn, reason string) {
	c.leaveGroup()
	c.ended = true
	l.closed[reason]++
	l.log.Info("connection without a session ended", "remote", c.remote.String(), "reason", reason)
	if c.quic == nil {
		c.cancel()
		return
	}
	code := http3.ErrCodeExcessiveLoad
	if reason == reasonNoRequest || reason == reasonIdle {
		code = http3.ErrCodeNoError
	}
	go c.quic.CloseWithError(quic.ApplicationErrorCode(code), "") // blocks until it is closed
}

// sweep closes the connections whose deadline has passed and those whose client
// sent too much.
func (l *Limiter) sweep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for c := range l.pending.all() {
		switch {
		case !now.Before(c.deadline):
			l.close(c, reasonNoRequest)
		case c.quic != nil && c.quic.ConnectionStats().BytesReceived > maxPendingBytes:
			l.close(c, reasonTooManyBytes)
		}
	}
	for c := range l.idle.all() {
		if now.Before(c.deadline) {
			break // deadlines are in order
		}
		l.close(c, reasonIdle)
	}
	l.sweeping = l.pending.len()+l.idle.len() > 0
	if l.sweeping {
		time.AfterFunc(sweepInterval, l.sweep)
	}
}

// Crowded reports whether at least half of the permitted connections are
// pending. The server should validate the addresses of new clients then (RFC
// 9000 section 8.1).
func (l *Limiter) Crowded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pending.len() >= (l.maxPending+1)/2
}

// Counts returns the number of pending connections now, and the number of
// connections closed so far by reason.
func (l *Limiter) Counts() (pending int, closed map[string]uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pending.len(), maps.Clone(l.closed)
}
