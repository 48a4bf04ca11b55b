package connectip

import (
	"iter"
	"sync/atomic"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// Drop is the reason for dropping a packet. The zero value means that it was
// not dropped.
type Drop uint8

// The reasons for dropping a packet.
const (
	DropNone           Drop = iota
	DropMalformed           // not a valid IP packet
	DropSource              // source not allowed
	DropDestination         // destination not allowed, or not for this protocol
	DropHopLimit            // hop limit exceeded
	DropTooBig              // longer than the MTU
	DropLinkLocal           // link-local addresses are not forwarded
	DropUnknownContext      // datagram with an unknown context ID, or without one
	DropQueueFull           // queue of this process full
	DropQueueDelay          // waited too long in a queue of this process
	DropSocketFull          // receive buffer of a UDP socket full
	DropNoSession           // no session has the destination
	DropClosed              // session ended or not yet established
	DropDevice              // write to the TUN device failed
	DropDeviceFull          // kernel's queue of the TUN device full
	numDrops
)

var dropNames = [numDrops]string{
	"", "malformed", "source", "destination", "hop_limit", "too_big", "link_local",
	"unknown_context", "queue_full", "queue_delay", "socket_full", "no_session", "closed", "device",
	"device_full",
}

// String returns the label of d in status output and metrics. It is empty for
// DropNone.
func (d Drop) String() string { return dropNames[d] }

// capsuleNames contains the labels of the capsule types that are counted. The
// last one counts all other types.
var capsuleNames = [...]string{
	"datagram", "address_assign", "address_request", "route_advertisement", "dns_assign", "pref64",
	"unknown",
}

// capsuleIndex returns the index of t in capsuleNames.
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

// Traffic counts packets, drops and capsules in one direction. It may be used
// concurrently.
type Traffic struct {
	Packets, Bytes atomic.Uint64
	drops          [numDrops]atomic.Uint64
	capsules       [len(capsuleNames)]atomic.Uint64
}

// Add counts one packet of n bytes.
func (t *Traffic) Add(n int) {
	t.Packets.Add(1)
	t.Bytes.Add(uint64(n))
}

// Drop counts one packet dropped for the reason d.
func (t *Traffic) Drop(d Drop) { t.drops[d].Add(1) }

// DropMany counts n packets dropped for the reason d.
func (t *Traffic) DropMany(d Drop, n int) {
	if n > 0 {
		t.drops[d].Add(uint64(n))
	}
}

// Drops returns the numbers of dropped packets by the label of the reason,
// without zeros.
func (t *Traffic) Drops() map[string]uint64 {
	m := make(map[string]uint64)
	for reason, n := range t.EachDrop() {
		if n > 0 {
			m[reason] = n
		}
	}
	return m
}

// EachDrop iterates over the labels of all reasons and their numbers of dropped
// packets.
func (t *Traffic) EachDrop() iter.Seq2[string, uint64] {
	return each(dropNames[DropNone+1:], t.drops[DropNone+1:])
}

// EachCapsule iterates over the labels of all capsule types and their numbers
// of capsules. The type "unknown" counts skipped capsules.
func (t *Traffic) EachCapsule() iter.Seq2[string, uint64] {
	return each(capsuleNames[:], t.capsules[:])
}

// countCapsule counts one valid or skipped capsule.
func (t *Traffic) countCapsule(typ capsule.Type) { t.capsules[capsuleIndex(typ)].Add(1) }

// addTo adds the counts of t to sum.
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

// Count counts one ICMP error.
func (c *ICMPCounts) Count(kind ippacket.ICMPError) { c.kinds[kind].Add(1) }

// Each iterates over the labels of all kinds and their numbers of ICMP errors.
func (c *ICMPCounts) Each() iter.Seq2[string, uint64] {
	names := make([]string, len(c.kinds))
	for kind := range ippacket.NumICMPErrors {
		names[kind] = kind.String()
	}
	return each(names[1:], c.kinds[1:])
}

// Total returns the number of ICMP errors of all kinds.
func (c *ICMPCounts) Total() (n uint64) {
	for i := range c.kinds {
		n += c.kinds[i].Load()
	}
	return n
}

// Stats counts the traffic of one stream, or of several consecutive streams. It
// may be used concurrently.
type Stats struct {
	Receive Traffic // packets and capsules from the peer
	Send    Traffic // packets and capsules to the peer

	ICMPSent       ICMPCounts    // ICMP errors of this endpoint
	ICMPSuppressed atomic.Uint64 // ICMP errors suppressed by the rate limit
}

// AddTo adds the counts of s to sum.
func (s *Stats) AddTo(sum *Stats) {
	s.Receive.addTo(&sum.Receive)
	s.Send.addTo(&sum.Send)
	addEach(sum.ICMPSent.kinds[:], s.ICMPSent.kinds[:])
	sum.ICMPSuppressed.Add(s.ICMPSuppressed.Load())
}

// each iterates over pairs of a name and the count with the same index.
func each(names []string, counts []atomic.Uint64) iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		for i, name := range names {
			if !yield(name, counts[i].Load()) {
				return
			}
		}
	}
}

// addEach adds each count to the sum with the same index.
func addEach(sum, counts []atomic.Uint64) {
	for i := range counts {
		if n := counts[i].Load(); n > 0 {
			sum[i].Add(n)
		}
	}
}
