package proxy

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
)

const (
	// firstConnectDelay and maxConnectDelay are the waits before the next
	// attempt to connect, firstAskDelay and maxAskDelay those before a pair
	// that was refused or revoked is asked for again.
	firstConnectDelay, maxConnectDelay = 250 * time.Millisecond, 30 * time.Second
	firstAskDelay, maxAskDelay         = time.Second, 5 * time.Minute

	// steadyAfter is how long a pair is connected before the waits start again
	// with the first.
	steadyAfter = 10 * time.Second

	// minResolveInterval is the time between two resolutions of a peer if all
	// servers that the first one found fail.
	minResolveInterval = 10 * time.Second
)

// serverConn is a connection that the proxy dialed.
type serverConn interface {
	// server returns the record of the server and its certificates.
	server() (discovery.Record, []*x509.Certificate)

	// ask asks for the pair of p at the authority, for a server that proved its
	// domain by proof, and returns the status of the answer. With status 200,
	// carry carries the packets of the pair until ctx or its stream ends, and
	// returns the reason.
	ask(ctx context.Context, p *Peer, proof federation.Proof, authority string) (status int,
		carry carryFunc, err error)

	// done returns a channel that is closed when the connection has ended.
	done() <-chan struct{}

	close()
}

// carryFunc carries the packets of a pair until ctx or its stream ends.
type carryFunc func(ctx context.Context) error

// peerDialer connects to peers. It has a goroutine for each pair that the
// configuration says to dial, and a table of connections, which pairs share.
type peerDialer struct {
	log    *slog.Logger
	counts *peerCounter

	// carried reports whether a stream carries the pair, also one that the peer
	// asked for.
	carried func(pairKey) bool

	// resolve finds the servers of a peer, and connect connects to one of them
	// that proves the peer's domain by one of proofs.
	resolve func(ctx context.Context, p *Peer) (*discovery.Result, error)
	connect func(ctx context.Context, p *Peer, proofs *federation.Peer,
		r *discovery.Result) (serverConn, error)

	jitter float64 // share of the waits that is random

	carriers sync.WaitGroup // the goroutines of links
	watchers sync.WaitGroup // those that await the end of connections

	mu    sync.Mutex      // guards the fields below
	ctx   context.Context // the context of run; nil before it
	links map[pairKey]*peerLink
	conns []*sharedConn
	dials []*pendingDial
}

// sharedConn is a connection in the table.
type sharedConn struct {
	serverConn
	authority string               // the :authority of requests
	pairs     map[pairKey]struct{} // pairs on it, or being asked for
	unhosted  map[string]bool      // domains that its server does not serve
	unused    *time.Timer          // closes it when it has no pairs
}

// pendingDial is an attempt to connect to some servers.
type pendingDial struct {
	addrs []netip.AddrPort
	done  chan struct{} // closed when it is over
}

// peerLink is a pair that the proxy dials.
type peerLink struct {
	d      *peerDialer
	key    pairKey
	peer   Peer
	proofs *federation.Peer
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed when the goroutine has returned

	// wake has a value when the streams of the pair changed.
	wake chan struct{}

	// The fields of this group are used by the link's goroutine alone.

	result     *discovery.Result
	resolvedAt time.Time
	failed     bool // all servers of result failed
	connecting *backoff.ExponentialBackOff
	asking     *backoff.ExponentialBackOff

	mu     sync.Mutex // guards the fields below
	state  PeerState
	reason string
	retry  time.Time
}

func newPeerDialer(log *slog.Logger) *peerDialer {
	return &peerDialer{log: log, links: make(map[pairKey]*peerLink), counts: new(peerCounter),
		jitter: 0.1}
}

// run dials until ctx is done, and waits for all pairs to end.
func (d *peerDialer) run(ctx context.Context, peers []Peer, f *Federation) {
	d.mu.Lock()
	d.ctx = ctx
	d.mu.Unlock()
	d.setPeers(peers, f)
	<-ctx.Done()
	d.carriers.Wait()
	d.mu.Lock()
	conns := slices.Clone(d.conns)
	d.mu.Unlock()
	for _, c := range conns {
		d.drop(c)
	}
	d.watchers.Wait()
}

