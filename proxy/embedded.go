package proxy

import (
	"net/netip"

	"go4.org/netipx"
)

// embedding is an IPv6 prefix under which translators or tunnels embed IPv4
// addresses. A packet to such an IPv6 address is forwarded to the IPv4 address.
type embedding struct {
	prefix netip.Prefix

	// nat64 selects the format of RFC 6052, which skips bits 64 to 71.
	nat64 bool

	// ambiguous means that the embedding is one of several whose prefixes
	// overlap. A translator uses only one of them.
	ambiguous bool
}

// embeddings are the embeddings that need no configuration. The local NAT64
// prefix (RFC 8215) is larger than a translator needs, so its addresses may
// have any format of RFC 6052. Other prefixes of translators must be configured
// in dns.nat64. Teredo (RFC 4380) and ISATAP (RFC 5214) are missing: they embed
// the address under any prefix, and need a program or a tunnel on this host.
var embeddings = []embedding{
	{netip.MustParsePrefix("64:ff9b::/96"), true, false},
	{netip.MustParsePrefix("64:ff9b:1::/48"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/56"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/64"), true, true},
	{netip.MustParsePrefix("64:ff9b:1::/96"), true, true},
	{netip.MustParsePrefix("2002::/16"), false, false}, // 6to4, RFC 3056
}

// thisNetwork is 0.0.0.0/8 (RFC 1122 section 3.2.1.3), which nobody can reach.
// Embedded under a short ambiguous prefix, it would contain the longer ones.
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// embed returns the IPv6 addresses that embed the IPv4 prefix p.
func (e embedding) embed(p netip.Prefix) netip.Prefix {
	const skipped = 64 / 8 // index of the byte that is always 0
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

// addEmbedded adds to b all IPv6 addresses that embed an IPv4 address in b.
// translators are the configured NAT64 prefixes.
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
			if !e.ambiguous || !thisNetwork.Contains(p.Addr()) || p.Bits() < thisNetwork.Bits() {
				b.AddPrefix(e.embed(p))
			}
		}
	}
	return nil
}
