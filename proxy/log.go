package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
)

// How many lines of each kind clients can have written to the log, in a second
// and at once. A flood is told by what the next line says was left out.
const (
	logRate  = 20
	logBurst = 500
	// sourceRate and sourceBurst are the part of that which one user, or one
	// address, may have, so that no flood hides what others cause.
	// maxLogSources is how many of them are told apart, twice.
	sourceRate    = 4
	sourceBurst   = 100
	maxLogSources = 1024
	// maxReason is how much of what a client sent is quoted, in bytes.
	maxReason = 500
)

// throttle is a handler of log records that clients cause. It leaves out those
// of the same message that come too fast.
type throttle struct {
	slog.Handler
	kinds  *kinds
	source string // who causes the records, "" where each says it by its address
}

// kinds are the messages that were logged so far. There are as many as the code
// has, for what differs is in the attributes.
type kinds struct {
	mu sync.Mutex
	by map[string]*kind
	// recent and older are the limits of sources, for each message. The older
	// map is dropped when the other one is full.
	recent, older map[cause]*rate.Limiter
}

// cause is who causes records of one message.
type cause struct{ message, source string }

type kind struct {
	limit *rate.Limiter
	left  uint64 // out, since the last line
}

// newThrottle returns a logger like l that floods cannot fill.
func newThrottle(l *slog.Logger) *slog.Logger {
	return slog.New(throttle{l.Handler(), &kinds{by: make(map[string]*kind)}, ""})
}

// Handle writes r, with the number of those before it that were left out, or
// leaves it out.
func (t throttle) Handle(ctx context.Context, r slog.Record) error {
	source := t.source
	if source == "" {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "remote" {
				source = addressOf(a.Value.String())
			}
			return source == ""
		})
	}
	left, ok := t.kinds.allow(cause{r.Message, source})
	if !ok {
		return nil
	}
	if left > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Uint64("left_out_before", left))
	}
	return t.Handler.Handle(ctx, r)
}

// WithAttrs keeps the limits.
func (t throttle) WithAttrs(attrs []slog.Attr) slog.Handler {
	source := t.source
	for _, a := range attrs {
		if a.Key == "user" {
			source = a.Value.String()
		}
	}
	return throttle{t.Handler.WithAttrs(attrs), t.kinds, source}
}

// WithGroup keeps the limits.
func (t throttle) WithGroup(name string) slog.Handler {
	return throttle{t.Handler.WithGroup(name), t.kinds, t.source}
}

// addressOf is the source of what comes from remote, an address with a port:
// the address, or the network of 64 bits that it is in.
func addressOf(remote string) string {
	a, err := netip.ParseAddrPort(remote)
	if err != nil {
		return ""
	}
	return source(net.UDPAddrFromAddrPort(a))
}

// allow reports whether a message may be written now, and how many of them were
// left out before it.
func (k *kinds) allow(c cause) (left uint64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.by[c.message]
	if m == nil {
		m = &kind{limit: rate.NewLimiter(logRate, logBurst)}
		k.by[c.message] = m
	}
	if c.source != "" && !k.of(c).Allow() || !m.limit.Allow() {
		m.left++
		return 0, false
	}
	left, m.left = m.left, 0
	return left, true
}

// of returns the limit of one source. k.mu is held.
func (k *kinds) of(c cause) *rate.Limiter {
	l := k.recent[c]
	if l != nil {
		return l
	}
	if l = k.older[c]; l == nil {
		l = rate.NewLimiter(sourceRate, sourceBurst)
	}
	if len(k.recent) >= maxLogSources || k.recent == nil {
		k.recent, k.older = make(map[cause]*rate.Limiter), k.recent
	}
	k.recent[c] = l
	return l
}

// shorten is the text of err, which may be nil, for the log.
func shorten(err error) string {
	if err == nil {
		return ""
	}
	s := connectip.Explain(err)
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "..."
	}
	return s
}
