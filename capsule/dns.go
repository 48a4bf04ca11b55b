package capsule

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"github.com/quic-go/quic-go/quicvarint"
)

// DNSAssign tells the peer the full list of DNS configurations
// (draft-ietf-masque-connect-ip-dns-06 section 3.4). Each capsule replaces the
// previous one; an empty list withdraws all configurations. The receiver
// decides whether it trusts the sender with name resolution.
type DNSAssign struct {
	Configurations []DNSConfiguration
}

// DNSConfiguration is a list of nameservers and the domains they resolve
// (draft-ietf-masque-connect-ip-dns-06 section 3.3). Domains are fully
// qualified names of letters, digits, "-" and "_", as IDNA A-labels, without
// the final dot.
type DNSConfiguration struct {
	// Nameservers has at least one entry.
	Nameservers []Nameserver

	// InternalDomains are the domains that the nameservers resolve, each with
	// all names below it. The root, "", stands for all names.
	InternalDomains []string

	// SearchDomains complete names that are not fully qualified.
	SearchDomains []string
}

// Type returns [TypeDNSAssign].
func (*DNSAssign) Type() Type { return TypeDNSAssign }

// Append appends the capsule to b.
func (c *DNSAssign) Append(b []byte) []byte {
	var value []byte
	for i := range c.Configurations {
		value = c.Configurations[i].append(value)
	}
	b = appendHeader(b, TypeDNSAssign, len(value))
	return append(b, value...)
}

// Validate checks that each configuration has nameservers, that domains are
// domain names, and that the fields of each [Nameserver] follow its comments.
//
// It accepts a nameserver with neither an address nor no-default-alpn, although
// section 3.2 forbids it: the draft's own example of a full tunnel has one, and
// the receiver can resolve its name.
func (c *DNSAssign) Validate() error {
	for i := range c.Configurations {
		if err := c.Configurations[i].validate(i); err != nil {
			return err
		}
	}
	return nil
}

func (c *DNSConfiguration) append(b []byte) []byte {
	b = quicvarint.Append(b, uint64(len(c.Nameservers)))
	for i := range c.Nameservers {
		b = c.Nameservers[i].append(b)
	}
	for _, domains := range [][]string{c.InternalDomains, c.SearchDomains} {
		b = quicvarint.Append(b, uint64(len(domains)))
		for _, name := range domains {
			b = appendDomain(b, name)
		}
	}
	return b
}

// validate checks c, the configuration with index entry.
func (c *DNSConfiguration) validate(entry int) error {
	if len(c.Nameservers) == 0 {
		return errorf(TypeDNSAssign, entry, fieldNameserverCount, "it is 0")
	}
	for i := range c.Nameservers {
		if err := c.Nameservers[i].validate(entry); err != nil {
			return err
		}
	}
	for _, name := range c.InternalDomains {
		if name != "" && !isDomain(name) {
			return errorf(TypeDNSAssign, entry, fieldInternalDomain,
				"%.64q is not a domain name", name)
		}
	}
	for _, name := range c.SearchDomains {
		if !isDomain(name) {
			return errorf(TypeDNSAssign, entry, fieldSearchDomain,
				"%.64q is not a domain name", name)
		}
	}
	return nil
}

// decodeDNS decodes the value of a DNS_ASSIGN. It checks only the form that it
// needs to build the configurations; Validate checks the rest.
func decodeDNS(value []byte) ([]DNSConfiguration, error) {
	var configurations []DNSConfiguration
	d := decoder{typ: TypeDNSAssign, b: value}
	for ; len(d.b) > 0; d.entry++ {
		var c DNSConfiguration
		for range d.count(fieldNameserverCount, minNameserver) {
			c.Nameservers = append(c.Nameservers, d.nameserver())
			if d.err != nil {
				return nil, d.err
			}
		}
		c.InternalDomains = d.domains(fieldInternalCount, fieldInternalDomain)
		c.SearchDomains = d.domains(fieldSearchCount, fieldSearchDomain)
		if d.err != nil {
			return nil, d.err
		}
		configurations = append(configurations, c)
	}
	return configurations, nil
}

