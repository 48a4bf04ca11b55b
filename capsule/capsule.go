// Package capsule encodes, decodes and validates the capsules of CONNECT-IP
// (RFC 9484 section 4.7, draft-ietf-masque-connect-ip-dns-06) and the DATAGRAM
// capsule (RFC 9297 section 3.5).
//
// The package is strict in what it accepts: whatever RFC 9484 has a receiver
// abort the stream for is an error that matches [ErrMalformed] and names the
// capsule, the entry and the field. What depends on the life of a session, such
// as a request ID that an earlier capsule already used, is left to the caller.
package capsule

import (
	"strconv"

	"github.com/quic-go/quic-go/quicvarint"
)

// Type is the type of a capsule, a 62-bit number (RFC 9297 section 3.2).
type Type uint64

// The capsule types this package knows.
const (
	TypeDatagram           Type = 0 // RFC 9297 section 3.5
	TypeAddressAssign      Type = 1 // RFC 9484 section 4.7.1
	TypeAddressRequest     Type = 2 // RFC 9484 section 4.7.2
	TypeRouteAdvertisement Type = 3 // RFC 9484 section 4.7.3

	// These two are provisional until the draft is an RFC.
	TypeDNSAssign Type = 0x1ace79ec // draft-ietf-masque-connect-ip-dns-06 section 3.4
	TypePREF64    Type = 0x274c0fbc // draft-ietf-masque-connect-ip-dns-06 section 4.1
)

// String returns the registered name of the type, or its number.
func (t Type) String() string {
	switch t {
	case TypeDatagram:
		return "DATAGRAM"
	case TypeAddressAssign:
		return "ADDRESS_ASSIGN"
	case TypeAddressRequest:
		return "ADDRESS_REQUEST"
	case TypeRouteAdvertisement:
		return "ROUTE_ADVERTISEMENT"
	case TypeDNSAssign:
		return "DNS_ASSIGN"
	case TypePREF64:
		return "PREF64"
	}
	return "0x" + strconv.FormatUint(uint64(t), 16)
}

// Capsule is one of *[AddressAssign], *[AddressRequest], *[RouteAdvertisement],
// *[DNSAssign], *[PREF64] and *[Datagram].
type Capsule interface {
	// Type returns the type of the capsule.
	Type() Type

	// Append appends the whole capsule, type and length included, to b and
	// returns the extended slice. The capsule must be one that Validate accepts.
	Append(b []byte) []byte

	// Validate returns nil when the capsule may be sent, by the rules that
	// [Reader] holds received ones to, and otherwise an *[Error].
	Validate() error
}

// Datagram is an HTTP datagram carried on the stream (RFC 9297 section 3.5). One
// that a [Reader] returned is valid, with its payload, until the next call of Next.
type Datagram struct {
	// Payload starts with the context ID (RFC 9484 section 6). It may be too
	// short to hold one: such a datagram is to be dropped, and is no reason to
	// abort the stream.
	Payload []byte
}

// Type returns [TypeDatagram].
func (*Datagram) Type() Type { return TypeDatagram }

// Validate returns nil: any payload may be sent.
func (*Datagram) Validate() error { return nil }

// Append appends the capsule to b.
func (d *Datagram) Append(b []byte) []byte {
	b = appendHeader(b, TypeDatagram, len(d.Payload))
	return append(b, d.Payload...)
}

// appendHeader appends the type and the length of a value of n bytes.
func appendHeader(b []byte, t Type, n int) []byte {
	b = quicvarint.Append(b, uint64(t))
	return quicvarint.Append(b, uint64(n))
}
