// Package nat64 embeds IPv4 addresses in IPv6 addresses for a translator (RFC
// 6052), and finds the translator's prefix in the answers of DNS64 (RFC 7050).
// A host on a network without IPv4 reaches IPv4 hosts with both: it looks up
// [Name], gives the addresses to [Prefixes], and calls [Embed].
package nat64

import (
	"net/netip"
	"slices"
)

// Name is the name to look up for Prefixes (RFC 7050 section 3). It has only
// IPv4 addresses, so its IPv6 addresses come from a DNS64 server and have the
// prefix.
const Name = "ipv4only.arpa."

var (
	// lengths are the allowed prefix lengths (RFC 6052 section 2.2).
	lengths = []int{32, 40, 48, 56, 64, 96}

	// wellKnown are the IPv4 addresses of Name.
	wellKnown = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 0, 170}),
		netip.AddrFrom4([4]byte{192, 0, 0, 171})}
)

// reserved is the index of the byte of an IPv6 address that is always zero and
// holds no part of the IPv4 address (RFC 6052 section 2.2).
const reserved = 8

// Embed returns the IPv6 address by which a translator with the prefix makes
// the IPv4 address addr reachable. ok is false if prefix cannot be the prefix
// of a translator or addr is not IPv4.
func Embed(prefix netip.Prefix, addr netip.Addr) (embedded netip.Addr, ok bool) {
	if !prefix.IsValid() || !prefix.Addr().Is6() || !slices.Contains(lengths, prefix.Bits()) ||
		!addr.Is4() {
		return netip.Addr{}, false
	}
	b := prefix.Masked().Addr().As16()
	if b[reserved] != 0 {
		return netip.Addr{}, false
	}
	at := prefix.Bits() / 8
	for _, octet := range addr.As4() {
		if at == reserved {
			at++
		}
		b[at] = octet
		at++
	}
	return netip.AddrFrom16(b), true
}

// Prefixes returns the prefixes of translators, given the IPv6 addresses of
// Name from DNS. It ignores addresses for which more than one prefix is
// possible.
func Prefixes(answers []netip.Addr) []netip.Prefix {
	var found []netip.Prefix
	for _, answer := range answers {
		var candidates []netip.Prefix
		for _, addr := range wellKnown {
			var matches []netip.Prefix
			for _, bits := range lengths {
				p := netip.PrefixFrom(answer, bits).Masked()
				if a, ok := Embed(p, addr); ok && sameStart(a, answer, bits) {
					matches = append(matches, p)
				}
			}
			if len(matches) == 1 {
				candidates = append(candidates, matches[0])
			}
		}
		if len(candidates) == 1 && !slices.Contains(found, candidates[0]) {
			found = append(found, candidates[0])
		}
	}
	return found
}

// sameStart reports whether a and b have the same prefix of bits bits and the
// same embedded IPv4 address. It ignores the bits after these, which are zero
// today but reserved for extensions (RFC 6052 section 2.2).
func sameStart(a, b netip.Addr, bits int) bool {
	end := bits + 32
	if bits < 96 {
		end += 8 // the reserved byte
	}
	p, _ := a.Prefix(end)
	q, _ := b.Prefix(end)
	return p == q
}
