package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/rescue"
	"masquevpn/internal/worker"
)

// settingsTimeout is how long a request waits for the client's SETTINGS, which
// travel on a stream of their own.
const settingsTimeout = 5 * time.Second

// handler serves HTTP/3 requests while running lasts.
type handler struct {
	s       *Server
	running context.Context
}

// refusal is an answer other than 2xx. Its reason goes to the log; the client
// sees status and proxyStatus (RFC 9209).
type refusal struct {
	status      int
	proxyStatus string // error type, "" for none
	rcode       string // parameter of dns_error, "" for none
	details     string // parameter of any error, "" for none
	reason      error
}

func refuse(status int, proxyStatus, format string, args ...any) *refusal {
	return &refusal{status: status, proxyStatus: proxyStatus, reason: fmt.Errorf(format, args...)}
}

// word is what r is counted under: the error type that the client sees, or else
// a word of our own.
func (r *refusal) word() string {
	if r.proxyStatus != "" {
		return r.proxyStatus
	}
	switch r.status {
	case http.StatusUnauthorized:
		return "credentials"
	case http.StatusNotFound:
		return "not_served"
	case http.StatusRequestTimeout:
		return "no_settings"
	case http.StatusNotImplemented:
		return "unknown_protocol"
	}
	return "other"
}

// field returns the value of Proxy-Status by which the proxy called name tells
// the client why, "" for none.
func (r *refusal) field(name string) string {
	if r.proxyStatus == "" {
		return ""
	}
	item := httpsfv.NewItem(name)
	item.Params.Add("error", httpsfv.Token(r.proxyStatus))
	if r.rcode != "" {
		item.Params.Add("rcode", r.rcode)
	}
	if r.details != "" {
		item.Params.Add("details", r.details)
	}
	s, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil {
		return "" // a name that no field can carry
	}
	return s
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer rescue.Catch(func(e *rescue.Error) { h.panicked(r, e) })
	h.s.smallMTU.Done(r.Context().Value(connKey{}).(*quic.Conn).RemoteAddr())
	ss, refused := h.accept(w, r)
	if refused != nil {
		h.s.requests.count(refused.status, refused.word())
		if refused.status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		} else { // failures to authenticate are in the log already
			h.s.peerLog.Info("request refused", "remote", r.RemoteAddr, "status", refused.status,
				"reason", shorten(refused.reason))
		}
		if s := refused.field(h.s.cfg().Name); s != "" {
			w.Header().Set("Proxy-Status", s)
		}
		w.WriteHeader(refused.status)
		return
	}
	h.serve(w, r, ss)
}

// panicked notes a panic while a request was answered, and has HTTP/3 reset its
// stream.
func (h handler) panicked(r *http.Request, e *rescue.Error) {
	h.s.cfg().Logger.Error("a fault of this program ended a request; please report it with this line",
		"remote", r.RemoteAddr, "panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
	panic(http.ErrAbortHandler)
}

// accept decides on a request. An accepted one has its session among the
// running ones, not yet started.
func (h handler) accept(w http.ResponseWriter, r *http.Request) (*session, *refusal) {
	switch {
	case r.Method != http.MethodConnect || strings.HasPrefix(r.Proto, "HTTP/"):
		return nil, refuse(http.StatusNotFound, "", "%s %q is not a request for proxying", r.Method,
			r.RequestURI)
	case r.Proto != connectip.Protocol && (r.Proto != udpProtocol || !h.s.cfg().ConnectUDP):
		return nil, refuse(http.StatusNotImplemented, "", ":protocol %q is not known", r.Proto)
	}
	// Who is not known learns nothing but that.
	user, method, refused := h.identify(r)
	if refused != nil {
		return nil, refused
	}
	if refused := datagramsEnabled(w, r); refused != nil {
		return nil, refused
	}
	ss := &session{
		server:       h.s,
		user:         user,
		method:       method,
		instance:     token(r, connectip.InstanceHeader),
		installation: token(r, connectip.InstallationHeader),
		since:        time.Now(),
		quic:         r.Context().Value(connKey{}).(*quic.Conn),
		connection:   connectionOf(r.Context()),
		done:         make(chan struct{}),

		advertised: make(chan struct{}),
	}
	ss.announcer = worker.New(ss.guarded(ss.announce))
	if r.Proto == udpProtocol {
		ss.udp, refused = h.s.openUDP(r.Context(), user, r.RequestURI)
	} else {
		refused = ss.setScope(r.Context(), r.RequestURI)
	}
	if refused != nil {
		return nil, refused
	}
	ss.ctx, ss.stop = context.WithCancelCause(h.running)
	if refused := h.admit(ss); refused != nil {
		ss.stop(nil)
		if ss.udp != nil {
			ss.udp.socket.Close()
		}
		return nil, refused
	}
	ss.begins()
	return ss, nil
}

// token returns the value of a header field that is a token of the client. What
// is no token is ignored: the field is not of any standard, another program may
// use the name for something else, and all that the client misses are its
// former addresses.
func token(r *http.Request, header string) string {
	if s := r.Header.Get(header); connectip.IsToken(s) {
		return strings.Clone(s)
	}
	return ""
}

// admit takes ss in among the running sessions, in place of those that it
// replaces, unless a limit forbids it.
func (h handler) admit(ss *session) *refusal {
	user, limit := ss.user, ss.limits()
	replaced, err := h.s.sessions.add(ss, limit)
	if err != nil {
		return limit.refuse(user.Name, err)
	}
	admitted := false
	defer func() {
		if !admitted { // also when this panics
			h.s.sessions.remove(ss)
			close(ss.done)
		}
	}()
	// Resolving a name takes a while. Whoever is gone since was not among the
	// sessions when those of removed users ended.
	if err := h.s.follow(ss); err != nil {
		failure := &authFailure{method: ss.method, class: classRevoked, user: user.Name,
			reason: err.Error()}
		h.s.refused(ss.quic.RemoteAddr(), failure)
		return &refusal{status: http.StatusUnauthorized, reason: failure}
	}
	ss.log = h.s.peerLog.With("session", ss.id, "user", ss.user.Name)
	if ss.claim != nil {
		h.s.sites.add(ss.claim, replaced)
	}
	for _, old := range replaced {
		old.stop(errReplaced)
	}
	for _, old := range replaced {
		<-old.done
	}
	admitted = true
	return nil
}

// setScope makes ss one for IP proxying, with the scope that the raw request
// path asks for.
func (ss *session) setScope(ctx context.Context, path string) *refusal {
	scope, err := ss.server.scope(path)
	if errors.Is(err, errNotServed) {
		return refuse(http.StatusNotFound, "", "%v", err)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "http_request_error", "%v", err)
	}
	reach, refused := ss.server.reach(ctx, ss.user, scope)
	ss.scope, ss.reach, ss.queue = scope, reach, flowqueue.New()
	if scope.IsZero() && ss.server.sites.rightsOf(ss.user.Name) != nil {
		ss.claim = newClaim(ss)
	}
	return refused
}

