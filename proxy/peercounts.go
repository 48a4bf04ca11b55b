package proxy

import (
	"maps"
	"sync"

	"masquevpn/internal/federation"
)

// PeerCounts has the counts of peers since New, which never decrease, and the
// present number of pairs.
type PeerCounts struct {
	// Pairs is the number of sessions that carry a pair, by the identity of the
	// peer.
	Pairs map[string]int

	// States is the number of configured pairs in each state.
	States map[PeerState]int

	Requests      map[int]uint64    // requests for pairs, by status
	Revocations   map[string]uint64 // pairs that this proxy ended, by reason
	Verifications map[PeerVerification]uint64
}

// PeerVerification is the outcome of a look at a peer's certificate.
type PeerVerification struct {
	Identity string // "none" if the peer was refused
	Result   string // "ok", the class of the failure, or "limited" if nobody was asked
}

// peerCounter counts what happens with peers.
type peerCounter struct {
	mu            sync.Mutex // guards the fields below
	requests      map[int]uint64
	revocations   map[string]uint64
	verifications map[PeerVerification]uint64
}

// request counts a request for a pair by the status of its answer.
func (c *peerCounter) request(status int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.requests == nil {
		c.requests = make(map[int]uint64)
	}
	c.requests[status]++
}

// revoked counts the end of a pair.
func (c *peerCounter) revoked(why *revocation) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.revocations == nil {
		c.revocations = make(map[string]uint64)
	}
	c.revocations[why.class]++
}

// verified counts a look at a peer's certificate.
func (c *peerCounter) verified(found federation.Proof, failure *federation.Failure, err error) {
	v := PeerVerification{found.Identity.String(), "ok"}
	switch {
	case err != nil:
		v.Result = "limited"
	case failure != nil:
		v.Result = failure.Class
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verifications == nil {
		c.verifications = make(map[PeerVerification]uint64)
	}
	c.verifications[v]++
}

// counts returns the counts, nil without a [[peer]].
func (t *peers) counts() *PeerCounts {
	if len(t.cfg().Peers) == 0 {
		return nil
	}
	pairs := make(map[string]int)
	for i := federation.DNSSEC; i <= federation.Certificate; i++ {
		pairs[i.String()] = 0
	}
	for _, ss := range t.bindings.all() {
		if known, ok := t.connections.proof(ss.link.conn, ss.link.pair); ok {
			pairs[known.Identity.String()]++
		}
	}
	c := &t.counter
	c.mu.Lock()
	defer c.mu.Unlock()
	return &PeerCounts{Pairs: pairs, Requests: maps.Clone(c.requests),
		Revocations: maps.Clone(c.revocations), Verifications: maps.Clone(c.verifications)}
}
