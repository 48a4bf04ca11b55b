package ippacket

import (
	"bytes"
	"testing"
)

func FuzzParse(f *testing.F) {
	for _, c := range linuxPackets(f) {
		f.Add(c.b)
	}
	f.Add(packet6(headerHopByHop, extension(headerDestination, 8), extension(headerRouting, 16),
		extension(headerFragment, 24),
		fragmentHeader(headerAuth, 0, false), authentication(headerDestination, 12),
		extension(17, 8), pattern(8)))
	f.Add(packet6(headerRouting, make([]byte, 24)))
	f.Add(packet6(headerFragment, fragmentHeader(6, 0, true)))
	f.Add(icmp4(f, 3, 4, pattern(28)))
	f.Add(icmp6(2, 0, pattern(48)))
	f.Fuzz(func(t *testing.T, b []byte) {
		checkPacket(t, b)
		// More inputs are packets when the lengths and the checksum are right.
		b = bytes.Clone(b)
		repair(b)
		checkPacket(t, b)
	})
}

// checkPacket checks invariants for any bytes b.
func checkPacket(t *testing.T, b []byte) {
	p, err := Parse(b)
	if err != nil && err != ErrHeaderChain && err != ErrRoutingHeader {
		if p != (Packet{}) {
			t.Fatalf("Parse returned %v and the packet %+v", err, p)
		}
		return
	}
	if p.Version != b[0]>>4 || p.TotalLen != len(b) || p.HeaderLen < 20 || p.HeaderLen > len(b) ||
		p.FragmentOffset%8 != 0 || !p.Src.IsValid() || p.Src.BitLen() != p.Dst.BitLen() {
		t.Fatalf("%x: %+v", b, p)
	}
	if dst, ok := Destination(b); !ok || dst != p.Dst {
		t.Fatalf("%x: destination %v, %v, want %v", b, dst, ok, p.Dst)
	}
	checkErrors(t, b, p)
	if err != nil {
		return
	}
	if _, _, _, data, ok := ParseEcho(b, p); ok &&
		(len(data) != len(b)-p.HeaderLen-8 || IsICMPError(b, p)) {
		t.Fatalf("%x: echo with data %x", b, data)
	}

	c := bytes.Clone(b)
	want, wantOK := p, p.HopLimit > 1
	if wantOK {
		want.HopLimit--
	}
	if ok := DecrementHopLimit(c); ok != wantOK || !ok && !bytes.Equal(b, c) {
		t.Fatalf("%x: decremented %v, %x", b, ok, c)
	}
	if got, err := Parse(c); err != nil || got != want {
		t.Fatalf("%x decremented: %v, %+v, want %+v", b, err, got, want)
	}
}

// checkErrors checks invariants of all ICMP errors about b.
func checkErrors(t *testing.T, b []byte, p Packet) {
	src, header, limit := router4, 28, 576
	if p.Version == 6 {
		src, header, limit = router6, 48, 1280
	}
	for _, kind := range allKinds {
		e, ok := AppendICMPError([]byte("prefix"), b, p, kind, src, 1280)
		e, found := bytes.CutPrefix(e, []byte("prefix"))
		if !found || !ok && len(e) > 0 {
			t.Fatalf("%x, kind %v: dst is %x", b, kind, e)
		}
		if !ok {
			continue
		}
		if IsICMPError(b, p) {
			t.Fatalf("%x, an ICMP error, is answered with %x", b, e)
		}
		ep, err := Parse(e)
		if err != nil || ep.Src != src || ep.Dst != p.Src || !IsICMPError(e, ep) ||
			icmpChecksumOff(e, ep) != 0 {
			t.Fatalf("%x, kind %v: %v, %x", b, kind, err, e)
		}
		if want := min(limit, header+len(b)); len(e) != want || !bytes.HasPrefix(b, e[header:]) {
			t.Fatalf("%x, kind %v: error %x, want %d bytes with a quote", b, kind, e, want)
		}
		q, ok := Quoted(e, ep)
		if ok && (q.Src != p.Src || q.Dst != p.Dst || q.HopLimit != p.HopLimit ||
			q.TotalLen != p.TotalLen) {
			t.Fatalf("%x, kind %v: quotes %+v, want %+v", b, kind, q, p)
		}
		for _, again := range allKinds {
			if _, ok := AppendICMPError(nil, e, ep, again, src, 1280); ok {
				t.Fatalf("%x, an ICMP error, is answered", e)
			}
		}
	}
}

func FuzzQuoted(f *testing.F) {
	for _, c := range linuxPackets(f) {
		f.Add(c.b, uint8(3))
		f.Add(c.b[:min(len(c.b), 28)], uint8(11))
	}
	f.Add(packet6(headerFragment, fragmentHeader(headerDestination, 8, true), pattern(9)), uint8(1))
	f.Add(packet6(headerRouting, make([]byte, 24)), uint8(1))
	f.Add([]byte{}, uint8(128))
	f.Fuzz(func(t *testing.T, quote []byte, typ uint8) {
		quote = quote[:min(len(quote), 60000)]
		for _, e := range [][]byte{icmp4(t, typ, 0, quote), icmp6(typ, 0, quote)} {
			p := mustParse(t, e)
			q, ok := Quoted(e, p)
			if !ok {
				if q != (Packet{}) {
					t.Fatalf("%x: Quoted returned false and %+v", e, q)
				}
				// Quoted recognises every valid packet.
				if sent, err := Parse(quote); err == nil && sent.Version == p.Version &&
					IsICMPError(e, p) {
					t.Fatalf("%x: Quoted returned false, want %+v", e, sent)
				}
				continue
			}
			if !IsICMPError(e, p) || q.Version != p.Version || q.HeaderLen < 20 ||
				q.HeaderLen > len(quote) {
				t.Fatalf("%x: quoted %+v", e, q)
			}
			if sent, err := Parse(quote); err == nil && sent != q {
				t.Fatalf("%x: quoted %+v, want %+v", e, q, sent)
			}
		}
	})
}
