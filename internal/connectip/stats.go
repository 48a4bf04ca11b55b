package connectip

import "sync/atomic"

// Drop is why a packet went no further. The zero value means that it did.
type Drop uint8

// The reasons for dropping a packet, each with the label under which it is counted.
const (
	DropNone           Drop = iota
	DropMalformed           // not a valid IP packet
	DropSource              // source address not allowed
	DropDestination         // destination not allowed, or protocol not in the scope
	DropHopLimit            // hop limit used up
	DropTooBig              // larger than the link carries
	DropLinkLocal           // link-local traffic is not forwarded
	DropUnknownContext      // datagram of an unknown context, or without one
	DropQueueFull           // a queue of ours was full
	DropQueueDelay          // it had been waiting too long in a queue of ours
	DropSocketFull          // the kernel dropped it before it came to us: the receive buffer of a UDP socket was full
	DropNoSession           // no session holds the destination
	DropClosed              // the session was not there or ended
	DropDevice              // the TUN device refused it
	numDrops
)

var dropNames = [numDrops]string{
	"", "malformed", "source", "destination", "hop_limit", "too_big", "link_local",
	"unknown_context", "queue_full", "queue_delay", "socket_full", "no_session", "closed", "device",
}

func (d Drop) String() string { return dropNames[d] }

// Traffic counts one direction.
type Traffic struct {
	Packets, Bytes atomic.Uint64
	drops          [numDrops]atomic.Uint64
}

// Add counts one packet of so many bytes.
func (t *Traffic) Add(bytes int) {
	t.Packets.Add(1)
	t.Bytes.Add(uint64(bytes))
}

// Drop counts one packet dropped for the reason d.
func (t *Traffic) Drop(d Drop) { t.drops[d].Add(1) }

// DropMany counts n packets dropped for the reason d.
func (t *Traffic) DropMany(d Drop, n int) {
	if n > 0 {
		t.drops[d].Add(uint64(n))
	}
}

// Drops returns the packets dropped so far by reason, reasons without any left out.
func (t *Traffic) Drops() map[string]uint64 {
	m := make(map[string]uint64)
	for d := DropNone + 1; d < numDrops; d++ {
		if n := t.drops[d].Load(); n > 0 {
			m[d.String()] = n
		}
	}
	return m
}

// addTo adds t's counts to sum.
func (t *Traffic) addTo(sum *Traffic) {
	sum.Packets.Add(t.Packets.Load())
	sum.Bytes.Add(t.Bytes.Load())
	for d := range t.drops {
		sum.drops[d].Add(t.drops[d].Load())
	}
}

// Stats counts what one stream, or several in turn, carried. Receive is from the peer, Send to the peer.
// All of it may be read and added to at any time.
type Stats struct {
	Receive, Send  Traffic
	ICMPSent       atomic.Uint64 // ICMP errors made here
	ICMPSuppressed atomic.Uint64 // ICMP errors held back by their rate limit
}

// AddTo adds s's counts to sum.
func (s *Stats) AddTo(sum *Stats) {
	s.Receive.addTo(&sum.Receive)
	s.Send.addTo(&sum.Send)
	sum.ICMPSent.Add(s.ICMPSent.Load())
	sum.ICMPSuppressed.Add(s.ICMPSuppressed.Load())
}
