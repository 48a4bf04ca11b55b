package proxy

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// initialPacketSize is that of the first QUIC packets, in bytes. It leaves
	// room for an IPv6 packet of 1280 bytes in a datagram and fits, with its
	// headers, a path of 1400 bytes.
	initialPacketSize = 1350
	// smallPacketSize is what every path of QUIC carries.
	smallPacketSize = 1200
	// retryWindow is how long an unfinished handshake counts. A client tries
	// again within seconds.
	retryWindow = 20 * time.Second
	// maxNarrow is how many addresses are remembered.
	maxNarrow = 4096
)

// narrowPaths remembers which addresses began a handshake and have not made a
// request since. When such a client tries again, the path may be too narrow for
// the packets that handshakes begin with, and it gets small ones; path MTU
// discovery takes it from there. For a client to whom this happens by chance,
// that costs a few round trips.
type narrowPaths struct {
	mu    sync.Mutex
	begun map[netip.Addr]time.Time
}

// begin notes a handshake and reports whether it is to use small packets.
func (n *narrowPaths) begin(remote net.Addr, now time.Time) bool {
	addr, ok := addrOf(remote)
	if !ok {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	last, again := n.begun[addr]
	if len(n.begun) >= maxNarrow {
		clear(n.begun) // losing what is remembered only costs a client another attempt
	}
	if n.begun == nil {
		n.begun = make(map[netip.Addr]time.Time)
	}
	n.begun[addr] = now
	return again && now.Sub(last) < retryWindow
}

// done notes that the path from remote carried a handshake.
func (n *narrowPaths) done(remote net.Addr) {
	if addr, ok := addrOf(remote); ok {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.begun, addr)
	}
}

func addrOf(a net.Addr) (netip.Addr, bool) {
	u, ok := a.(*net.UDPAddr)
	if !ok {
		return netip.Addr{}, false
	}
	return u.AddrPort().Addr().Unmap(), true
}
