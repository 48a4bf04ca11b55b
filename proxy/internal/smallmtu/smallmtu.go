// Package smallmtu recognizes clients whose path may be too narrow for full
// handshake packets.
//
// A QUIC handshake begins with packets of a fixed size. If the path drops them,
// the client sees no answer and begins again. [Hints] recognizes the second
// attempt, so that a server can answer it with small packets and leave larger
// ones to path MTU discovery (RFC 9000 section 14.3). A client that begins
// again for another reason loses a few round trips.
package smallmtu

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"masquevpn/proxy/internal/source"
)

const (
	// retryWindow is the time in which a second attempt counts. Clients try
	// again within seconds.
	retryWindow = 20 * time.Second

	// maxAddrs is the number of addresses that are remembered.
	maxAddrs = 4096
)

// Hints remembers the addresses that began a handshake and have not completed
// it. The zero value is ready to use. Its methods may be called concurrently.
type Hints struct {
	mu sync.Mutex // guards the field below

	// begun is the time of the last attempt by address.
	begun map[netip.Addr]time.Time
}

// Begin notes that remote begins a handshake at the time now, and reports
// whether the handshake should use small packets.
func (h *Hints) Begin(remote net.Addr, now time.Time) (small bool) {
	addr, ok := source.Addr(remote)
	if !ok {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	last, again := h.begun[addr]
	if len(h.begun) >= maxAddrs {
		clear(h.begun) // costs a client one more attempt at most
	}
	if h.begun == nil {
		h.begun = make(map[netip.Addr]time.Time)
	}
	h.begun[addr] = now
	return again && now.Sub(last) < retryWindow
}

// Done notes that a handshake with remote is complete.
func (h *Hints) Done(remote net.Addr) {
	if addr, ok := source.Addr(remote); ok {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.begun, addr)
	}
}
