package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/time/rate"

	"masquevpn/internal/federation"
)

const (
	// maxPairs limits the pairs on a connection.
	maxPairs = 32
	// pairRate and pairBurst limit the requests for pairs on a connection, in
	// requests per second.
	pairRate, pairBurst = 10, 20
	// unusedTimeout is the time after which a connection without pairs is
	// closed.
	unusedTimeout = time.Minute
	// duplicateDelay is how long two sessions carry a pair if both ends dialed.
	duplicateDelay = time.Second
)

var (
	errTooManyPairs        = errors.New("the connection has as many pairs as allowed")
	errTooManyPairRequests = errors.New("the connection asks for pairs too often")
)

// peerConn is a connection with a peer's server: a row of the connection table.
// A domain that was not proved on it has no pair on it.
type peerConn struct {
	id     string // "c" and a decimal number
	quic   *quic.Conn
	dialed bool                // this proxy opened it
	chain  []*x509.Certificate // the peer's
	// requests limits the requests for pairs.
	requests *rate.Limiter

	// connections.mu guards the fields below.

	names  []string          // server names: the names in the certificate, if its chain is good
	proofs map[pairKey]proof // the peers that were proved, by pair
	pairs  int               // running ones
	unused *time.Timer       // closes the connection; nil while there are pairs
}

// proof is an identity that was found on a connection.
type proof struct {
	federation.Proof
	confirmed time.Time // when it was last found without a former answer
}

// connections is the table of connections with peers' servers.
type connections struct {
	mu     sync.Mutex // guards the fields below
	lastID uint64
	rows   map[*quic.Conn]*peerConn
}

// of returns the row of a connection, nil without one.
func (t *connections) of(c *quic.Conn) *peerConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rows[c]
}

// proved notes that a pair's peer was proved on a connection, and returns its
// row. The row goes when the connection ends.
func (t *connections) proved(c *quic.Conn, chain []*x509.Certificate, dialed bool, pair pairKey,
	p proof) *peerConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := t.rows[c]
	if row == nil {
		t.lastID++
		row = &peerConn{id: "c" + strconv.FormatUint(t.lastID, 10), quic: c, dialed: dialed,
			chain: chain, requests: rate.NewLimiter(pairRate, pairBurst),
			proofs: make(map[pairKey]proof)}
		if t.rows == nil {
			t.rows = make(map[*quic.Conn]*peerConn)
		}
		t.rows[c] = row
		t.awaitPairs(row)
		context.AfterFunc(c.Context(), func() { t.remove(row) })
	}
	if p.Identity != federation.Pin {
		row.names = federation.ServerNames(chain[0])
	}
	row.proofs[pair] = p
	return row
}

// remove removes the row of a connection that has ended.
func (t *connections) remove(row *peerConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.rows, row.quic)
	if row.unused != nil {
		row.unused.Stop()
	}
}

// awaitPairs closes a connection without pairs after a while. t.mu is held.
func (t *connections) awaitPairs(row *peerConn) {
	row.unused = time.AfterFunc(unusedTimeout, func() {
		t.mu.Lock()
		unused := row.pairs == 0
		t.mu.Unlock()
		if unused {
			_ = row.quic.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		}
	})
}

// proof returns the identity of a pair's peer on a connection, and reports
// whether there is one.
func (t *connections) proof(row *peerConn, pair pairKey) (proof, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := row.proofs[pair]
	return p, ok
}

// lost notes that a pair's peer is proved no longer.
func (t *connections) lost(row *peerConn, pair pairKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(row.proofs, pair)
}

// forget drops the proofs that drop reports.
func (t *connections) forget(drop func(*peerConn, pairKey) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, row := range t.rows {
		maps.DeleteFunc(row.proofs, func(pair pairKey, _ proof) bool { return drop(row, pair) })
	}
}

// begin counts a pair on a connection, unless a limit forbids it.
func (t *connections) begin(row *peerConn) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case !row.requests.Allow():
		return errTooManyPairRequests
	case row.pairs >= maxPairs:
		return errTooManyPairs
	}
	row.pairs++
	if row.unused != nil {
		row.unused.Stop()
		row.unused = nil
	}
	return nil
}

// end undoes one call of begin.
func (t *connections) end(row *peerConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row.pairs--; row.pairs == 0 && t.rows[row.quic] == row {
		t.awaitPairs(row)
	}
}

// link is the part of a session that carries a pair.
type link struct {
	pair pairKey
	conn *peerConn
}

// bindings is the table of the sessions that carry each pair, the newest first.
// The networks of a pair lead to the first; the next takes over when it ends.
type bindings struct {
	// changed is told of a pair whose sessions changed. It is called with mu
	// held.
	changed func(pairKey)

	mu   sync.Mutex // guards the field below
	rows map[pairKey][]*ipSession
}

// add adds a session to the row of its pair. If both ends have dialed, one of
// the sessions ends after duplicateDelay.
func (t *bindings) add(ss *ipSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rows == nil {
		t.rows = make(map[pairKey][]*ipSession)
	}
	pair := ss.link.pair
	t.rows[pair] = append([]*ipSession{ss}, t.rows[pair]...)
	if t.doubled(pair) {
		time.AfterFunc(duplicateDelay, func() { t.settle(pair) })
	}
	t.changed(pair)
}

// doubled reports whether both ends dialed for a pair. t.mu is held.
func (t *bindings) doubled(pair pairKey) bool {
	row := t.rows[pair]
	return slices.ContainsFunc(row, func(ss *ipSession) bool {
		return ss.link.conn.dialed != row[0].link.conn.dialed
	})
}

// settle ends the sessions of a pair on connections that the greater domain in
// byte order dialed, if there are others. So both ends keep the same one.
func (t *bindings) settle(pair pairKey) {
	t.mu.Lock()
	var ending []*ipSession
	if t.doubled(pair) {
		for _, ss := range t.rows[pair] {
			if ss.link.conn.dialed == (pair.local > pair.domain) {
				ending = append(ending, ss)
			}
		}
	}
	t.mu.Unlock()
	for _, ss := range ending {
		ss.stop(errPeerDouble)
	}
}

// remove removes a session that has ended.
func (t *bindings) remove(ss *ipSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	pair := ss.link.pair
	rest := slices.DeleteFunc(slices.Clone(t.rows[pair]), func(o *ipSession) bool {
		return o == ss
	})
	if t.rows[pair] = rest; len(rest) == 0 {
		delete(t.rows, pair)
	}
	t.changed(pair)
}

// of returns the sessions of a pair, the newest first.
func (t *bindings) of(pair pairKey) []*ipSession {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.rows[pair])
}

// all returns the sessions of all pairs.
func (t *bindings) all() []*ipSession {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*ipSession
	for _, row := range t.rows {
		list = append(list, row...)
	}
	return list
}
