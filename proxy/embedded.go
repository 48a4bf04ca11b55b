package proxy

import (
	"net/netip"

	"go4.org/netipx"
)

// embedding is a prefix of IPv6 addresses that mean IPv4 addresses: whoever
// translates or wraps their packets sends them on to those.
type embedding struct {
	prefix netip.Prefix
	nat64  bool // RFC 6052, which leaves out bits 64 to 71
	one    bool // one of several that begin alike; a translator has one of them
}

// embeddings are those that nobody has to configure. The local NAT64 prefix
// (RFC 8215) is larger than a translator needs, so there are as many ways to
// put an address below it as RFC 6052 has lengths; translators with other
// prefixes of it have to be named in dns.nat64. What is left out: Teredo
// (RFC 4380) and ISATAP (RFC 5214) have the address at the end of any prefix,
// and need a program, or a tunnel, of their own on this host.
var embeddings = []embedding{
	{netip.MustParsePrefix("64:ff9b::/96"), true, false},
	{netip.MustParsePrefix("64:ff9b:1::/48"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/56"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/64"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/96"), true, true},
	{netip.MustParsePrefix("2002::/16"), false, false}, // 6to4, RFC 3056
}

// thisNetwork is nobody's address. Below one of several prefixes it would take
// in all of the longer ones.
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// of returns the addresses of e that mean addresses of the IPv4 prefix p.
func (e embedding) of(p netip.Prefix) netip.Prefix {
	const skipped = 64 / 8 // the byte that is always 0
	a, v4 := e.prefix.Masked().Addr().As16(), p.Masked().Addr().As4()
	at, bits := e.prefix.Bits()/8, e.prefix.Bits()+p.Bits()
	for i, b := range v4 {
		if e.nat64 && at == skipped {
			at++
			if p.Bits() > 8*i {
				bits += 8
			}
		}
		a[at] = b
		at++
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), bits)
}

// addEmbedded adds to b all addresses of IPv6 that mean IPv4 addresses in it,
// also those below the prefixes of translators.
func addEmbedded(b *netipx.IPSetBuilder, translators []netip.Prefix) error {
	set, err := b.Clone().IPSet()
	if err != nil {
		return err
	}
	all := embeddings[:len(embeddings):len(embeddings)]
	for _, t := range translators {
		all = append(all, embedding{t, true, false})
	}
	for _, p := range set.Prefixes() {
		if !p.Addr().Is4() {
			continue
		}
		for _, e := range all {
			if !e.one || !thisNetwork.Contains(p.Addr()) || p.Bits() < thisNetwork.Bits() {
				b.AddPrefix(e.of(p))
			}
		}
	}
	return nil
}
