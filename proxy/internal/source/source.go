// Package source identifies the network that a remote address belongs to, so
// that limits apply to a client however many addresses it uses.
package source

import (
	"net"
	"net/netip"
)

// bits6 is the length in bits of the IPv6 prefix that counts as one source. One
// client usually has a whole /64.
const bits6 = 64

// Key returns the source of remote as text: an IPv4 address or a /64 of IPv6.
// For anything other than a UDP address it is the text of remote.
func Key(remote net.Addr) string {
	addr, ok := Addr(remote)
	if !ok {
		return remote.String()
	}
	return key(addr)
}

// KeyOf is Key for the text of an address with a port. It returns "" for any
// other text.
func KeyOf(remote string) string {
	addr, err := netip.ParseAddrPort(remote)
	if err != nil {
		return ""
	}
	return key(addr.Addr().Unmap())
}

func key(addr netip.Addr) string {
	bits := addr.BitLen()
	if addr.Is6() {
		bits = bits6
	}
	return netip.PrefixFrom(addr.WithZone(""), bits).Masked().String()
}

// Addr returns the IP address of remote and whether remote is a UDP address.
func Addr(remote net.Addr) (netip.Addr, bool) {
	u, ok := remote.(*net.UDPAddr)
	if !ok {
		return netip.Addr{}, false
	}
	return u.AddrPort().Addr().Unmap(), true
}
