package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
)

const (
	// answerTimeout limits the wait for the answer to a request for a pair. The
	// peer may look up our domain before it answers.
	answerTimeout = 20 * time.Second

	// maxInterim limits the responses to a request. All but the last are
	// informational (RFC 9110 section 15.2).
	maxInterim = 8
)

// dialPeers makes the dialer of peers.
func (s *Server) dialPeers() *peerDialer {
	d := newPeerDialer(s.peerLog)
	d.counts = &s.peers.counter
	d.carried = func(k pairKey) bool { return len(s.peers.bindings.of(k)) > 0 }
	d.resolve, d.connect = s.resolvePeer, s.connectPeer
	s.peers.bindings.changed = d.streamsChanged
	return d
}

// resolvePeer finds the servers of a peer: those of its domain, or the one that
// the operator wrote.
func (s *Server) resolvePeer(ctx context.Context, p *Peer) (*discovery.Result, error) {
	f := &s.cfg().Federation
	if f.Resolver == nil {
		return nil, errors.New("there is no resolver")
	}
	q := discovery.Query{Name: p.Server, Purpose: discovery.Peer, Method: discovery.Addresses,
		Transports: []discovery.Transport{discovery.H3}, DNSSEC: f.DNSSEC, Private: f.Private}
	if p.Server == (discovery.Name{}) {
		name, err := discovery.ParseName(p.Domain)
		if err != nil {
			return nil, err
		}
		q.Name, q.Method = name, discovery.Auto
	} else {
		q.DNSSEC, q.Private = discovery.DNSSECOff, true // the operator wrote it
	}
	return f.Resolver.Resolve(ctx, q)
}

// connectPeer connects to a server that r has for a peer.
func (s *Server) connectPeer(ctx context.Context, p *Peer, proofs *federation.Peer,
	r *discovery.Result) (serverConn, error) {
	d := &dial.Dialer{
		TLS: s.peerTLS(p),
		Verify: func(state tls.ConnectionState, record *discovery.Record) (string, error) {
			return judgeServer(p, proofs, state.PeerCertificates, r, record, s.peers.now())
		},
		Congestion: s.cfg().Congestion,
		Tracer:     s.cfg().Tracer,
		Dropped: func(packets int) {
			s.forwarder.unrouted.Receive.DropMany(connectip.DropSocketFull, packets)
		},
		Logger: s.cfg().Logger,
	}
	c, err := d.Dial(ctx, r.Groups)
	if err != nil {
		return nil, err
	}
	return &peerServer{Conn: c, s: s, chain: c.QUIC.ConnectionState().TLS.PeerCertificates}, nil
}

// judgeServer returns the name by which the server with chain, found by record
// of r, proves the domain of p. The error is a
// *tls.CertificateVerificationError.
func judgeServer(p *Peer, proofs *federation.Peer, chain []*x509.Certificate, r *discovery.Result,
	record *discovery.Record, now time.Time) (string, error) {
	proof, failure := proofs.ByResult(chain, r, record, now)
	switch {
	case failure != nil:
		return "", &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: failure}
	case !p.Policy.Accepts(proof.Identity):
		return "", &tls.CertificateVerificationError{UnverifiedCertificates: chain,
			Err: fmt.Errorf("the identity %q is too weak for the policy %q", proof.Identity,
				p.Policy)}
	}
	return proof.Name, nil
}

// peerTLS returns the configuration of TLS towards a peer, with the proxy's
// certificate.
func (s *Server) peerTLS(p *Peer) *tls.Config {
	own := s.cfg().TLS
	return &tls.Config{Time: own.Time, KeyLogWriter: own.KeyLogWriter,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(own.Certificates) > 0 || own.GetCertificate == nil {
				return &own.Certificates[0], nil
			}
			return own.GetCertificate(&tls.ClientHelloInfo{ServerName: p.Local})
		}}
}

