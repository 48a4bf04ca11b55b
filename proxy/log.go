package proxy

import (
	"context"
	"log/slog"
	"strings"
	"sync"

	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
)

// How many lines of each kind clients can have written to the log, in a second and at once. A flood is told by what the next line
// says was left out.
const (
	logRate  = 20
	logBurst = 500
	// maxReason is how much of what a client sent is quoted, in bytes.
	maxReason = 500
)

// throttle is a handler of log records that clients cause. It leaves out those of the same message that come too fast.
type throttle struct {
	slog.Handler
	kinds *kinds
}

// kinds are the messages that were logged so far. There are as many as the code has, for what differs is in the attributes.
type kinds struct {
	mu sync.Mutex
	by map[string]*kind
}

type kind struct {
	limit *rate.Limiter
	left  uint64 // out, since the last line
}

// newThrottle returns a logger like l that floods cannot fill.
func newThrottle(l *slog.Logger) *slog.Logger {
	return slog.New(throttle{l.Handler(), &kinds{by: make(map[string]*kind)}})
}

// Handle writes r, with the number of those before it that were left out, or leaves it out.
func (t throttle) Handle(ctx context.Context, r slog.Record) error {
	left, ok := t.kinds.allow(r.Message)
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
	return throttle{t.Handler.WithAttrs(attrs), t.kinds}
}

// WithGroup keeps the limits.
func (t throttle) WithGroup(name string) slog.Handler {
	return throttle{t.Handler.WithGroup(name), t.kinds}
}

// allow reports whether message may be written now, and how many were left out before it.
func (k *kinds) allow(message string) (left uint64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.by[message]
	if m == nil {
		m = &kind{limit: rate.NewLimiter(logRate, logBurst)}
		k.by[message] = m
	}
	if !m.limit.Allow() {
		m.left++
		return 0, false
	}
	left, m.left = m.left, 0
	return left, true
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
