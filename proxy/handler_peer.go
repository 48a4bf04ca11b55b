package proxy

import (
	"crypto/x509"
	"errors"
	"net/http"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/federation"
)

// methodPeer stands for the authentication method of peers.
const methodPeer = "peer"

// acceptPair decides on a request for a pair, and counts the answer.
func (h handler) acceptPair(w http.ResponseWriter, r *http.Request) (session, *refusal) {
	ss, refused := h.decidePair(w, r)
	if refused != nil {
		h.s.peers.counter.request(refused.status)
	} else {
		h.s.peers.counter.request(http.StatusOK)
	}
	return ss, refused
}

// decidePair decides on a request for a pair. The checks are in an order in
// which strangers learn nothing: neither who is a peer, nor which domains the
// proxy stands for.
func (h handler) decidePair(w http.ResponseWriter, r *http.Request) (session, *refusal) {
	fields, refused := h.pairOf(r)
	if refused != nil {
		return nil, refused
	}
	conn, refused := h.identifyPeer(r, fields)
	if refused != nil {
		return nil, refused
	}
	pair := pairKey{fields.From, fields.To}
	p := h.s.peers.of(pair)
	switch {
	case r.Proto == udpProtocol:
		return nil, refuse(http.StatusForbidden, "http_request_denied",
			"the peer %s asks for UDP proxying, which is for users", pair.domain)
	case !h.s.peers.hosts(pair.local):
		return nil, refuse(http.StatusMisdirectedRequest, "",
			"the peer %s asks for %s, which is not in federation.domains", pair.domain, pair.local)
	case p == nil:
		return nil, refuse(http.StatusForbidden, "http_request_denied",
			"no [[peer]] links %s with %s", pair.domain, pair.local)
	case p.expired(time.Now()):
		return nil, refuse(http.StatusForbidden, "http_request_denied",
			"the [[peer]] of %s ended at %s", pair.domain, p.Expires.UTC().Format(time.RFC3339))
	}
	if refused := datagramsEnabled(w, r); refused != nil {
		return nil, refused
	}
	if err := h.s.peers.connections.begin(conn); err != nil {
		refused := refuse(http.StatusTooManyRequests, "connection_limit_reached", "the peer %s: %v",
			pair.domain, err)
		refused.details = "too many pairs or requests on this connection"
		return nil, refused
	}
	ss := newIPSession()
	h.initialize(ss.base(), r, p.user(), methodPeer)
	ss.link = &link{pair: pair, conn: conn}
	refused = ss.prepare(r.Context(), r.RequestURI)
	if refused == nil {
		refused = h.admit(ss)
	}
	if refused != nil {
		h.s.peers.ended(ss)
		ss.discard()
		return nil, refused
	}
	h.began(ss.base())
	return ss, nil
}

// pairOf returns the pair in the fields of a request. The request is for all
// destinations, or for UDP proxying, which is refused later.
func (h handler) pairOf(r *http.Request) (federation.Pair, *refusal) {
	fields, err := federation.ParseFields(r.Header)
	if err == nil && r.Proto != udpProtocol {
		scope, unmatched := h.s.templates.match(r.RequestURI)
		err = unmatched
		if err == nil && !scope.IsZero() {
			err = errors.New("a pair has no scope")
		}
	}
	if err != nil {
		return fields, refuse(http.StatusBadRequest, "http_request_error", "%v", err)
	}
	return fields, nil
}

// identifyPeer returns the connection of a peer that proves its domain. As for
// users, a connection has one authentication at a time, and the throttle delays
// the response to a failure.
func (h handler) identifyPeer(r *http.Request, pair federation.Pair) (*peerConn, *refusal) {
	conn := r.Context().Value(connKey{}).(*quic.Conn)
	done, refused := h.takeAuthTurn(r)
	if refused != nil {
		return nil, refused
	}
	defer done()
	var chain []*x509.Certificate
	if r.TLS != nil {
		chain = r.TLS.PeerCertificates
	}
	row, err := h.s.peers.identify(r.Context(), conn, chain, pair)
	if err == nil {
		return row, nil
	}
	failure, ok := errors.AsType[*peerFailure](err)
	if !ok {
		refused := refuse(http.StatusServiceUnavailable, "connection_limit_reached", "%s: %v",
			pair.From, err)
		refused.details = "too many peers at once"
		return nil, refused
	}
	h.s.peers.noteFailure(conn.RemoteAddr(), failure)
	return nil, h.refuseLate(conn, owner{pair: pairKey{pair.From, ""}}.key(), failure)
}