// setPeers applies a configuration. Pairs whose peer is gone or has changed
// end; those of changed peers begin anew.
func (d *peerDialer) setPeers(peers []Peer, f *Federation) {
	d.mu.Lock()
	if d.ctx == nil || d.ctx.Err() != nil {
		d.mu.Unlock()
		return
	}
	want := make(map[pairKey]*peerLink)
	for _, p := range peers {
		if p.Connect {
			k := pairKey{p.Domain, p.Local}
			want[k] = d.newLink(k, p, f)
		}
	}
	var gone []*peerLink
	for k, l := range d.links {
		if w := want[k]; w != nil && samePeer(&l.peer, &w.peer) && l.proofs.Equal(w.proofs) {
			delete(want, k)
			continue
		}
		delete(d.links, k)
		gone = append(gone, l)
	}
	d.mu.Unlock()
	for _, l := range gone {
		l.cancel(errPeerRemoved)
	}
	for _, l := range gone {
		<-l.ended
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, l := range want {
		d.links[k] = l
		ctx, cancel := context.WithCancelCause(d.ctx)
		l.cancel = cancel
		d.carriers.Go(func() {
			defer close(l.ended)
			l.run(ctx)
		})
	}
}

func (d *peerDialer) newLink(k pairKey, p Peer, f *Federation) *peerLink {
	wait := func(first, most time.Duration) *backoff.ExponentialBackOff {
		b := &backoff.ExponentialBackOff{InitialInterval: first, RandomizationFactor: d.jitter,
			Multiplier: 2, MaxInterval: most}
		b.Reset()
		return b
	}
	return &peerLink{d: d, key: k, peer: p, proofs: p.proofs(f), state: PeerConnecting,
		wake: make(chan struct{}, 1), ended: make(chan struct{}),
		connecting: wait(firstConnectDelay, maxConnectDelay),
		asking:     wait(firstAskDelay, maxAskDelay)}
}

// samePeer reports whether a link with a goes on with b.
func samePeer(a, b *Peer) bool {
	return a.Domain == b.Domain && a.Local == b.Local && a.Policy == b.Policy &&
		a.Server == b.Server && a.Expires.Equal(b.Expires)
}

// streamsChanged tells d that a stream carries a pair, or does no longer.
func (d *peerDialer) streamsChanged(k pairKey) {
	d.mu.Lock()
	l := d.links[k]
	d.mu.Unlock()
	if l == nil {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run keeps the pair connected until ctx is done.
func (l *peerLink) run(ctx context.Context) {
	for ctx.Err() == nil {
		if l.peer.expired(time.Now().Round(0)) {
			l.note(PeerExpired, "", 0)
			<-ctx.Done()
			return
		}
		if l.d.carried(l.key) { // the peer dialed
			l.note(PeerConnected, "", 0)
			l.sleep(ctx, expiryCheck)
			continue
		}
		l.note(PeerConnecting, "", 0)
		o := l.attempt(ctx)
		if ctx.Err() != nil || o.again || l.d.carried(l.key) {
			continue
		}
		b := l.connecting
		if o.refused || o.revoked {
			b = l.asking
		}
		if o.carried > steadyAfter {
			l.connecting.Reset()
			l.asking.Reset()
		}
		delay := b.NextBackOff()
		state := PeerWaiting
		if o.refused {
			state = PeerRefused
		}
		l.note(state, o.err.Error(), delay)
		l.d.log.Warn(o.message(), "domain", l.key.domain, "local", l.key.local, "reason",
			o.err.Error(), "retry_in", delay.Round(time.Millisecond).String())
		l.sleep(ctx, delay)
	}
}

// expiryCheck is how often a link looks whether it has expired.
const expiryCheck = time.Second

// linkEnd is the end of an attempt to connect a pair.
type linkEnd struct {
	err     error
	refused bool          // the peer refused the pair
	revoked bool          // the pair ended, and its connection did not
	again   bool          // the next attempt may follow at once
	carried time.Duration // how long packets were carried
}

// message returns the text of the log line about o.
func (o *linkEnd) message() string {
	switch {
	case o.refused:
		return "peer refused"
	case o.revoked:
		return "pair revoked"
	case o.carried > 0:
		return "peer disconnected"
	}
	return "peer not reached"
}

// sleep waits for delay, until the streams of the pair change, or until ctx is
// done.
func (l *peerLink) sleep(ctx context.Context, delay time.Duration) {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		case <-l.wake:
			if l.state == PeerConnected || l.d.carried(l.key) {
				return
			}
		}
	}
}

func (l *peerLink) note(state PeerState, reason string, delay time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state, l.reason, l.retry = state, reason, time.Time{}
	if delay > 0 {
		l.retry = time.Now().Add(delay)
	}
}

// attempt connects to the peer, or takes a connection that serves it, asks for
// the pair and carries its packets.
func (l *peerLink) attempt(ctx context.Context) linkEnd {
	r, err := l.resolved(ctx)
	if err != nil {
		return linkEnd{err: fmt.Errorf("resolving: %w", err)}
	}
	c, proof, shared, err := l.d.connection(ctx, l, r)
	l.failed = err != nil
	if err != nil {
		return linkEnd{err: err}
	}
	defer l.d.release(c, l.key)
	status, carry, err := c.ask(ctx, &l.peer, proof, c.authority)
	if err != nil {
		return linkEnd{err: err}
	}
	l.d.counts.request(status)
	switch {
	case status == http.StatusMisdirectedRequest:
		l.d.mu.Lock()
		c.unhosted[l.key.domain] = true
		l.d.mu.Unlock()
		return linkEnd{refused: true, again: shared, err: fmt.Errorf(
			"the server %s does not serve %s: ask its operator", cmp.Or(proof.Name, c.authority),
			l.key.domain)}
	case status == http.StatusUnauthorized:
		return linkEnd{refused: true, err: fmt.Errorf("the peer %s does not accept our identity: "+
			"it has to have [[peer]] domain = %q, and a certificate that proves %s",
			l.key.domain, l.key.local, l.key.local)}
	case status == http.StatusForbidden:
		return linkEnd{refused: true, err: fmt.Errorf("the peer %s does not link with %s: "+
			"compare [[peer]] at both ends", l.key.domain, l.key.local)}
	case status != http.StatusOK:
		return linkEnd{revoked: true, err: fmt.Errorf("the peer %s answers with status %d",
			l.key.domain, status)}
	}
	return l.carry(ctx, carry)
}

// carry carries packets until ctx or the stream ends.
func (l *peerLink) carry(ctx context.Context, carry carryFunc) linkEnd {
	began := time.Now()
	l.note(PeerConnected, "", 0)
	err := carry(ctx)
	return linkEnd{err: err, revoked: revocationClass(err) != "",
		carried: max(time.Since(began), 1)}
}

// revocationClass returns why the stream of a pair that ended with err did so
// before its connection, for counts. It returns "" if the connection ended, or
// if the stream failed.
func revocationClass(err error) string {
	if r, ok := errors.AsType[*revocation](err); ok {
		return r.class
	}
	if _, ok := errors.AsType[*quic.StreamError](err); ok || errors.Is(err,
		connectip.ErrClosedByPeer) {
		return "peer"
	}
	return ""
}

// byResult returns the identity of a server with chain that some record of r
// may have led to.
func (l *peerLink) byResult(chain []*x509.Certificate, r *discovery.Result, now time.Time) (
	proof federation.Proof, failure *federation.Failure) {
	for _, g := range r.Groups {
		for i := range g.Records {
			if proof, failure = l.proofs.ByResult(chain, r, &g.Records[i], now); failure == nil {
				return proof, nil
			}
		}
	}
	return proof, failure
}

// resolved returns the servers of the peer. A former result is used until its
// lifetime ends, or until all of its servers failed, and while DNS fails.
func (l *peerLink) resolved(ctx context.Context) (*discovery.Result, error) {
	if r := l.result; r != nil && (r.Until.IsZero() || time.Now().Before(r.Until)) &&
		(!l.failed || time.Since(l.resolvedAt) < minResolveInterval) {
		return r, nil
	}
	r, err := l.d.resolve(ctx, &l.peer)
	if err == nil {
		l.result, l.resolvedAt, l.failed = r, time.Now(), false
		return r, nil
	}
	e, ok := errors.AsType[*discovery.Error](err)
	if l.result != nil && ok &&
		(e.Code == discovery.DNSFailure || e.Code == discovery.NoAddresses) {
		return l.result, nil
	}
	return nil, err
}

// connection returns a connection for the pair of l: one from the table whose
// server stands for the peer's domain by r, or a new one. It waits for another
// attempt with the same servers, whose connection may serve.
func (d *peerDialer) connection(ctx context.Context, l *peerLink, r *discovery.Result) (
	c *sharedConn, proof federation.Proof, shared bool, err error) {
	var own *pendingDial
	for own == nil {
		d.mu.Lock()
		for _, c := range d.conns {
			if proof, ok := d.serves(c, l, r); ok {
				d.hold(c, l.key)
				d.mu.Unlock()
				return c, proof, true, nil
			}
		}
		var other *pendingDial
		for _, p := range d.dials {
			if slices.ContainsFunc(r.Addrs(), func(a netip.AddrPort) bool {
				return slices.Contains(p.addrs, a)
			}) {
				other = p
			}
		}
		if other == nil {
			own = &pendingDial{addrs: r.Addrs(), done: make(chan struct{})}
			d.dials = append(d.dials, own)
		}
		d.mu.Unlock()
		if other != nil {
			select {
			case <-other.done:
			case <-ctx.Done():
				return nil, proof, false, context.Cause(ctx)
			}
		}
	}
	conn, err := d.connect(ctx, &l.peer, l.proofs, r)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dials = slices.DeleteFunc(d.dials, func(p *pendingDial) bool { return p == own })
	close(own.done)
	if err != nil {
		return nil, proof, false, err
	}
	record, chain := conn.server()
	proof, failure := l.proofs.ByResult(chain, r, &record, time.Now())
	d.counts.verified(proof, failure, nil)
	if failure != nil {
		conn.close()
		return nil, proof, false, failure
	}
	c = &sharedConn{serverConn: conn, authority: r.Authority, pairs: make(map[pairKey]struct{}),
		unhosted: make(map[string]bool)}
	d.conns = append(d.conns, c)
	d.hold(c, l.key)
	d.watchers.Go(func() {
		<-conn.done()
		d.drop(c)
	})
	return c, proof, false, nil
}

// serves reports whether c serves the peer of l, and how its server proves the
// domain: by a certificate for it, by the delegation file, or by signed SRV
// records. d.mu is held.
func (d *peerDialer) serves(c *sharedConn, l *peerLink, r *discovery.Result) (federation.Proof,
	bool) {
	if c.unhosted[l.key.domain] || len(c.pairs) >= maxPairs {
		return federation.Proof{}, false
	}
	select {
	case <-c.done():
		return federation.Proof{}, false
	default:
	}
	_, chain := c.server()
	proof, failure := l.byResult(chain, r, time.Now())
	return proof, failure == nil && proof.Identity != federation.Pin &&
		l.peer.Policy.Accepts(proof.Identity)
}

// hold keeps c open for a pair. d.mu is held.
func (d *peerDialer) hold(c *sharedConn, k pairKey) {
	c.pairs[k] = struct{}{}
	if c.unused != nil {
		c.unused.Stop()
	}
}

// release notes that a pair left c. Without pairs, c is closed after a while.
func (d *peerDialer) release(c *sharedConn, k pairKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(c.pairs, k)
	if len(c.pairs) > 0 || !slices.Contains(d.conns, c) {
		return
	}
	c.unused = time.AfterFunc(unusedTimeout, func() {
		d.mu.Lock()
		unused := len(c.pairs) == 0
		if unused { // no pair may take it any more
			d.conns = slices.DeleteFunc(d.conns, func(o *sharedConn) bool { return o == c })
		}
		d.mu.Unlock()
		if unused {
			c.close()
		}
	})
}

// drop takes c out of the table and closes it.
func (d *peerDialer) drop(c *sharedConn) {
	d.mu.Lock()
	d.conns = slices.DeleteFunc(d.conns, func(o *sharedConn) bool { return o == c })
	if c.unused != nil {
		c.unused.Stop()
	}
	d.mu.Unlock()
	c.close()
}
