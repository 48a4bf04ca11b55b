package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
	"masquevpn/internal/federation"
)

const (
	// recheckInterval is the time between two looks for identities that have to
	// be looked at again.
	recheckInterval = time.Second
	// recheckRetry is the time after which an identity is looked at again if
	// the owner of the domain could not be asked.
	recheckRetry = time.Minute
	// maxUnconfirmed is the time for which an identity counts while the owner
	// of the domain cannot be asked.
	maxUnconfirmed = 24 * time.Hour
)

// Classes of refused peers, for the log, besides those of package federation.
const (
	classUnknownPeer  = "unknown_peer"
	classWeakIdentity = "weak_identity"
)

// peers has the pairs of the configuration, the connections on which peers were
// proved, and the sessions that carry pairs.
type peers struct {
	cfg func() *Config
	log *slog.Logger // for events that peers cause

	connections connections
	bindings    bindings
	checks      delegationChecks
	counter     peerCounter

	mu     sync.Mutex              // guards the field below
	byPair map[pairKey]*configured // the pairs of the configuration
}

// configured is a [[peer]] of the configuration with the proofs that count.
type configured struct {
	*Peer
	proofs *federation.Peer
}

// set applies the peers of a configuration.
func (t *peers) set(c *Config) {
	byPair := make(map[pairKey]*configured, len(c.Peers))
	for i := range c.Peers {
		p := &c.Peers[i]
		byPair[p.pair()] = &configured{p, p.proofs(&c.Federation)}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byPair = byPair
}

// of returns the [[peer]] of a pair, nil without one.
func (t *peers) of(pair pairKey) *configured {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byPair[pair]
}

// ofDomain returns the pairs of a domain, the one with local first.
func (t *peers) ofDomain(domain, local string) []*configured {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*configured
	if p := t.byPair[pairKey{domain, local}]; p != nil {
		return []*configured{p}
	}
	for _, d := range t.cfg().Federation.Domains {
		if p := t.byPair[pairKey{domain, d}]; p != nil {
			list = append(list, p)
		}
	}
	return list
}

// verifier returns what asks for delegations.
func (t *peers) verifier() *federation.Verifier {
	f := &t.cfg().Federation
	return &federation.Verifier{Resolver: f.Resolver, Private: f.Private}
}

// now returns the time by which identities are judged.
func (t *peers) now() time.Time {
	if r := t.cfg().Federation.Resolver; r != nil {
		return r.Now()
	}
	return time.Now()
}

// peerFailure is the reason why a peer is refused. It is for the log; the peer
// does not learn it.
type peerFailure struct {
	federation.Pair
	class  string
	reason error
}

func (f *peerFailure) Error() string { return f.reason.Error() }

// noteFailure counts and logs a failure.
func (t *peers) noteFailure(remote net.Addr, f *peerFailure) {
	t.log.Warn("peer refused", "remote", remote.String(), "domain", f.From, "local", f.To, "class",
		f.class, "reason", shorten(f))
}

// identify returns the connection, on which the peer of a pair was proved now
// or before. The error is a *peerFailure, or errTooManyChecks.
func (t *peers) identify(ctx context.Context, c *quic.Conn, chain []*x509.Certificate,
	pair federation.Pair) (*peerConn, error) {
	candidates := t.ofDomain(pair.From, pair.To)
	if len(candidates) == 0 {
		return nil, &peerFailure{pair, classUnknownPeer,
			fmt.Errorf("no [[peer]] has the domain %s", pair.From)}
	}
	var first error
	for _, p := range candidates {
		row, err := t.identifyAs(ctx, c, chain, pair, p)
		if err == nil {
			return row, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// identifyAs is identify for one [[peer]] of the domain.
func (t *peers) identifyAs(ctx context.Context, c *quic.Conn, chain []*x509.Certificate,
	pair federation.Pair, p *configured) (*peerConn, error) {
	if row := t.connections.of(c); row != nil {
		known, ok := t.connections.proof(row, p.pair())
		if ok && t.now().Before(known.Until) && p.Policy.Accepts(known.Identity) {
			return row, nil
		}
	}
	found, failure, err := t.prove(ctx, p, chain)
	switch {
	case err != nil:
		return nil, err
	case failure != nil:
		return nil, &peerFailure{pair, failure.Class, failure}
	case !p.Policy.Accepts(found.Identity):
		return nil, &peerFailure{pair, classWeakIdentity, fmt.Errorf(
			"the identity %q is too weak for the policy %q", found.Identity, p.Policy)}
	}
	return t.connections.proved(c, chain, false, p.pair(), proof{found, t.now()}), nil
}

// prove returns the identity that chain proves for p. It asks the owner of the
// domain only if the chain is good.
func (t *peers) prove(ctx context.Context, p *configured, chain []*x509.Certificate) (
	federation.Proof, *federation.Failure, error) {
	found, failure := p.proofs.Direct(chain, t.now())
	var err error
	if failure != nil && p.proofs.Delegable(failure) {
		found, failure, err = t.checks.prove(ctx, t.verifier(), p.pair(), p.proofs, chain, failure)
	}
	t.counter.verified(found, failure, err)
	return found, failure, err
}

// revocation is the reason why a pair ended. It resets the stream, which tells
// the other end to ask again.
type revocation struct{ class, text string }

func (r *revocation) Error() string { return r.text }

func (r *revocation) Unwrap() error { return connectip.ErrRevoked }

// The revocations.
var (
	errPeerRemoved = &revocation{"removed", "its [[peer]] was removed or changed its domains"}
	errPeerPolicy  = &revocation{"policy",
		"its identity is too weak for the policy of its [[peer]]"}
	errPeerExpired  = &revocation{"expired", "its [[peer]] has expired"}
	errPeerIdentity = &revocation{"identity", "the peer no longer proves its domain"}
	errPeerDouble   = &revocation{"duplicate", "another connection carries the pair"}
	errPeerKicked   = &revocation{"operator", "ended by the operator"}
)

// revoke ends the session of a pair.
func (t *peers) revoke(ss *ipSession, why *revocation) {
	if why == errPeerIdentity || why == errPeerPolicy {
		t.connections.lost(ss.link.conn, ss.link.pair)
	}
	t.counter.revoked(why)
	ss.log.Warn("pair revoked", "class", why.class, "reason", why.text)
	ss.stop(why)
}

// follow applies the present [[peer]] of its pair to a session. The result is
// the reason why the session must end.
func (t *peers) follow(ss *ipSession) *revocation {
	b := ss.base()
	b.userState.following.Lock()
	defer b.userState.following.Unlock()
	p := t.of(ss.link.pair)
	if p == nil {
		return errPeerRemoved
	}
	known, ok := t.connections.proof(ss.link.conn, ss.link.pair)
	switch {
	case p.expired(time.Now()):
		return errPeerExpired
	case !ok:
		return errPeerIdentity
	case !p.Policy.Accepts(known.Identity):
		return errPeerPolicy
	}
	b.userState.set(p.user())
	return nil
}

// reloaded applies a new configuration to the sessions of pairs. former has the
// [[peer]] of each pair before it.
func (t *peers) reloaded(former map[pairKey]*configured) {
	t.checks.forget()
	changed := make(map[pairKey]bool) // pairs that other proofs count for
	for pair, old := range former {
		p := t.of(pair)
		changed[pair] = p == nil || !p.proofs.Equal(old.proofs)
	}
	for _, ss := range t.bindings.all() {
		why := t.follow(ss)
		if p := t.of(ss.link.pair); why == nil && changed[ss.link.pair] {
			why = t.judgeAgain(ss, p)
		}
		if why != nil {
			t.revoke(ss, why)
		}
	}
	t.connections.forget(func(row *peerConn, pair pairKey) bool {
		return changed[pair] && !slices.ContainsFunc(t.bindings.of(pair),
			func(ss *ipSession) bool { return ss.link.conn == row })
	})
}

// judgeAgain judges the identity of a session's peer by proofs that changed.
// The owner of the domain is asked later if only a delegation can prove it.
func (t *peers) judgeAgain(ss *ipSession, p *configured) *revocation {
	conn := ss.link.conn
	found, failure := p.proofs.Direct(conn.chain, t.now())
	switch {
	case failure == nil && !p.Policy.Accepts(found.Identity):
		return errPeerPolicy
	case failure == nil:
		t.connections.proved(conn.quic, conn.chain, conn.dialed, ss.link.pair,
			proof{found, t.now()})
		return nil
	}
	known, _ := t.connections.proof(conn, ss.link.pair)
	stillCounts := known.Identity == federation.WellKnown && p.WellKnown ||
		known.Identity == federation.DNSSEC && p.DNSSEC
	if !p.proofs.Delegable(failure) || !stillCounts {
		return errPeerIdentity
	}
	known.Until = t.now()
	t.connections.proved(conn.quic, conn.chain, conn.dialed, ss.link.pair, known)
	return nil
}

// formerly returns the pairs of the configuration before the next call of set.
func (t *peers) formerly() map[pairKey]*configured {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byPair
}

// recheck looks again at identities whose time has come, until ctx is done. It
// polls, because timers do not follow a change of the wall clock.
func (t *peers) recheck(ctx context.Context) error {
	tick := time.NewTicker(recheckInterval)
	defer tick.Stop()
	var looking sync.WaitGroup
	defer looking.Wait()
	slots := make(chan struct{}, maxChecks)
	busy := make(map[*ipSession]bool)
	var mu sync.Mutex // guards busy
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, ss := range t.bindings.all() {
			mu.Lock()
			due := !busy[ss] && t.due(ss)
			if due {
				busy[ss] = true
			}
			mu.Unlock()
			if !due {
				continue
			}
			looking.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				t.lookAgain(ctx, ss)
				mu.Lock()
				defer mu.Unlock()
				delete(busy, ss)
			})
		}
	}
}

// due reports whether the identity of a session's peer has to be looked at
// again.
func (t *peers) due(ss *ipSession) bool {
	known, ok := t.connections.proof(ss.link.conn, ss.link.pair)
	return ok && !t.now().Before(known.Until)
}

// lookAgain looks at the identity of a session's peer again, and ends the
// session if it is lost.
func (t *peers) lookAgain(ctx context.Context, ss *ipSession) {
	p, conn := t.of(ss.link.pair), ss.link.conn
	if p == nil {
		return // the configuration changed, which ends the session
	}
	found, failure := p.proofs.Direct(conn.chain, t.now())
	if failure != nil && p.proofs.Delegable(failure) {
		ask, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		v := t.verifier()
		found, failure = p.proofs.ByAnswer(conn.chain, v.Ask(ask, p.proofs), failure, t.now())
	}
	t.counter.verified(found, failure, nil)
	known, ok := t.connections.proof(conn, ss.link.pair)
	unconfirmed := t.now().Sub(known.confirmed) >= maxUnconfirmed
	switch {
	case ctx.Err() != nil || !ok:
		return
	case failure == nil && !found.Stale:
		known = proof{found, t.now()}
	case (failure == nil || failure.Temporary) && !unconfirmed:
		known.Until = t.now().Add(recheckRetry)
	case failure == nil:
		failure = &federation.Failure{Err: errors.New("the owner of the domain cannot be asked")}
		fallthrough
	default:
		ss.log.Warn("the delegation or the certificate of the peer is gone", "identity",
			known.Identity.String(), "reason", shorten(failure))
		t.revoke(ss, errPeerIdentity)
		return
	}
	if !p.Policy.Accepts(known.Identity) {
		t.revoke(ss, errPeerPolicy)
		return
	}
	t.connections.proved(conn.quic, conn.chain, conn.dialed, ss.link.pair, known)
}

// hosts reports whether domain is one of the proxy's own.
func (t *peers) hosts(domain string) bool {
	return slices.Contains(t.cfg().Federation.Domains, domain)
}

// ended takes the session of a pair out of the tables.
func (t *peers) ended(ss *ipSession) {
	t.bindings.remove(ss)
	t.connections.end(ss.link.conn)
}
