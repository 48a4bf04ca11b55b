package proxy

import (
	"container/list"
	"context"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/proxy/internal/source"
)

const (
	// firstRequestTimeout is how long a connection may take until a request
	// of it is accepted: handshake, look-up of a name and all.
	firstRequestTimeout = 10 * time.Second
	// nextRequestTimeout is how long a connection may be without a session
	// after it had one. Clients make requests on one connection for as long
	// as they run; those of ours make one a minute at least.
	nextRequestTimeout = 2 * time.Minute
	// maxPendingBytes is how much a client may send before a request of it is
	// accepted. The longest handshake, with certificates, and a request take
	// less than half of it.
	maxPendingBytes = 40 << 10
	// sweepInterval is the time between looks at connections without a
	// session, while there are any.
	sweepInterval = 100 * time.Millisecond
	// pendingWindow is how many bytes of streams a client may have on its way
	// or unread before a request of it is accepted.
	pendingWindow = 16 << 10
	// pendingStreams is how many requests it may have open, in builds that can
	// raise the number later.
	pendingStreams = 10
	// maxUniStreams is how many unidirectional streams a client may have open.
	// HTTP/3 has three.
	maxUniStreams = 8
)

// Defaults of Config.
const (
	DefaultPendingConnections           = 96
	DefaultPendingConnectionsPerAddress = 64
)

// The reasons for which the proxy ends a connection without a session.
const (
	endNoRequest        = "no_request"
	endTooManyBytes     = "too_many_bytes"
	endTooMany          = "too_many"
	endTooManyOfAddress = "too_many_of_address"
	endTooManyOfUser    = "too_many_of_user"
	endIdle             = "idle"
)

// connections are the connections on which no session runs: pending ones,
// without an accepted request so far, whose clients may be anybody, and idle
// ones, whose clients are known. Both kinds end after a while, and there are
// only so many of either; the oldest ends for the newest.
//
// All methods may be called concurrently, and none waits for a connection.
type connections struct {
	log *slog.Logger // for what clients cause

	mu            sync.Mutex
	max           int // pending ones in all
	maxPerAddress int // and of one address, or /64 of IPv6

	pending  waiting // key: source address
	idle     waiting // key: user
	ended    map[string]uint64
	sweeping bool // a look is due
}

func newConnections(log *slog.Logger, most, mostPerAddress int) *connections {
	c := &connections{log: log, ended: make(map[string]uint64)}
	c.limit(most, mostPerAddress)
	for _, reason := range []string{endNoRequest, endTooManyBytes, endTooMany, endTooManyOfAddress,
		endTooManyOfUser, endIdle} {
		c.ended[reason] = 0
	}
	return c
}

// limit sets how many connections may be pending, in all and of one address.
// It counts for new ones.
func (l *connections) limit(most, mostPerAddress int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.max, l.maxPerAddress = most, mostPerAddress
}

// connection is one connection of a client, from its first packet on.
type connection struct {
	remote   net.Addr
	cancel   context.CancelFunc // ends it in its handshake, with the edited quic-go
	admitted atomic.Bool        // a request was accepted

	// Guarded by connections.mu.
	quic     quicConn // nil until the first flight of the client is complete
	over     bool
	sessions int
	in       *waiting // nil while there are sessions, and in the end
	place    *list.Element
	key      string    // in in
	until    time.Time // it ends when it is in in still
}

// quicConn is what is needed of a *quic.Conn.
type quicConn interface {
	CloseWithError(quic.ApplicationErrorCode, string) error
	ConnectionStats() quic.ConnectionStats
}

// connectionKey is the key of the *connection in the context of a connection
// and of its requests.
type connectionKey struct{}

// begin notes a new connection, of which only the first packet is there. It
// is quic.Transport.ConnContext.
func (l *connections) begin(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	ctx, cancel := context.WithCancel(ctx)
	c := &connection{remote: info.RemoteAddr, cancel: cancel,
		until: time.Now().Add(firstRequestTimeout)}
	l.mu.Lock()
	l.add(&l.pending, c, source.Key(c.remote), l.max, l.maxPerAddress, endTooManyOfAddress)
	l.mu.Unlock()
	context.AfterFunc(ctx, func() { l.remove(c) })
	return context.WithValue(ctx, connectionKey{}, c), nil
}

// attach notes the QUIC connection of c.
func (l *connections) attach(c *connection, conn quicConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.quic = conn
	if c.over { // stock quic-go could not end it until now
		go conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "")
	}
}

