package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/federation"
	"masquevpn/internal/rescue"
	"masquevpn/proxy/internal/connlimit"
)

// settingsTimeout is the time that a request waits for the client's SETTINGS,
// which come on another stream.
const settingsTimeout = 5 * time.Second

// handler serves HTTP/3 requests.
type handler struct {
	s *Server

	// running is the parent of the sessions' contexts. It ends when the proxy
	// stops.
	running context.Context
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer rescue.Catch(func(e *rescue.Error) { h.panicked(r, e) })
	h.s.smallMTU.Done(r.Context().Value(connKey{}).(*quic.Conn).RemoteAddr())
	ss, refused := h.accept(w, r)
	if refused != nil {
		h.s.requests.count(refused.status, refused.counterKey())
		if refused.status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		} else { // failed authentication is logged already
			h.s.peerLog.Info("request refused", "remote", r.RemoteAddr, "status", refused.status,
				"reason", shorten(refused.reason))
		}
		if s := refused.headerValue(h.s.cfg().Name); s != "" {
			w.Header().Set("Proxy-Status", s)
		}
		w.WriteHeader(refused.status)
		return
	}
	h.serve(w, r, ss)
}

// panicked logs a panic in the handler of a request, and panics with
// http.ErrAbortHandler, which makes HTTP/3 reset the stream.
func (h handler) panicked(r *http.Request, e *rescue.Error) {
	h.s.cfg().Logger.Error("a fault of this program ended a request; please report it with this line",
		"remote", r.RemoteAddr, "panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
	panic(http.ErrAbortHandler)
}

// accept decides on a request. The session of an accepted request is in the
// table of sessions and has not started.
func (h handler) accept(w http.ResponseWriter, r *http.Request) (session, *refusal) {
	switch {
	case r.Method != http.MethodConnect || strings.HasPrefix(r.Proto, "HTTP/"):
		return nil, refuse(http.StatusNotFound, "", "%s %q is not a request for proxying", r.Method,
			r.RequestURI)
	case r.Proto != connectip.Protocol && (r.Proto != udpProtocol || !h.s.cfg().ConnectUDP):
		return nil, refuse(http.StatusNotImplemented, "", ":protocol %q is not known", r.Proto)
	}
	if federation.IsPair(r.Header) {
		return h.acceptPair(w, r)
	}
	// A client without valid credentials learns nothing more than that.
	user, method, refused := h.identify(r)
	if refused != nil {
		return nil, refused
	}
	if refused := datagramsEnabled(w, r); refused != nil {
		return nil, refused
	}
	var ss session
	if r.Proto == udpProtocol {
		ss = new(udpSession)
	} else {
		ss = newIPSession()
	}
	h.initialize(ss.base(), r, user, method)
	refused = ss.prepare(r.Context(), r.RequestURI)
	if refused == nil {
		refused = h.admit(ss)
	}
	if refused != nil {
		ss.discard()
		return nil, refused
	}
	h.began(ss.base())
	return ss, nil
}

// began notes that a session runs on its connection. The first session raises
// the limits of the connection.
func (h handler) began(b *sessionBase) {
	if first := h.s.connLimiter.SessionBegins(b.limitedConn); first {
		admit(b.quic)
	}
}

// initialize sets the fields of b that prepare needs.
func (h handler) initialize(b *sessionBase, r *http.Request, user User, method string) {
	b.shared, b.user, b.method, b.since = &h.s.shared, user, method, time.Now()
	b.instance = token(r, connectip.InstanceHeader)
	b.installation = token(r, connectip.InstallationHeader)
	b.quic = r.Context().Value(connKey{}).(*quic.Conn)
	b.limitedConn = connlimit.FromContext(r.Context())
	b.ctx, b.stop = context.WithCancelCause(h.running)
	b.done = make(chan struct{})
}

// token returns the value of a header field with a token of the client, or ""
// if there is no valid token. An invalid token is no error: no standard defines
// the field, so another program may use the name for something else, and
// without a token the client misses only its former addresses.
func token(r *http.Request, header string) string {
	if s := r.Header.Get(header); connectip.IsToken(s) {
		return strings.Clone(s)
	}
	return ""
}

// admit puts ss into the table of sessions, in place of the sessions that it
// replaces, unless a limit forbids it. It returns after those have ended.
func (h handler) admit(ss session) *refusal {
	b, limit := ss.base(), ss.limits()
	replaced, err := h.s.sessions.add(ss, limit)
	if err != nil {
		return limit.refuse(b.user.Name, err)
	}
	admitted := false
	defer func() {
		if !admitted { // also after a panic
			h.s.sessions.remove(ss)
			close(b.done)
		}
	}()
	b.log = h.s.peerLog.With("session", b.id, "user", b.user.Name)
	// UsersChanged and Reload do not see a session that is not in the table.
	// Resolving a name takes a while, so the user may have been removed since.
	if tunnel, ok := ss.(*ipSession); ok && b.link != nil {
		h.s.peers.bindings.add(tunnel)
		if why := h.s.peers.follow(tunnel); why != nil {
			return refuse(http.StatusForbidden, "http_request_denied", "%w", why)
		}
	} else if err := followUser(ss, h.s.cfg().Users); err != nil {
		failure := &authFailure{method: b.method, class: classRevoked, user: b.user.Name,
			reason: err.Error()}
		h.s.auth.noteFailure(b.quic.RemoteAddr(), failure)
		return &refusal{status: http.StatusUnauthorized, reason: failure}
	}
	ss.added(replaced)
	for _, old := range replaced {
		old.base().stop(errReplaced)
	}
	for _, old := range replaced {
		<-old.base().done
	}
	admitted = true
	return nil
}

// serve answers an accepted request and starts its session.
func (h handler) serve(w http.ResponseWriter, r *http.Request, ss session) {
	defer rescue.Catch(func(e *rescue.Error) {
		ss.base().panicked(e)
		h.ended(ss, slog.LevelInfo, e)
		panic(http.ErrAbortHandler)
	})
	w.Header().Set(http3.CapsuleProtocolHeader, "?1")
	ss.setHeader(w.Header())
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	h.s.requests.count(http.StatusOK, accepted)
	ss.serve(w, r.RemoteAddr, func(level slog.Level, err error) { h.ended(ss, level, err) })
}

// ended logs the end of a session and takes it out of the table.
func (h handler) ended(ss session, level slog.Level, err error) {
	b := ss.base()
	b.log.Log(b.ctx, level, "session ended", "reason", shorten(err), "rx_bytes",
		b.stats.Receive.Bytes.Load(), "tx_bytes", b.stats.Send.Bytes.Load())
	b.stop(nil)
	h.s.sessions.remove(ss)
	if tunnel, ok := ss.(*ipSession); ok && b.link != nil {
		h.s.peers.ended(tunnel)
	}
	if b.limitedConn != nil {
		h.s.connLimiter.SessionEnds(b.limitedConn, b.owner().key(), ss.limits().maxOfUser)
	}
	close(b.done)
}

// datagramsEnabled waits for the client's SETTINGS and refuses a client without
// HTTP Datagrams, which cannot receive packets (RFC 9297 section 2.1.1).
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
			"the client does not support HTTP Datagrams")
	}
	return nil
}

var errNotServed = errors.New("no template has this path")

// templates are the URI templates that the proxy serves.
type templates []*connectip.Template

// match returns the scope that the raw request path asks for. The error is
// errNotServed if the path matches no template.
func (list templates) match(path string) (connectip.Scope, error) {
	for _, t := range list {
		if scope, served, err := t.Match(path); served {
			return scope, err
		}
	}
	return connectip.Scope{}, errNotServed
}
