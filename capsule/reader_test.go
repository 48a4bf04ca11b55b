package capsule

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/quic-go/quic-go/quicvarint"
	"pgregory.net/rapid"
)

// readAll returns all capsules of r and the error that ended them.
func readAll(r *Reader) ([]Capsule, error) {
	var capsules []Capsule
	for {
		c, err := r.Next()
		if err != nil {
			return capsules, err
		}
		if d, ok := c.(*Datagram); ok {
			c = &Datagram{Payload: bytes.Clone(d.Payload)}
		}
		capsules = append(capsules, c)
	}
}

// unknownCapsule returns a capsule of an unknown type.
func unknownCapsule(value string) []byte {
	return append(appendHeader(nil, 0x17, len(value)), value...)
}

// TestReaderSequence splits the same stream into reads in different ways.
func TestReaderSequence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOf(genCapsule).Draw(t, "capsules")
		var b []byte
		for _, c := range want {
			b = append(b, unknownCapsule("skip me")...)
			b = c.Append(b)
		}
		readers := map[string]func(io.Reader) io.Reader{
			"at once":   func(r io.Reader) io.Reader { return r },
			"one byte":  iotest.OneByteReader,
			"half":      iotest.HalfReader,
			"early EOF": iotest.DataErrReader,
		}
		for name, wrap := range readers {
			r := NewReader(wrap(bytes.NewReader(b)), len(b))
			skipped := 0
			r.Skipped = func(Type) { skipped++ }
			got, err := readAll(r)
			if err != io.EOF {
				t.Fatalf("%s: %v, want io.EOF", name, err)
			}
			if diff := cmp.Diff(want, got, compare); diff != "" {
				t.Fatalf("%s (-want +got):\n%s", name, diff)
			}
			if skipped != len(want) {
				t.Fatalf("%s: skipped %d, want %d", name, skipped, len(want))
			}
		}
	})
}

// TestReaderTruncated ends the stream after each byte of a capsule. Truncated
// capsules of unknown types are malformed too.
func TestReaderTruncated(t *testing.T) {
	assign := (&AddressAssign{[]Address{address(70, "192.0.2.1/32"),
		address(0, "2001:db8::/64")}}).Append(nil)
	for _, b := range [][]byte{
		assign,
		(&Datagram{Payload: make([]byte, 100)}).Append(nil),
		unknownCapsule(strings.Repeat("x", 100)),
		quicvarint.AppendWithLen(quicvarint.AppendWithLen(nil, 1, 8), 0, 8),
	} {
		for n := 1; n < len(b); n++ {
			r := NewReader(bytes.NewReader(b[:n]), 1<<10)
			r.Skipped = func(Type) { t.Fatalf("%x: reported as skipped", b[:n]) }
			if c, err := r.Next(); !errors.Is(err, ErrMalformed) {
				t.Fatalf("%x: %v, %v, want ErrMalformed", b[:n], c, err)
			}
		}
	}
}

// TestReaderLongVarints has a type and a length that are not encoded in the
// fewest bytes, which RFC 9000 section 16 allows.
func TestReaderLongVarints(t *testing.T) {
	b := quicvarint.AppendWithLen(nil, uint64(TypeRouteAdvertisement), 8)
	b = quicvarint.AppendWithLen(b, 0, 4)
	if c, err := NewReader(bytes.NewReader(b), 0).Next(); err != nil ||
		c.Type() != TypeRouteAdvertisement {
		t.Errorf("got %v, %v", c, err)
	}
}

func TestReaderTransportError(t *testing.T) {
	broken := errors.New("stream reset")
	b := (&AddressAssign{[]Address{address(300, "192.0.2.1/32")}}).Append(unknownCapsule("skip me"))
	for n := range len(b) {
		r := NewReader(io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken)), 1<<10)
		c, err := r.Next()
		if !errors.Is(err, broken) || errors.Is(err, ErrMalformed) {
			t.Fatalf("after %d bytes: %v, %v, want the error of the stream", n, c, err)
		}
		if _, again := r.Next(); again != err {
			t.Fatalf("the next call returned %v, want %v", again, err)
		}
	}
}

// TestReaderErrorIsFinal checks that the bytes after an error are not read as a
// capsule, because the position in the stream is lost.
func TestReaderErrorIsFinal(t *testing.T) {
	good := (&AddressAssign{}).Append(nil)
	bad := (&AddressRequest{}).Append(nil)
	r := NewReader(bytes.NewReader(append(bad, good...)), 1<<10)
	for range 2 {
		if c, err := r.Next(); !errors.Is(err, ErrMalformed) {
			t.Fatalf("got %v, %v, want ErrMalformed", c, err)
		}
	}
}

