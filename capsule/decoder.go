package capsule

import (
	"net/netip"

	"github.com/quic-go/quic-go/quicvarint"
)

// decoder consumes the value of a capsule field by field. When a field is
// truncated or invalid, err is set and all later fields decode as zero.
type decoder struct {
	typ   Type
	entry int    // index of the current entry
	b     []byte // remaining bytes of the value
	err   error
}

func (d *decoder) fail(field, format string, args ...any) {
	if d.err == nil {
		d.err = errorf(d.typ, d.entry, field, format, args...)
	}
}

// take consumes the next n bytes. It returns nil if there are fewer.
func (d *decoder) take(field string, n int) []byte {
	if d.err != nil {
		return nil
	}
	if len(d.b) < n {
		d.fail(field, "the capsule ends after %d of %d bytes", len(d.b), n)
		return nil
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) uint8(field string) uint8 {
	v := d.take(field, 1)
	if v == nil {
		return 0
	}
	return v[0]
}

func (d *decoder) varint(field string) uint64 {
	if d.err != nil {
		return 0
	}
	v, n, err := quicvarint.Parse(d.b)
	if err != nil {
		d.fail(field, "the capsule ends inside a variable-length integer")
		return 0
	}
	d.b = d.b[n:]
	return v
}

// version decodes the IP version and returns the length in bytes of its
// addresses.
func (d *decoder) version() int {
	switch v := d.uint8(fieldVersion); {
	case d.err != nil:
		return 0
	case v == 4:
		return 4
	case v == 6:
		return 16
	default:
		d.fail(fieldVersion, "%d is neither 4 nor 6", v)
		return 0
	}
}

// address decodes an address of n bytes.
func (d *decoder) address(field string, n int) netip.Addr {
	a, _ := netip.AddrFromSlice(d.take(field, n))
	return a
}

// appendVersion appends the IP version of a.
func appendVersion(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		return append(b, 4)
	}
	return append(b, 6)
}
