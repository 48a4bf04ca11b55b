package capsule

import (
	"strconv"

	"github.com/quic-go/quic-go/quicvarint"
)

// Type is the type of a capsule, a 62-bit number (RFC 9297 section 3.2).
type Type uint64

// The capsule types that [Reader] decodes.
const (
	TypeDatagram           Type = 0 // RFC 9297 section 3.5
	TypeAddressAssign      Type = 1 // RFC 9484 section 4.7.1
	TypeAddressRequest     Type = 2 // RFC 9484 section 4.7.2
	TypeRouteAdvertisement Type = 3 // RFC 9484 section 4.7.3

	// The draft's numbers are provisional until it becomes an RFC.
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

	// Append appends the capsule with its type and length to b and returns the
	// extended slice. The result is undefined if Validate returns an error.
	Append(b []byte) []byte

	// Validate returns nil if the capsule may be sent and an *[Error]
	// otherwise. [Reader] applies the same rules to received capsules.
	Validate() error
}

// Datagram is an HTTP datagram carried on the stream (RFC 9297 section 3.5).
// A Datagram returned by [Reader.Next] is valid until the next call of Next,
// which overwrites it and its payload.
type Datagram struct {
	// Payload starts with the context ID (RFC 9484 section 6). If it is too
	// short to hold one, the receiver drops the datagram and keeps the stream
	// open.
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

// appendHeader appends the type and length of a capsule with n bytes of value.
func appendHeader(b []byte, t Type, n int) []byte {
	b = quicvarint.Append(b, uint64(t))
	return quicvarint.Append(b, uint64(n))
}
