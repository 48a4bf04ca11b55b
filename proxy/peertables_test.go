package proxy

import (
	"errors"
	"testing"

	"golang.org/x/time/rate"

	"masquevpn/internal/federation"
)

// TestPairsOfAConnection checks the limits of one row of the connection table.
func TestPairsOfAConnection(t *testing.T) {
	var table connections
	row := &peerConn{requests: rate.NewLimiter(rate.Inf, 1)}
	for range maxPairs {
		if err := table.begin(row); err != nil {
			t.Fatal(err)
		}
	}
	if err := table.begin(row); !errors.Is(err, errTooManyPairs) {
		t.Errorf("one more pair: got %v", err)
	}
	table.end(row)
	if err := table.begin(row); err != nil {
		t.Errorf("after the end of a pair: %v", err)
	}
	table.end(row)
	row.requests = rate.NewLimiter(pairRate, pairBurst)
	for range pairBurst {
		if err := table.begin(row); err != nil {
			t.Fatal(err)
		}
		table.end(row)
	}
	if err := table.begin(row); !errors.Is(err, errTooManyPairRequests) {
		t.Errorf("one more request: got %v", err)
	}
}

// TestConnectionTable checks the row of a connection with a pair, and that the
// end of the connection takes it out of both tables.
func TestConnectionTable(t *testing.T) {
	h := newPeerHub(t, nil)
	conn, h3 := h.dialAs(h.ca.issue(t, "b.example", "gw.b.example"))
	h.link(h3, "b.example", "a.example")
	h.peers.connections.mu.Lock()
	var rows []*peerConn
	for _, row := range h.peers.connections.rows {
		rows = append(rows, row)
	}
	if len(rows) != 1 || rows[0].dialed || len(rows[0].names) != 2 || rows[0].pairs != 1 ||
		rows[0].proofs[pairKey{"b.example", "a.example"}].Identity != federation.Certificate {
		t.Errorf("got %+v", rows)
	}
	h.peers.connections.mu.Unlock()
	_ = conn.CloseWithError(0, "")
	h.eventually("both tables are empty", func() bool {
		h.peers.connections.mu.Lock()
		defer h.peers.connections.mu.Unlock()
		return len(h.peers.connections.rows) == 0 && len(h.peers.bindings.all()) == 0
	})
}