// serve answers an accepted request. A session of IP packets goes on when it
// returns, in a goroutine without all that the request needed.
func (h handler) serve(w http.ResponseWriter, r *http.Request, ss *session) {
	defer rescue.Catch(func(e *rescue.Error) {
		ss.panicked(e)
		h.ended(ss, slog.LevelInfo, e)
		panic(http.ErrAbortHandler)
	})
	w.Header().Set(http3.CapsuleProtocolHeader, "?1")
	if ss.udp != nil {
		// RFC 9298 section 6: nobody knows whether what is inside controls
		// itself
		congestion.Control(ss.quic)
		w.Header().Set("Proxy-Status", ss.udp.nextHop(h.s.cfg().Name))
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	h.s.requests.count(http.StatusOK, accepted)
	if ss.udp != nil { // a client may make many of these, for a packet each
		ss.log.Debug("session started", "remote", r.RemoteAddr, "udp_target",
			ss.udp.target.String())
		h.ended(ss, slog.LevelDebug, ss.runUDP(w))
		return
	}
	ss.log.Info("session started", "remote", r.RemoteAddr, "scope", ss.scope.String())
	str := w.(http3.HTTPStreamer).HTTPStream()
	go func() { h.ended(ss, slog.LevelInfo, ss.run(str)) }()
}

// ended takes a session, which ended with err, from the running ones.
func (h handler) ended(ss *session, level slog.Level, err error) {
	ss.log.Log(ss.ctx, level, "session ended", "reason", shorten(err), "rx_bytes",
		ss.stats.Receive.Bytes.Load(), "tx_bytes", ss.stats.Send.Bytes.Load())
	ss.stop(nil)
	h.s.sessions.remove(ss)
	ss.ends()
	close(ss.done)
}

// datagramsEnabled waits for the client's SETTINGS: without HTTP Datagrams no
// packet could be sent to it (RFC 9297 section 2.1.1).
func datagramsEnabled(w http.ResponseWriter, r *http.Request) *refusal {
	settings := w.(http3.Settingser)
	timeout := time.NewTimer(settingsTimeout)
	defer timeout.Stop()
	select {
	case <-settings.ReceivedSettings():
	case <-r.Context().Done():
		return refuse(http.StatusRequestTimeout, "", "the client went away")
	case <-timeout.C:
		return refuse(http.StatusRequestTimeout, "", "the client sent no SETTINGS within %v",
			settingsTimeout)
	}
	if !settings.Settings().EnableDatagrams {
		return refuse(http.StatusBadRequest, "http_request_error",
			"the client does not take HTTP Datagrams")
	}
	return nil
}

var errNotServed = errors.New("no template has this path")

// scope finds what the raw request path asks for.
func (s *Server) scope(path string) (connectip.Scope, error) {
	for _, t := range s.templates {
		if scope, served, err := t.Match(path); served {
			return scope, err
		}
	}
	return connectip.Scope{}, errNotServed
}
