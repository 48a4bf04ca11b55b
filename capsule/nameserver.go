package capsule

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/quic-go/quic-go/quicvarint"
)

// Nameserver is a recursive resolver and the ways to reach it
// (draft-ietf-masque-connect-ip-dns-06 section 3.2). The fields from ALPN on
// are service parameters (RFC 9460, RFC 9461).
type Nameserver struct {
	// Priority is at least 1. The lowest is preferred (RFC 9460 section 2.4.1).
	Priority uint16

	// Addresses have no zones. On the wire, IPv4 comes first.
	Addresses []netip.Addr

	// AuthName is the domain name that the nameserver authenticates as on an
	// encrypted transport. It is empty if there is no encrypted transport, and
	// then ALPN is empty and NoDefaultALPN is false.
	AuthName string

	// ALPN lists encrypted transports, such as "dot", "doq", "h2" and "h3".
	ALPN []string

	// NoDefaultALPN means that the nameserver does not offer unencrypted DNS.
	NoDefaultALPN bool

	// Port is 0 for the default port of each transport.
	Port uint16

	// DoHPath is the relative URI template for DNS over HTTPS, or "".
	DoHPath string

	// Params are all other service parameters, in increasing order of keys.
	Params []SvcParam
}

// SvcParam is a service parameter in wire format (RFC 9460 section 2.2) that
// has no field in [Nameserver]. Validate refuses address hints, because the
// draft forbids them.
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
	// minNameserver is the length in bytes of the shortest nameserver.
	minNameserver = 2 + 1 + 1 + 1 + 1

	maxSvcValue = 1<<16 - 1
)

// Unencrypted reports whether queries may be sent to the addresses of the
// nameserver without encryption (RFC 1035), on its port or on port 53.
func (n *Nameserver) Unencrypted() bool {
	if n.NoDefaultALPN || len(n.Addresses) == 0 {
		return false
	}
	// A client that does not understand a mandatory parameter must not use the
	// nameserver (RFC 9460 section 8).
	for _, p := range n.Params {
		for b := p.Value; p.Key == svcMandatory && len(b) >= 2; b = b[2:] {
			if !understood(binary.BigEndian.Uint16(b)) {
				return false
			}
		}
	}
	return true
}

// understood reports whether the service parameter has a field in [Nameserver].
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

// params returns all service parameters in increasing order of their keys.
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
			return fail(fieldAddress, "it is not an address, or has a zone")
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
			return fail(fieldParams, "key %d has a field of its own in Nameserver", p.Key)
		case i > 0 && p.Key <= n.Params[i-1].Key:
			return fail(fieldParams, "key %d after key %d", p.Key, n.Params[i-1].Key)
		case len(p.Value) > maxSvcValue:
			return fail(fieldParams, "key %d has %d bytes, at most %d are possible", p.Key,
				len(p.Value), maxSvcValue)
		case p.Key == svcMandatory && !isMandatory(p.Value):
			return fail(fieldParams, "mandatory is not a list of keys in increasing order")
		}
	}
	return nil
}

// isDoHPath reports whether s may be the template of a path (RFC 9461 section
// 5).
func isDoHPath(s string) bool {
	return strings.HasPrefix(s, "/") && len(s) <= maxSvcValue && utf8.ValidString(s)
}

// isMandatory reports whether b is a valid list of mandatory keys (RFC 9460
// section 8): not empty, in increasing order, without mandatory itself.
func isMandatory(b []byte) bool {
	last := svcMandatory
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

// setParam stores the service parameter in n. It makes d fail if the value does
// not have the format that the key requires.
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
