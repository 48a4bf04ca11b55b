// Package loglimit limits the log lines that clients can cause.
//
// Lines are counted by message. If a message comes too fast, lines are left
// out, and the next line of the message has their number as left_out_before.
// Each source of a message, a user or the network of a remote address, may have
// only a part of the lines, so that a flood does not hide the lines of others.
package loglimit

import (
	"context"
	"log/slog"
	"sync"

	"golang.org/x/time/rate"

	"masquevpn/proxy/internal/source"
)

const (
	// messageRate and messageBurst limit the lines of one message, per second
	// and at once.
	messageRate  = 20
	messageBurst = 500

	// sourceRate and sourceBurst limit the lines of one message and source, per
	// second and at once.
	sourceRate  = 4
	sourceBurst = 100

	// maxSources is the number of sources in each of the two maps of limits.
	maxSources = 1024
)

// The attributes that identify the source of a line.
const (
	attrUser   = "user"   // name, given to Logger.With
	attrRemote = "remote" // address and port, used if there is no user
)

// handler is a [slog.Handler] that passes on the records that limits allows.
type handler struct {
	slog.Handler
	limits *limits

	// source is the user of all records. "" means that the address of each
	// record is its source.
	source string
}

// New returns a logger that writes to l within the limits.
func New(l *slog.Logger) *slog.Logger {
	return slog.New(handler{l.Handler(), newLimits(), ""})
}

// Handle passes r on or leaves it out.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	from := h.source
	if from == "" {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == attrRemote {
				from = source.KeyOf(a.Value.String())
			}
			return from == ""
		})
	}
	leftOut, ok := h.limits.allow(cause{r.Message, from})
	if !ok {
		return nil
	}
	if leftOut > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Uint64("left_out_before", leftOut))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs returns a handler with the same limits.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	user := h.source
	for _, a := range attrs {
		if a.Key == attrUser {
			user = a.Value.String()
		}
	}
	return handler{h.Handler.WithAttrs(attrs), h.limits, user}
}

// WithGroup returns a handler with the same limits.
func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(name), h.limits, h.source}
}

// limits counts the lines by message and source.
type limits struct {
	mu sync.Mutex // guards the fields below

	// messages is bounded by the program: all that varies is in attributes.
	messages map[string]*message

	// recent and older hold the limits of sources. If recent is full, it
	// becomes older, and older is forgotten.
	recent, older map[cause]*rate.Limiter
}

// cause is one source of one message. The source "" has no limit of its own.
type cause struct{ message, source string }

// message is the limit of one message.
type message struct {
	limiter *rate.Limiter
	leftOut uint64 // lines left out since the last written one
}

func newLimits() *limits { return &limits{messages: make(map[string]*message)} }

// allow reports whether a line may be written now. If so, it returns the number
// of lines of the message that were left out since the last written one.
func (l *limits) allow(c cause) (leftOut uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.messages[c.message]
	if m == nil {
		m = &message{limiter: rate.NewLimiter(messageRate, messageBurst)}
		l.messages[c.message] = m
	}
	if c.source != "" && !l.ofSource(c).Allow() || !m.limiter.Allow() {
		m.leftOut++
		return 0, false
	}
	leftOut, m.leftOut = m.leftOut, 0
	return leftOut, true
}

// ofSource returns the limit of one source. l.mu is held.
func (l *limits) ofSource(c cause) *rate.Limiter {
	limiter := l.recent[c]
	if limiter != nil {
		return limiter
	}
	if limiter = l.older[c]; limiter == nil {
		limiter = rate.NewLimiter(sourceRate, sourceBurst)
	}
	if len(l.recent) >= maxSources || l.recent == nil {
		l.recent, l.older = make(map[cause]*rate.Limiter), l.recent
	}
	l.recent[c] = limiter
	return limiter
}