// peerServer is a connection that the proxy dialed.
type peerServer struct {
	*dial.Conn
	s     *Server
	chain []*x509.Certificate
}

func (c *peerServer) server() (discovery.Record, []*x509.Certificate) { return c.Record, c.chain }

func (c *peerServer) done() <-chan struct{} { return c.QUIC.Context().Done() }

func (c *peerServer) close() { c.Close() }

// ask asks for the pair of p.
func (c *peerServer) ask(ctx context.Context, p *Peer, found federation.Proof, authority string) (
	int, carryFunc, error) {
	row := c.s.peers.connections.proved(c.QUIC, c.chain, true, p.pair(),
		proof{found, c.s.peers.now()})
	str, rsp, err := c.request(ctx, p, authority)
	if err != nil {
		return 0, nil, err
	}
	cancel := func() {
		str.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
		str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	}
	if rsp.StatusCode < 200 || rsp.StatusCode > 299 {
		cancel()
		return rsp.StatusCode, nil, nil
	}
	ss, err := c.session(p, row)
	if err != nil {
		cancel()
		return 0, nil, err
	}
	return http.StatusOK, func(ctx context.Context) error {
		return c.s.carryPair(ctx, ss, str)
	}, nil
}

// request sends the request for a pair and returns its stream and the response.
func (c *peerServer) request(ctx context.Context, p *Peer, authority string) (
	*http3.RequestStream, *http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	template, err := connectip.ParseTemplate("https://" + authority + connectip.DefaultPath)
	if err != nil {
		return nil, nil, err
	}
	u, err := template.Expand(connectip.Scope{})
	if err != nil {
		return nil, nil, err
	}
	req := (&http.Request{Method: http.MethodConnect, Proto: connectip.Protocol, URL: u,
		Host:   u.Host,
		Header: http.Header{http3.CapsuleProtocolHeader: {"?1"}, "User-Agent": {"masque-proxy"}},
	}).WithContext(ctx)
	federation.Pair{From: p.Local, To: p.Domain}.SetFields(req.Header)
	str, err := c.HTTP.OpenRequestStream(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		str.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
		str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	})
	if err := str.SendRequestHeader(req); err != nil {
		return nil, nil, err
	}
	for range maxInterim {
		rsp, err := str.ReadResponse()
		switch {
		case err != nil:
			return nil, nil, err
		case rsp.StatusCode >= 200 && !stop():
			return nil, nil, context.Cause(ctx)
		case rsp.StatusCode >= 200:
			return str, rsp, nil
		}
	}
	return nil, nil, fmt.Errorf("the peer sent %d answers and no final one", maxInterim)
}

// session returns a session for the pair of p, which is in the tables.
func (c *peerServer) session(p *Peer, row *peerConn) (*ipSession, error) {
	s := c.s
	if err := s.peers.connections.begin(row); err != nil {
		return nil, err
	}
	ss := newIPSession()
	ss.shared, ss.user, ss.method, ss.since = &s.shared, p.user(), methodPeer, time.Now()
	ss.quic = c.QUIC
	ss.ctx, ss.stop = context.WithCancelCause(context.Background())
	ss.done = make(chan struct{})
	ss.link = &link{pair: p.pair(), conn: row}
	ss.claim = newClaim(ss.owner(), func(n netip.Prefix) { s.table.insert(n, ss) })
	if refused := (handler{s: s}).admit(ss); refused != nil {
		s.peers.ended(ss)
		ss.discard()
		return nil, refused.reason
	}
	return ss, nil
}

// carryPair carries the packets of a session on a stream that the proxy opened,
// until ctx or the stream ends.
func (s *Server) carryPair(ctx context.Context, ss *ipSession, str connectip.Stream) error {
	defer context.AfterFunc(ctx, func() { ss.stop(context.Cause(ctx)) })()
	ss.logPeer(ss.quic.RemoteAddr().String())
	err := ss.run(str)
	handler{s: s}.ended(ss, slog.LevelInfo, err)
	return err
}