// remove notes that c has ended.
func (l *connections) remove(c *connection) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.over = true
	l.take(c)
}

// accepted notes that a session begins on c.
func (l *connections) accepted(c *connection) {
	c.admitted.Store(true)
	l.mu.Lock()
	defer l.mu.Unlock()
	c.sessions++
	l.take(c)
}

// released notes that a session of the user called name has ended on c. Of
// this user most connections may wait for another request.
func (l *connections) released(c *connection, name string, most int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.sessions--; c.sessions > 0 || c.over {
		return
	}
	c.until = time.Now().Add(nextRequestTimeout)
	l.add(&l.idle, c, name, 0, most, endTooManyOfUser)
}

// add has c wait in to under key. l.mu is held.
func (l *connections) add(to *waiting, c *connection, key string, most, mostOfKey int,
	ofKey string) {
	switch {
	case to.of[key] >= mostOfKey:
		l.end(to.oldest(key), ofKey)
	case most > 0 && to.order.Len() >= most:
		l.end(to.oldestOfMost(), endTooMany)
	}
	to.add(c, key)
	if !l.sweeping {
		l.sweeping = true
		time.AfterFunc(sweepInterval, l.sweep)
	}
}

// take has c wait no longer. l.mu is held.
func (l *connections) take(c *connection) {
	if c.in != nil {
		c.in.remove(c)
	}
}

// end closes c and counts it. l.mu is held.
func (l *connections) end(c *connection, reason string) {
	l.take(c)
	c.over = true
	l.ended[reason]++
	l.log.Info("connection without a session ended", "remote", c.remote.String(), "reason", reason)
	if c.quic == nil {
		c.cancel()
		return
	}
	code := http3.ErrCodeExcessiveLoad
	if reason == endNoRequest || reason == endIdle {
		code = http3.ErrCodeNoError
	}
	go c.quic.CloseWithError(quic.ApplicationErrorCode(code), "") // which waits for it
}

// sweep ends the connections whose time is over, and those that sent too much.
func (l *connections) sweep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for c := range l.pending.all() {
		switch {
		case !now.Before(c.until):
			l.end(c, endNoRequest)
		case c.quic != nil && c.quic.ConnectionStats().BytesReceived > maxPendingBytes:
			l.end(c, endTooManyBytes)
		}
	}
	for c := range l.idle.all() {
		if now.Before(c.until) {
			break // the others came later
		}
		l.end(c, endIdle)
	}
	l.sweeping = l.pending.order.Len()+l.idle.order.Len() > 0
	if l.sweeping {
		time.AfterFunc(sweepInterval, l.sweep)
	}
}

// crowded reports whether many connections are pending, so that a new one
// should prove that its address is its own.
func (l *connections) crowded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pending.order.Len() >= (l.max+1)/2
}

// counts returns how many connections are pending, and how many were ended by
// reason.
func (l *connections) counts() (pending int, ended map[string]uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pending.order.Len(), maps.Clone(l.ended)
}

// waiting are connections in the order in which they came, with their number
// by a key.
type waiting struct {
	order list.List // elements are *connection
	of    map[string]int
}

func (w *waiting) add(c *connection, key string) {
	if w.of == nil {
		w.of = make(map[string]int)
	}
	c.in, c.key, c.place = w, key, w.order.PushBack(c)
	w.of[key]++
}

func (w *waiting) remove(c *connection) {
	w.order.Remove(c.place)
	if w.of[c.key]--; w.of[c.key] == 0 {
		delete(w.of, c.key)
	}
	c.in, c.place = nil, nil
}

// oldest returns the oldest connection of key, of which there is one.
func (w *waiting) oldest(key string) *connection {
	for c := range w.all() {
		if c.key == key {
			return c
		}
	}
	return nil
}

// oldestOfMost returns the oldest connection of the keys that have most: a key
// with many connections does not push out those of the others.
func (w *waiting) oldestOfMost() *connection {
	most := slices.Max(slices.Collect(maps.Values(w.of)))
	for c := range w.all() {
		if w.of[c.key] == most {
			return c
		}
	}
	return nil
}

// all yields all connections, of which those it has yielded may be removed.
func (w *waiting) all() func(yield func(*connection) bool) {
	return func(yield func(*connection) bool) {
		for e := w.order.Front(); e != nil; {
			next := e.Next()
			if !yield(e.Value.(*connection)) {
				return
			}
			e = next
		}
	}
}

// connectionOf returns the connection of a context.
func connectionOf(ctx context.Context) *connection {
	return ctx.Value(connectionKey{}).(*connection)
}
