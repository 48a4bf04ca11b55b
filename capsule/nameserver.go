package capsule

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/quic-go/quic-go/quicvarint"
)

// Nameserver is a recursive resolver and how it is reached
// (draft-ietf-masque-connect-ip-dns-06 section 3.2). Fields from ALPN on are
// service parameters (RFC 9460, RFC 9461).
type Nameserver struct {
	Priority  uint16       // from 1; the lowest is preferred (RFC 9460 section 2.4.1)
	Addresses []netip.Addr // without zones; IPv4 comes first on the wire

	// AuthName is the domain name that the nameserver proves to have on an
	// encrypted transport; "" if it has none of those, and no ALPN then.
	AuthName string

	ALPN          []string   // encrypted transports, such as "dot", "doq", "h2" and "h3"
	NoDefaultALPN bool       // there is no unencrypted DNS
	Port          uint16     // 0: the default one of the transport
	DoHPath       string     // relative URI template of DNS over HTTPS; "": none
	Params        []SvcParam // all others, in increasing order of their keys
}

// SvcParam is a service parameter that this package does not look into, in wire
// format (RFC 9460 section 2.2). Address hints are not among them: they must not
// be sent.
type SvcParam struct {
	Key   uint16
	Value []byte
}

// Keys of service parameters (RFC 9460 section 14.3.2, RFC 9461 section 5).
const (
	svcMandatory     = 0
	svcALPN          = 1
	svcNoDefaultALPN = 2
	svcPort          = 3
	svcIPv4Hint      = 4
	svcIPv6Hint      = 6
	svcDoHPath       = 7
)

const (
	minNameserver = 2 + 1 + 1 + 1 + 1 // bytes of a nameserver on the wire
	maxSvcValue   = 1<<16 - 1
)

// Unencrypted reports whether queries may be sent to the addresses of the
// nameserver without encryption (RFC 1035), on its port or on port 53.
func (n *Nameserver) Unencrypted() bool {
	if n.NoDefaultALPN || len(n.Addresses) == 0 {
		return false
	}
	// What has to be understood and is not makes it unusable (RFC 9460 section 8).
	for _, p := range n.Params {
		for b := p.Value; p.Key == svcMandatory && len(b) >= 2; b = b[2:] {
			if !understood(binary.BigEndian.Uint16(b)) {
				return false
			}
		}
	}
	return true
}

// understood reports whether a service parameter has a field of its own.
func understood(key uint16) bool {
	return key == svcALPN || key == svcNoDefaultALPN || key == svcPort || key == svcDoHPath
}

func (n *Nameserver) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, n.Priority)
	for _, bits := range []int{32, 128} {
		var addrs []byte
		for _, a := range n.Addresses {
			if a.BitLen() == bits {
				addrs = append(addrs, a.AsSlice()...)
			}
		}
		b = quicvarint.Append(b, uint64(len(addrs)*8/bits))
		b = append(b, addrs...)
	}
	b = appendDomain(b, n.AuthName)
	var params []byte
	for _, p := range n.params() {
		params = binary.BigEndian.AppendUint16(params, p.Key)
		params = binary.BigEndian.AppendUint16(params, uint16(len(p.Value)))
		params = append(params, p.Value...)
	}
	b = quicvarint.Append(b, uint64(len(params)))
	return append(b, params...)
}

// params returns all service parameters, in increasing order of their keys.
func (n *Nameserver) params() []SvcParam {
	all := slices.Clone(n.Params)
	if len(n.ALPN) > 0 {
		var ids []byte
		for _, id := range n.ALPN {
			ids = append(ids, uint8(len(id)))
			ids = append(ids, id...)
		}
		all = append(all, SvcParam{svcALPN, ids})
	}
	if n.NoDefaultALPN {
		all = append(all, SvcParam{svcNoDefaultALPN, nil})
	}
	if n.Port != 0 {
		all = append(all, SvcParam{svcPort, binary.BigEndian.AppendUint16(nil, n.Port)})
	}
	if n.DoHPath != "" {
		all = append(all, SvcParam{svcDoHPath, []byte(n.DoHPath)})
	}
	slices.SortStableFunc(all, func(a, b SvcParam) int { return int(a.Key) - int(b.Key) })
	return all
}

