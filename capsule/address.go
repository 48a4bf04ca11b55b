package capsule

import (
	"net/netip"

	"github.com/quic-go/quic-go/quicvarint"
)

// Address is an Assigned Address or a Requested Address (RFC 9484 sections
// 4.7.1 and 4.7.2).
type Address struct {
	// RequestID ties an assignment to its request. It is never 0 in a request,
	// and 0 in an assignment that the peer did not request.
	RequestID uint64

	// Prefix is the range of addresses, without host bits. In a request, an
	// all-zero address means any address, and the prefix length is the length
	// the requester prefers.
	Prefix netip.Prefix
}

// Refused reports whether the assignment is the refusal of a request:
// 0.0.0.0/32 or ::/128 (RFC 9484 section 4.7.2).
func (a Address) Refused() bool {
	return a.Prefix.IsSingleIP() && a.Prefix.Addr().IsUnspecified()
}

func (a Address) validate(t Type, entry int) error {
	if a.RequestID > quicvarint.Max {
		return errorf(t, entry, fieldRequestID, "%d is more than 2^62-1", a.RequestID)
	}
	if !a.Prefix.IsValid() {
		return errorf(t, entry, fieldAddress, "it is not a valid prefix")
	}
	if m := a.Prefix.Masked(); m != a.Prefix {
		return errorf(t, entry, fieldAddress,
			"%s has bits set below its prefix length: it should be %s", a.Prefix, m)
	}
	return nil
}

// AddressAssign tells the peer the full list of addresses it may use. Each
// capsule replaces the previous one; an empty list withdraws all addresses.
type AddressAssign struct {
	Addresses []Address
}

// Type returns [TypeAddressAssign].
func (*AddressAssign) Type() Type { return TypeAddressAssign }

// Append appends the capsule to b.
func (c *AddressAssign) Append(b []byte) []byte {
	return appendAddresses(b, TypeAddressAssign, c.Addresses)
}

// Validate checks each entry by itself: the request ID is at most 2^62-1, and
// the prefix is valid and has no host bits.
func (c *AddressAssign) Validate() error {
	for i, a := range c.Addresses {
		if err := a.validate(TypeAddressAssign, i); err != nil {
			return err
		}
	}
	return nil
}

// AddressRequest asks the peer for addresses.
type AddressRequest struct {
	Addresses []Address
}

// Type returns [TypeAddressRequest].
func (*AddressRequest) Type() Type { return TypeAddressRequest }

// Append appends the capsule to b.
func (c *AddressRequest) Append(b []byte) []byte {
	return appendAddresses(b, TypeAddressRequest, c.Addresses)
}

// Validate checks that there is at least one entry and that no request ID is 0
// or repeated in this capsule. It checks prefixes as [AddressAssign.Validate]
// does.
func (c *AddressRequest) Validate() error {
	const t = TypeAddressRequest
	if len(c.Addresses) == 0 {
		return errorf(t, -1, "", "it has no entries")
	}
	seen := make(map[uint64]int, len(c.Addresses))
	for i, a := range c.Addresses {
		if a.RequestID == 0 {
			return errorf(t, i, fieldRequestID, "it is 0")
		}
		if first, ok := seen[a.RequestID]; ok {
			return errorf(t, i, fieldRequestID, "%d is already used by entry %d",
				a.RequestID, first)
		}
		seen[a.RequestID] = i
		if err := a.validate(t, i); err != nil {
			return err
		}
	}
	return nil
}

func appendAddresses(b []byte, t Type, addresses []Address) []byte {
	n := 0
	for _, a := range addresses {
		n += quicvarint.Len(a.RequestID) + 1 + a.Prefix.Addr().BitLen()/8 + 1
	}
	b = appendHeader(b, t, n)
	for _, a := range addresses {
		b = quicvarint.Append(b, a.RequestID)
		b = appendVersion(b, a.Prefix.Addr())
		b = append(b, a.Prefix.Addr().AsSlice()...)
		b = append(b, uint8(a.Prefix.Bits()))
	}
	return b
}

// decodeAddresses decodes the value of a capsule of type t. It checks only the
// lengths and IP versions that it needs to build the entries; Validate checks
// the rest.
func decodeAddresses(t Type, value []byte) ([]Address, error) {
	var addresses []Address
	d := decoder{typ: t, b: value}
	for ; len(d.b) > 0; d.entry++ {
		id := d.varint(fieldRequestID)
		addr := d.address(fieldAddress, d.version())
		bits := int(d.uint8(fieldPrefixLength))
		if d.err == nil && bits > addr.BitLen() {
			d.fail(fieldPrefixLength, "%d is more than %d", bits, addr.BitLen())
		}
		if d.err != nil {
			return nil, d.err
		}
		addresses = append(addresses, Address{RequestID: id, Prefix: netip.PrefixFrom(addr, bits)})
	}
	return addresses, nil
}
