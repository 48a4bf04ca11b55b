// Package special lists the IP addresses that mean something to the host that
// uses them, so that nobody else may lead the host there: its own, those of its
// links, and those of cloud metadata services, which trust whoever asks from
// the host's address.
package special

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// Local returns the prefixes that no client reaches through a proxy: addresses
// of the host itself and of its links, and of metadata services, with the IPv6
// forms of IPv4 addresses that sockets and tunnels of the host take for IPv4
// (RFC 4291 section 2.5.5). The caller owns the slice.
func Local() []netip.Prefix { return slices.Clone(local) }

var local = prefixes(
	"0.0.0.0/8",
	"127.0.0.0/8",
	"169.254.0.0/16",
	"255.255.255.255/32",
	"fe80::/10",
	"100.100.100.200/32",
	"168.63.129.16/32",
	"192.0.0.192/32",
	"fd00:ec2::254/128",
	"fd20:ce::254/128",
	"::/96",
	"::ffff:0:0/96",
)

// noServer are the prefixes in which no server can be, beside local.
var noServer = prefixes("224.0.0.0/4", "240.0.0.0/4", "ff00::/8")

// private are the networks that every site has for itself.
var private = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
	"fc00::/7")

func prefixes(list ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range list {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

var (
	forbidden       = newSet(local, noServer)
	forbiddenToPeer = newSet(local, noServer, private)
)

func newSet(lists ...[]netip.Prefix) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, l := range lists {
		for _, p := range l {
			b.AddPrefix(p)
		}
	}
	s, err := b.IPSet()
	if err != nil {
		panic(err) // the lists are constant
	}
	return s
}

// ForbiddenServer reports whether a server at address a, which somebody else
// named, must not be used: it is the host itself, a neighbour on its links, a
// metadata service, or no unicast address. Unless private is set, private
// networks are forbidden too. Addresses of IPv6 that translators and 6to4 turn
// into IPv4 addresses are judged by these.
func ForbiddenServer(a netip.Addr, private bool) bool {
	a = a.Unmap().WithZone("")
	set := forbiddenToPeer
	if private {
		set = forbidden
	}
	return set.Contains(a) || slices.ContainsFunc(embedded(a), set.Contains)
}

var (
	wellKnownNAT64 = netip.MustParsePrefix("64:ff9b::/96")   // RFC 6052
	localNAT64     = netip.MustParsePrefix("64:ff9b:1::/48") // RFC 8215
	thisNetwork    = netip.MustParsePrefix("0.0.0.0/8")
	sixToFour      = netip.MustParsePrefix("2002::/16") // RFC 3056
)

// embedded returns the IPv4 addresses that a may mean to a translator. The
// prefix of RFC 8215 has several ways to hold one (RFC 6052 section 2.2), and a
// does not tell which of them is meant.
func embedded(a netip.Addr) []netip.Addr {
	b := a.As16()
	v4 := func(at ...int) netip.Addr {
		return netip.AddrFrom4([4]byte{b[at[0]], b[at[1]], b[at[2]], b[at[3]]})
	}
	switch {
	case !a.Is6():
		return nil
	case wellKnownNAT64.Contains(a):
		return []netip.Addr{v4(12, 13, 14, 15)}
	case localNAT64.Contains(a):
		// 0.0.0.0/8 is nobody's: the other readings of most addresses are in
		// it.
		all := []netip.Addr{v4(6, 7, 9, 10), v4(7, 9, 10, 11), v4(9, 10, 11, 12),
			v4(12, 13, 14, 15)}
		return slices.DeleteFunc(all, thisNetwork.Contains)
	case sixToFour.Contains(a):
		return []netip.Addr{v4(2, 3, 4, 5)}
	}
	return nil
}