func TestReaderEntryErrors(t *testing.T) {
	v4 := "\x00\x04\xc0\x00\x02\x01\x20"
	for _, tt := range []struct {
		name  string
		typ   Type
		value string
		entry int
		field string
	}{
		{"request id truncated", TypeAddressAssign, v4 + "\x40", 1, fieldRequestID},
		{"no version", TypeAddressAssign, v4 + "\x00", 1, fieldVersion},
		{"version 0", TypeAddressAssign, v4 + "\x00\x00", 1, fieldVersion},
		{"address truncated", TypeAddressAssign, v4 + v4 + "\x00\x06\x00\x00", 2, fieldAddress},
		{"no prefix length", TypeAddressAssign, v4[:6], 0, fieldPrefixLength},
		{"prefix length 33", TypeAddressRequest, "\x01\x04\x00\x00\x00\x00\x21", 0,
			fieldPrefixLength},
		{"prefix length 129", TypeAddressRequest, "\x01\x06" + strings.Repeat("\x00", 16) + "\x81",
			0, fieldPrefixLength},
		{"host bits", TypeAddressAssign, v4 + "\x00\x04\xc0\x00\x02\x01\x1f", 1, fieldAddress},
		{"id 0", TypeAddressRequest, v4, 0, fieldRequestID},
		{"id twice", TypeAddressRequest, "\x01" + v4[1:] + "\x01" + v4[1:], 1, fieldRequestID},
		{"route version 7", TypeRouteAdvertisement, "\x07", 0, fieldVersion},
		{"no start", TypeRouteAdvertisement, "\x06", 0, fieldStart},
		{"end truncated", TypeRouteAdvertisement, "\x04\x00\x00\x00\x00\x00", 0, fieldEnd},
		{"no protocol", TypeRouteAdvertisement, "\x04\x00\x00\x00\x00\x00\x00\x00\x00", 0,
			fieldProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := append(appendHeader(nil, tt.typ, len(tt.value)), tt.value...)
			_, err := NewReader(bytes.NewReader(b), 1<<10).Next()
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("got %v, want an *Error", err)
			}
			if e.Type != tt.typ || e.Entry != tt.entry || e.Field != tt.field {
				t.Errorf("%v: want type %s, entry %d, field %s", e, tt.typ, tt.entry, tt.field)
			}
		})
	}
}

func TestReaderTooLarge(t *testing.T) {
	const limit = 14
	two := &AddressAssign{[]Address{address(0, "192.0.2.1/32"), address(0, "192.0.2.2/32")}}
	if _, err := NewReader(bytes.NewReader(two.Append(nil)), limit).Next(); err != nil {
		t.Errorf("a value as long as the limit: %v", err)
	}
	for _, typ := range []Type{TypeDatagram, TypeAddressAssign, TypeAddressRequest,
		TypeRouteAdvertisement, TypeDNSAssign, TypePREF64} {
		for _, length := range []uint64{limit + 1, 1 << 32, quicvarint.Max} {
			// The value never arrives, because the length is enough to decide.
			b := quicvarint.Append(quicvarint.Append(nil, uint64(typ)), length)
			r := NewReader(io.MultiReader(bytes.NewReader(b), iotest.ErrReader(errOpen)), limit)
			if c, err := r.Next(); !errors.Is(err, ErrTooLarge) || errors.Is(err, ErrMalformed) {
				t.Errorf("%s of %d bytes: %v, %v, want ErrTooLarge", typ, length, c, err)
			}
		}
	}
	if _, err := NewReader(bytes.NewReader(two.Append(nil)), -1).Next(); !errors.Is(err,
		ErrTooLarge) {
		t.Errorf("with a negative limit: %v, want ErrTooLarge", err)
	}
}

// zeros returns a stream of n zero bytes.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// allocated returns the number of bytes that f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestReaderEndlessUnknown reads one endless capsule of unknown type, and an
// endless sequence of short ones, in constant memory.
func TestReaderEndlessUnknown(t *testing.T) {
	const n = 16 << 20
	streams := map[string]io.Reader{
		"one": io.MultiReader(bytes.NewReader(quicvarint.Append(quicvarint.Append(nil, 0x17),
			quicvarint.Max)), zeros(n), iotest.ErrReader(errOpen)),
		"many": io.MultiReader(
			bytes.NewReader(bytes.Repeat(unknownCapsule(""), 1<<16)), iotest.ErrReader(errOpen)),
	}
	for name, stream := range streams {
		t.Run(name, func(t *testing.T) {
			r := NewReader(stream, 1<<10)
			used := allocated(func() {
				if c, err := r.Next(); !errors.Is(err, errOpen) {
					t.Errorf("got %v, %v, want errOpen", c, err)
				}
			})
			if used > 64<<10 {
				t.Errorf("%d bytes allocated", used)
			}
		})
	}
}

