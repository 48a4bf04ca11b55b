package proxy

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// table finds the session that a destination belongs to. Lookups take no lock:
// a change makes a new version, which shares with the old one all that did not
// change.
type table struct {
	mu sync.Mutex // serializes writers
	v  atomic.Pointer[bart.Table[*ipSession]]
}

func newTable() *table {
	t := &table{}
	t.v.Store(&bart.Table[*ipSession]{})
	return t
}

func (t *table) lookup(a netip.Addr) (*ipSession, bool) { return t.v.Load().Lookup(a) }

func (t *table) insert(p netip.Prefix, s *ipSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.v.Store(t.v.Load().InsertPersist(p, s))
}

func (t *table) remove(p netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.v.Store(t.v.Load().DeletePersist(p))
}
