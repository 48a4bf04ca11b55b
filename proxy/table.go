package proxy

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// table is the forwarding table: it maps prefixes to sessions. Lookups take no
// lock. A change creates a new version, which shares its unchanged parts with
// the previous one.
type table struct {
	mu      sync.Mutex // serializes insert and remove
	version atomic.Pointer[bart.Table[*ipSession]]
}

func newTable() *table {
	t := &table{}
	t.version.Store(&bart.Table[*ipSession]{})
	return t
}

// lookup returns the session with the longest prefix that contains a.
func (t *table) lookup(a netip.Addr) (*ipSession, bool) { return t.version.Load().Lookup(a) }

// insert maps p to ss, in place of another session.
func (t *table) insert(p netip.Prefix, ss *ipSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.version.Store(t.version.Load().InsertPersist(p, ss))
}

// remove removes the entry of p, if there is one.
func (t *table) remove(p netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.version.Store(t.version.Load().DeletePersist(p))
}