// count decodes the number of fields that follow, each of at least size bytes.
// A number of fields that cannot fit the rest of the capsule is an error, so
// that callers may allocate by it.
func (d *decoder) count(field string, size int) int {
	n := d.varint(field)
	if d.err == nil && n > uint64(len(d.b)/size) {
		d.fail(field, "%d of them do not fit in the %d bytes that follow", n, len(d.b))
		return 0
	}
	return int(n)
}

func (d *decoder) domains(count, field string) []string {
	var domains []string
	for range d.count(count, 1) {
		name := d.domain(field)
		if d.err != nil {
			return nil
		}
		domains = append(domains, name)
	}
	return domains
}

// domain decodes a name. It removes the final dot that a fully qualified name
// may have in presentation format (RFC 1035 section 5.1).
func (d *decoder) domain(field string) string {
	n := d.count(field, 1)
	return strings.TrimSuffix(string(d.take(field, n)), ".")
}

func appendDomain(b []byte, name string) []byte {
	b = quicvarint.Append(b, uint64(len(name)))
	return append(b, name...)
}

// isDomain reports whether name is a domain name in presentation format other
// than the root. It accepts only characters that need no escaping in any file
// or command the name may be written to.
func isDomain(name string) bool {
	if len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		for _, c := range []byte(label) {
			switch {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
			case c == '-', c == '_':
			default:
				return false
			}
		}
	}
	return true
}

// PREF64 tells the peer the full list of NAT64 prefixes
// (draft-ietf-masque-connect-ip-dns-06 section 4). Each capsule replaces the
// previous one; an empty list means that there is no NAT64.
type PREF64 struct {
	// Prefixes are IPv6 prefixes without host bits. RFC 6052 section 2.2
	// allows the lengths 32, 40, 48, 56, 64 and 96.
	Prefixes []netip.Prefix
}

// Type returns [TypePREF64].
func (*PREF64) Type() Type { return TypePREF64 }

const (
	// nat64Bytes is the number of address bytes on the wire, which does not
	// depend on the prefix length.
	nat64Bytes = 12

	nat64Entry = 1 + nat64Bytes
)

// Append appends the capsule to b.
func (c *PREF64) Append(b []byte) []byte {
	b = appendHeader(b, TypePREF64, nat64Entry*len(c.Prefixes))
	for _, p := range c.Prefixes {
		addr := p.Addr().As16()
		b = append(b, uint8(p.Bits()))
		b = append(b, addr[:nat64Bytes]...)
	}
	return b
}

// Validate checks that each prefix is IPv6, has an allowed length and no host
// bits.
func (c *PREF64) Validate() error {
	const t = TypePREF64
	for i, p := range c.Prefixes {
		switch {
		case !p.IsValid() || !p.Addr().Is6():
			return errorf(t, i, fieldNAT64Prefix, "it is not an IPv6 prefix")
		case !isNAT64Length(p.Bits()):
			return errorf(t, i, fieldNAT64Length, "%d is none of 32, 40, 48, 56, 64 and 96",
				p.Bits())
		case p != p.Masked():
			return errorf(t, i, fieldNAT64Prefix,
				"%s has bits set below its prefix length: it should be %s", p, p.Masked())
		}
	}
	return nil
}

func isNAT64Length(bits int) bool {
	switch bits {
	case 32, 40, 48, 56, 64, 96:
		return true
	}
	return false
}

// decodePREF64 decodes the value of a PREF64. It clears bits below the prefix
// length, because the draft gives them no meaning.
func decodePREF64(value []byte) ([]netip.Prefix, error) {
	d := decoder{typ: TypePREF64, b: value}
	prefixes := make([]netip.Prefix, 0, len(value)/nat64Entry)
	for ; len(d.b) > 0; d.entry++ {
		bits := int(d.uint8(fieldNAT64Length))
		var addr [16]byte
		copy(addr[:], d.take(fieldNAT64Prefix, nat64Bytes))
		if d.err == nil && !isNAT64Length(bits) {
			d.fail(fieldNAT64Length, "%d is none of 32, 40, 48, 56, 64 and 96", bits)
		}
		if d.err != nil {
			return nil, d.err
		}
		prefixes = append(prefixes, netip.PrefixFrom(netip.AddrFrom16(addr), bits).Masked())
	}
	return prefixes, nil
}

func (d *decoder) uint16(field string) uint16 {
	v := d.take(field, 2)
	if v == nil {
		return 0
	}
	return binary.BigEndian.Uint16(v)
}
