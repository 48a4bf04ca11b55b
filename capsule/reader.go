package capsule

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/quic-go/quic-go/quicvarint"
)

// Reader reads the capsules of one stream (RFC 9297 section 3.2). It belongs to
// one goroutine.
type Reader struct {
	// Skipped, unless nil, is called by Next for each capsule of unknown type
	// that it has skipped.
	Skipped func(Type)

	r        *bufio.Reader
	maxValue uint64
	value    bytes.Buffer // of the current capsule
	limited  io.LimitedReader
	datagram Datagram // returned by Next, again and again
	err      error    // what Next returns from now on
}

// readAhead is how much is read ahead, in bytes. Capsules are few, and most are short.
const readAhead = 256

// NewReader returns a Reader of the capsules in r, which it reads ahead of what
// Next returns. maxValue is the longest value of a known capsule that is
// accepted, in bytes; a Reader holds memory in proportion to the longest value
// that arrived, never more than a small multiple of maxValue.
func NewReader(r io.Reader, maxValue int) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, readAhead), maxValue: uint64(max(maxValue, 0))}
}

// Next returns the next capsule of a known type. Capsules of other types are
// skipped, in constant memory and whatever their length.
//
// At the end of the stream the error is io.EOF when the last capsule was whole.
// It matches [ErrMalformed] for a capsule that is malformed or cut by the end of
// the stream, and [ErrTooLarge] for one longer than the Reader accepts, which is
// known before any of it is read. Errors of the underlying reader are wrapped.
// After any error the position in the stream is lost, and Next returns the same
// error again.
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
			return nil, fmt.Errorf("%w: a %s capsule of %d bytes, at most %d are accepted", ErrTooLarge, t, length, r.maxValue)
		}
		if err := r.read(t, length); err != nil {
			return nil, err
		}
		return r.decode(t, r.value.Bytes())
	}
}

// skip discards the length bytes that are the value of a capsule.
func (r *Reader) skip(t Type, length uint64) error {
	const chunk = 1 << 20 // Discard takes an int, of 32 bits on some machines
	for left := length; left > 0; {
		n, err := r.r.Discard(int(min(left, chunk)))
		left -= uint64(n)
		if err != nil {
			return valueError(t, length-left, length, err)
		}
	}
	return nil
}

// read reads the length bytes that are the value of a capsule into r.value,
// which grows with what arrives, not with what was announced.
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

// valueError returns the error for a value of which n of length bytes were read.
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
	default: // a packet, and so without allocation
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
