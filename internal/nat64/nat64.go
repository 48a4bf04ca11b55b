// Package nat64 knows how IPv4 addresses are written into IPv6 addresses for a
// translator (RFC 6052), and how a host on a network without IPv4 finds out the
// prefix of that network's translator (RFC 7050).
package nat64

import (
	"net/netip"
	"slices"
)

// Name is the name whose IPv6 addresses, which it does not have, tell the prefix:
// a DNS64 server makes them of its IPv4 addresses.
const Name = "ipv4only.arpa."

var (
	// lengths are those that a prefix may have.
	lengths = []int{32, 40, 48, 56, 64, 96}
	// wellKnown are the IPv4 addresses of Name.
	wellKnown = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 0, 170}), netip.AddrFrom4([4]byte{192, 0, 0, 171})}
)

// reserved is the byte of an IPv6 address that holds no part of an IPv4 address
// and is zero (RFC 6052 section 2.2).
const reserved = 8

// Embed returns the IPv6 address for an IPv4 address behind the translator with
// a prefix. It reports false for what is not such a prefix, or not IPv4.
func Embed(prefix netip.Prefix, addr netip.Addr) (netip.Addr, bool) {
	if !prefix.IsValid() || !prefix.Addr().Is6() || !slices.Contains(lengths, prefix.Bits()) || !addr.Is4() {
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

// Prefixes returns the prefixes that the IPv6 addresses of Name tell. An address
// that could have more than one is left out.
func Prefixes(answers []netip.Addr) []netip.Prefix {
	var found []netip.Prefix
	for _, answer := range answers {
		var fits []netip.Prefix
		for _, addr := range wellKnown {
			var with []netip.Prefix
			for _, bits := range lengths {
				p := netip.PrefixFrom(answer, bits).Masked()
				if a, ok := Embed(p, addr); ok && sameTo(a, answer, bits) {
					with = append(with, p)
				}
			}
			if len(with) == 1 {
				fits = append(fits, with[0])
			}
		}
		if len(fits) == 1 && !slices.Contains(found, fits[0]) {
			found = append(found, fits[0])
		}
	}
	return found
}

// sameTo reports whether two addresses are the same as far as a prefix of some
// length and the IPv4 address behind it go. What is left is zero today, and may
// mean something one day (RFC 6052 section 2.2).
func sameTo(a, b netip.Addr, bits int) bool {
	end := bits + 32
	if bits < 96 {
		end += 8 // the reserved byte
	}
	p, _ := a.Prefix(end)
	q, _ := b.Prefix(end)
	return p == q
}
