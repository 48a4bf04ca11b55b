package capsule

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/quic-go/quic-go/quicvarint"
)

// Reader reads the capsules of one stream (RFC 9297 section 3.2). It is not
// safe for concurrent use.
type Reader struct {
	// Skipped is called by Next after it skipped a capsule of unknown type. It
	// may be nil.
	Skipped func(Type)

	r        *bufio.Reader
	maxValue uint64 // bytes

	// value and limited belong to the current capsule. They are fields, like
	// datagram, so that Next does not allocate for a packet.
	value    bytes.Buffer
	limited  io.LimitedReader
	datagram Datagram

	err error // returned by every later Next
}

// readAhead is the size in bytes of the buffer for reading ahead. It is small
// because capsules are few and most are short.
const readAhead = 256

// NewReader returns a Reader of the capsules in r. It may read more from r than
// Next has returned. maxValue is the length in bytes of the longest value that
// is accepted for a known type. The memory of a Reader grows with the longest
// value that arrived, to a small multiple of maxValue at most.
func NewReader(r io.Reader, maxValue int) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, readAhead), maxValue: uint64(max(maxValue, 0))}
}

// Next returns the next capsule of a known type. It skips capsules of other
// types, however long, in constant memory.
//
// The error is io.EOF if the stream ends between two capsules. It matches
// [ErrMalformed] if a capsule is malformed or cut off by the end of the stream,
// and [ErrTooLarge] if the announced length is more than the Reader accepts.
// Errors of the underlying reader are wrapped. After an error the position in
// the stream is lost, so every later call returns the same error.
func (r *Reader) Next() (Capsule, error) {
	if r.err != nil {
		return nil, r.err
	}
	c, err := r.next()
	if err != nil {
		r.err = err
		return nil, err
	}
	return c, nil
}

func (r *Reader) next() (Capsule, error) {
	for {
		if _, err := r.r.Peek(1); err != nil {
			if err == io.EOF {
				return nil, io.EOF
			}
			return nil, fmt.Errorf("reading a capsule: %w", err)
		}
		n, err := quicvarint.Read(r.r)
		if err == io.EOF {
			return nil, fmt.Errorf("%w: the stream ends inside its type", ErrMalformed)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the type of a capsule: %w", err)
		}
		t := Type(n)
		length, err := quicvarint.Read(r.r)
		if err == io.EOF {
			return nil, errorf(t, -1, fieldLength, "the stream ends inside it")
		}
		if err != nil {
			return nil, fmt.Errorf("reading the length of a %s capsule: %w", t, err)
		}
		if !t.known() {
			if err := r.skip(t, length); err != nil {
				return nil, err
			}
			if r.Skipped != nil {
				r.Skipped(t)
			}
			continue
		}
		if length > r.maxValue {
			return nil, fmt.Errorf("%w: a %s capsule of %d bytes, at most %d are accepted",
				ErrTooLarge, t, length, r.maxValue)
		}
		if err := r.read(t, length); err != nil {
			return nil, err
		}
		return r.decode(t, r.value.Bytes())
	}
}

// skip discards the value of a capsule, which has length bytes.
func (r *Reader) skip(t Type, length uint64) error {
	// Discard takes an int, which has 32 bits on some machines.
	const chunk = 1 << 20
	for remaining := length; remaining > 0; {
		n, err := r.r.Discard(int(min(remaining, chunk)))
		remaining -= uint64(n)
		if err != nil {
			return valueError(t, length-remaining, length, err)
		}
	}
	return nil
}

// read reads the value of a capsule, which has length bytes, into r.value. The
// buffer grows with the bytes that arrive, not with the announced length.
func (r *Reader) read(t Type, length uint64) error {
	r.value.Reset()
	r.limited = io.LimitedReader{R: r.r, N: int64(length)}
	n, err := r.value.ReadFrom(&r.limited)
	if err == nil && uint64(n) < length {
		err = io.EOF
	}
	if err != nil {
		return valueError(t, uint64(n), length, err)
	}
	return nil
}

// valueError returns the error for a value cut off after n of length bytes.
func valueError(t Type, n, length uint64, err error) error {
	if err == io.EOF {
		return errorf(t, -1, fieldValue, "the stream ends after %d of %d bytes", n, length)
	}
	return fmt.Errorf("reading the value of a %s capsule: %w", t, err)
}

// known reports whether capsules of type t are decoded, not skipped.
func (t Type) known() bool {
	return t <= TypeRouteAdvertisement || t == TypeDNSAssign || t == TypePREF64
}

// decode decodes and validates the value of a capsule of a known type.
func (r *Reader) decode(t Type, value []byte) (Capsule, error) {
	var c Capsule
	var err error
	switch t {
	case TypeAddressAssign:
		a := new(AddressAssign)
		a.Addresses, err = decodeAddresses(t, value)
		c = a
	case TypeAddressRequest:
		a := new(AddressRequest)
		a.Addresses, err = decodeAddresses(t, value)
		c = a
	case TypeRouteAdvertisement:
		a := new(RouteAdvertisement)
		a.Routes, err = decodeRoutes(value)
		c = a
	case TypeDNSAssign:
		a := new(DNSAssign)
		a.Configurations, err = decodeDNS(value)
		c = a
	case TypePREF64:
		a := new(PREF64)
		a.Prefixes, err = decodePREF64(value)
		c = a
	default: // TypeDatagram, for which nothing is allocated
		r.datagram.Payload = value
		c = &r.datagram
	}
	if err == nil {
		err = c.Validate()
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}