// validate checks n, a nameserver of the configuration with index entry.
func (n *Nameserver) validate(entry int) error {
	fail := func(field, format string, args ...any) error {
		return errorf(TypeDNSAssign, entry, field, format, args...)
	}
	if n.Priority == 0 {
		return fail(fieldPriority, "it is 0")
	}
	for _, a := range n.Addresses {
		if !a.IsValid() || a.Zone() != "" {
			return fail(fieldAddress, "it is not an address without zone")
		}
	}
	if n.AuthName != "" && !isDomain(n.AuthName) {
		return fail(fieldAuthName, "%.64q is not a domain name", n.AuthName)
	}
	if n.AuthName == "" && (len(n.ALPN) > 0 || n.NoDefaultALPN) {
		return fail(fieldAuthName, "it is empty, but there is alpn or no-default-alpn")
	}
	length := 0
	for _, id := range n.ALPN {
		length += 1 + len(id)
		if id == "" || len(id) > 255 || length > maxSvcValue {
			return fail(fieldParams, "alpn has a protocol of %d bytes, or too many", len(id))
		}
	}
	if n.DoHPath != "" && !isDoHPath(n.DoHPath) {
		return fail(fieldParams, "dohpath %.64q is not a relative URI template", n.DoHPath)
	}
	for i, p := range n.Params {
		switch {
		case p.Key == svcIPv4Hint || p.Key == svcIPv6Hint:
			return fail(fieldParams, "ipv4hint and ipv6hint are not allowed")
		case understood(p.Key):
			return fail(fieldParams, "key %d is a field of its own", p.Key)
		case i > 0 && p.Key <= n.Params[i-1].Key:
			return fail(fieldParams, "key %d after key %d", p.Key, n.Params[i-1].Key)
		case len(p.Value) > maxSvcValue:
			return fail(fieldParams, "key %d has %d bytes, at most %d are possible", p.Key, len(p.Value), maxSvcValue)
		case p.Key == svcMandatory && !isMandatory(p.Value):
			return fail(fieldParams, "mandatory is not a list of keys in increasing order")
		}
	}
	return nil
}

// isDoHPath reports whether s may be the template of a path (RFC 9461 section 5).
func isDoHPath(s string) bool {
	return strings.HasPrefix(s, "/") && len(s) <= maxSvcValue && utf8.ValidString(s)
}

// isMandatory reports whether b is a list of keys as RFC 9460 section 8 has it.
func isMandatory(b []byte) bool {
	last := svcMandatory // which must not be in the list itself
	for ; len(b) >= 2; b = b[2:] {
		key := int(binary.BigEndian.Uint16(b))
		if key <= last {
			return false
		}
		last = key
	}
	return len(b) == 0 && last != svcMandatory
}

func (d *decoder) nameserver() Nameserver {
	n := Nameserver{Priority: d.uint16(fieldPriority)}
	for _, family := range []struct {
		count string
		size  int
	}{{fieldIPv4Count, 4}, {fieldIPv6Count, 16}} {
		for range d.count(family.count, family.size) {
			n.Addresses = append(n.Addresses, d.address(fieldAddress, family.size))
		}
	}
	n.AuthName = d.domain(fieldAuthName)
	params := decoder{typ: d.typ, entry: d.entry, b: d.take(fieldParams, d.count(fieldParams, 1))}
	for last := -1; d.err == nil && len(params.b) > 0; {
		key := params.uint16(fieldParams)
		value := params.take(fieldParams, int(params.uint16(fieldParams)))
		if params.err == nil && int(key) <= last {
			params.fail(fieldParams, "key %d after key %d", key, last)
		}
		last = int(key)
		if params.err == nil {
			n.setParam(&params, key, value)
		}
		d.err = params.err
	}
	return n
}

// setParam takes the service parameter with the given key into n. A value that
// is not of the form that its key asks for is an error of d.
func (n *Nameserver) setParam(d *decoder, key uint16, value []byte) {
	switch key {
	case svcALPN:
		ids := decoder{typ: d.typ, entry: d.entry, b: value}
		for ids.err == nil && len(ids.b) > 0 {
			n.ALPN = append(n.ALPN, string(ids.take(fieldParams, int(ids.uint8(fieldParams)))))
		}
		if ids.err != nil || len(value) == 0 {
			d.fail(fieldParams, "alpn is not a list of protocols")
		}
	case svcNoDefaultALPN:
		n.NoDefaultALPN = true
		if len(value) > 0 {
			d.fail(fieldParams, "no-default-alpn has a value")
		}
	case svcPort:
		if len(value) == 2 {
			n.Port = binary.BigEndian.Uint16(value)
		}
		if n.Port == 0 {
			d.fail(fieldParams, "port is not a port")
		}
	case svcDoHPath:
		n.DoHPath = string(value)
		if !isDoHPath(n.DoHPath) {
			d.fail(fieldParams, "dohpath %.64q is not a relative URI template", n.DoHPath)
		}
	default:
		n.Params = append(n.Params, SvcParam{Key: key, Value: slices.Clone(value)})
	}
}
