package connectip

import (
	"iter"
	"sync/atomic"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// Drop is why a packet went no further. The zero value means that it did.
type Drop uint8

// The reasons for dropping a packet, each with the label under which it is
// counted.
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
	// the kernel dropped it before it came to us: the receive buffer of a UDP
	// socket was full
	DropSocketFull
	DropNoSession // no session holds the destination
	DropClosed    // the session was not there or ended
	DropDevice    // the TUN device refused it
	// the kernel dropped it before it came to us: the queue of the TUN device
	// was full
	DropDeviceFull
	numDrops
)

var dropNames = [numDrops]string{
	"", "malformed", "source", "destination", "hop_limit", "too_big", "link_local",
	"unknown_context", "queue_full", "queue_delay", "socket_full", "no_session", "closed", "device",
	"device_full",
}

func (d Drop) String() string { return dropNames[d] }

// capsuleNames are the types of capsules that are counted apart; the last
// stands for all others.
var capsuleNames = [...]string{
	"datagram", "address_assign", "address_request", "route_advertisement", "dns_assign", "pref64",
	"unknown",
}

// capsuleIndex is where t is in capsuleNames.
func capsuleIndex(t capsule.Type) int {
	switch t {
	case capsule.TypeDatagram, capsule.TypeAddressAssign, capsule.TypeAddressRequest,
		capsule.TypeRouteAdvertisement:
		return int(t)
	case capsule.TypeDNSAssign:
		return len(capsuleNames) - 3
	case capsule.TypePREF64:
		return len(capsuleNames) - 2
	}
	return len(capsuleNames) - 1
}

// Traffic counts one direction.
type Traffic struct {
	Packets, Bytes atomic.Uint64
	drops          [numDrops]atomic.Uint64
	capsules       [len(capsuleNames)]atomic.Uint64
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

// Drops returns the packets dropped so far by reason, reasons without any left
// out.
func (t *Traffic) Drops() map[string]uint64 {
	m := make(map[string]uint64)
	for reason, n := range t.EachDrop() {
		if n > 0 {
			m[reason] = n
		}
	}
	return m
}

// EachDrop goes over all reasons for dropping a packet, with how many were
// dropped.
func (t *Traffic) EachDrop() iter.Seq2[string, uint64] {
	return each(dropNames[DropNone+1:], t.drops[DropNone+1:])
}

// EachCapsule goes over all types of capsules, with how many passed. The type
// "unknown" stands for all that are skipped.
func (t *Traffic) EachCapsule() iter.Seq2[string, uint64] {
	return each(capsuleNames[:], t.capsules[:])
}

// countCapsule counts a capsule that is valid, or skipped.
func (t *Traffic) countCapsule(typ capsule.Type) { t.capsules[capsuleIndex(typ)].Add(1) }

// addTo adds t's counts to sum.
func (t *Traffic) addTo(sum *Traffic) {
	sum.Packets.Add(t.Packets.Load())
	sum.Bytes.Add(t.Bytes.Load())
	addEach(sum.drops[:], t.drops[:])
	addEach(sum.capsules[:], t.capsules[:])
}

// ICMPCounts counts ICMP errors by their kind.
type ICMPCounts struct {
	kinds [ippacket.NumICMPErrors]atomic.Uint64
}

// Count counts one.
func (c *ICMPCounts) Count(kind ippacket.ICMPError) { c.kinds[kind].Add(1) }

// Each goes over all kinds, with how many there were.
func (c *ICMPCounts) Each() iter.Seq2[string, uint64] {
	names := make([]string, len(c.kinds))
	for kind := range ippacket.NumICMPErrors {
		names[kind] = kind.String()
	}
	return each(names[1:], c.kinds[1:])
}

// Total returns how many there were of all kinds.
func (c *ICMPCounts) Total() (n uint64) {
	for i := range c.kinds {
		n += c.kinds[i].Load()
	}
	return n
}

// Stats counts what one stream, or several in turn, carried. Receive is from
// the peer, Send to the peer. All of it may be read and added to at any time.
type Stats struct {
	Receive, Send  Traffic
	ICMPSent       ICMPCounts    // ICMP errors made here
	ICMPSuppressed atomic.Uint64 // ICMP errors held back by their rate limit
}

// AddTo adds s's counts to sum.
func (s *Stats) AddTo(sum *Stats) {
	s.Receive.addTo(&sum.Receive)
	s.Send.addTo(&sum.Send)
	addEach(sum.ICMPSent.kinds[:], s.ICMPSent.kinds[:])
	sum.ICMPSuppressed.Add(s.ICMPSuppressed.Load())
}

// each pairs names with counts.
func each(names []string, counts []atomic.Uint64) iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		for i, name := range names {
			if !yield(name, counts[i].Load()) {
				return
			}
		}
	}
}

func addEach(sum, counts []atomic.Uint64) {
	for i := range counts {
		if n := counts[i].Load(); n > 0 {
			sum[i].Add(n)
		}
	}
}