// TestReaderAnnouncedOnly announces a long value of which little arrives.
// Memory is allocated only for the bytes that arrive.
func TestReaderAnnouncedOnly(t *testing.T) {
	const announced = 1 << 30
	b := quicvarint.Append(quicvarint.Append(nil, uint64(TypeRouteAdvertisement)), announced)
	r := NewReader(io.MultiReader(bytes.NewReader(b), zeros(1000), iotest.ErrReader(errOpen)),
		announced)
	used := allocated(func() {
		if c, err := r.Next(); !errors.Is(err, errOpen) {
			t.Errorf("got %v, %v, want errOpen", c, err)
		}
	})
	if used > 1<<20 {
		t.Errorf("%d bytes allocated for 1000 bytes of a value", used)
	}
}

// TestReaderLargestCapsules decodes capsules with so many entries that checks
// in quadratic time would not end.
func TestReaderLargestCapsules(t *testing.T) {
	const n = 1 << 16
	var request AddressRequest
	var routes RouteAdvertisement
	addr := netip.MustParseAddr("10.0.0.0")
	for i := range n {
		request.Addresses = append(request.Addresses,
			Address{uint64(i + 1), netip.PrefixFrom(addr, 32)})
		routes.Routes = append(routes.Routes, Route{Start: addr, End: addr})
		addr = addr.Next().Next()
	}
	for _, r := range routes.Routes[:n] {
		routes.Routes = append(routes.Routes,
			Route{Start: r.Start.Next(), End: r.Start.Next(), Protocol: 6})
	}
	for _, want := range []Capsule{&request, &routes} {
		b := want.Append(nil)
		got, err := NewReader(bytes.NewReader(b), len(b)).Next()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Append(nil), b) {
			t.Errorf("%s: the decoded capsule differs from the sent one", want.Type())
		}
	}
}

// TestReaderDatagramAllocations checks that Next does not allocate for packets
// once its buffer has grown.
func TestReaderDatagramAllocations(t *testing.T) {
	const n, size = 100, 10 << 10
	capsules := bytes.Repeat((&Datagram{Payload: make([]byte, size)}).Append(nil), n+2)
	r := NewReader(bytes.NewReader(capsules), size)
	next := func() {
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
	next()
	if got := testing.AllocsPerRun(n, next); got != 0 {
		t.Errorf("%v allocations per datagram", got)
	}
}

func FuzzReader(f *testing.F) {
	for _, v := range readVectors(f) {
		f.Add(v.bytes(f))
	}
	f.Add(append(unknownCapsule("skip me"),
		(&AddressAssign{[]Address{address(0, "0.0.0.0/0")}}).Append(nil)...))
	f.Add((&DNSAssign{[]DNSConfiguration{{
		Nameservers: []Nameserver{{
			Priority: 1, Addresses: addrs("192.0.2.1", "2001:db8::1"), AuthName: "a.example",
			ALPN: []string{"dot"}, NoDefaultALPN: true,
			Port: 853, DoHPath: "/",
			Params: []SvcParam{{0, []byte{0, 3}}, {5, []byte("x")}, {9, nil}},
		}},
		InternalDomains: []string{""}, SearchDomains: []string{"b.example"},
	}}}).Append(nil))
	const limit = 1 << 10
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReader(bytes.NewReader(b), limit)
		capsules, err := readAll(r)
		if err != io.EOF && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrTooLarge) {
			t.Fatalf("unexpected error: %v", err)
		}

		// The result does not depend on the size of reads.
		bytewise, bytewiseErr := readAll(
			NewReader(iotest.OneByteReader(bytes.NewReader(b)), limit))
		if diff := cmp.Diff(capsules, bytewise, compare); diff != "" {
			t.Fatalf("(-read at once +read byte by byte):\n%s", diff)
		}
		if bytewiseErr.Error() != err.Error() {
			t.Fatalf("read byte by byte: %v, read at once: %v", bytewiseErr, err)
		}

		// Received capsules are valid to send and decode to themselves.
		var again []byte
		for _, c := range capsules {
			if err := c.Validate(); err != nil {
				t.Fatalf("%v: %v", c, err)
			}
			again = c.Append(again)
		}
		if len(again) > len(b) {
			t.Fatalf("%d bytes became %d", len(b), len(again))
		}
		got, err := readAll(NewReader(bytes.NewReader(again), limit))
		if err != io.EOF {
			t.Fatalf("encoded again: %v", err)
		}
		if diff := cmp.Diff(capsules, got, compare); diff != "" {
			t.Fatalf("encoded again (-want +got):\n%s", diff)
		}
	})
}
