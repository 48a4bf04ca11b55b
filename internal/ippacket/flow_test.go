package ippacket

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"testing"
)

// flow4 returns an IPv4 packet. fragment is the word of its header with the
// flags and the fragment offset.
func flow4(options []byte, fragment uint16, protocol byte, ports, payload string) []byte {
	b := make([]byte, 20, 100)
	b[0] = 0x45 + byte(len(options)/4)
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[9] = protocol
	copy(b[12:], host4.AsSlice())
	copy(b[16:], server4.AsSlice())
	return append(append(append(b, options...), ports...), payload...)
}

func TestFlowHash(t *testing.T) {
	const ports, others = "\x13\x88\x01\xbb", "\x13\x88\x01\xbc"
	const df, mf = 0x4000, 0x2000
	options := []byte{1, 1, 1, 1, 1, 1, 1, 0}
	edited := func(b []byte, offset int, value byte) []byte {
		b = bytes.Clone(b)
		b[offset] = value
		return b
	}
	udp := flow4(nil, df, 17, ports, "some payload")
	six := packet6(17, []byte(ports), pattern(20))
	fragmented := packet6(headerFragment, fragmentHeader(17, 0, true), []byte(ports), pattern(20))
	for name, tc := range map[string]struct {
		a, b []byte
		same bool
	}{
		"payload":            {udp, flow4(nil, df, 17, ports, "another, longer"), true},
		"DF":                 {udp, flow4(nil, 0, 17, ports, ""), true},
		"hop limit, TOS, ID": {udp, edited(edited(edited(udp, 8, 3), 1, 0xb9), 4, 1), true},
		"options":            {udp, flow4(options, df, 17, ports, "some payload"), true},
		"ports":              {udp, flow4(nil, df, 17, others, "some payload"), false},
		"ports behind options": {flow4(options, df, 17, ports, ""),
			flow4(options, df, 17, others, ""), false},
		"protocol":    {udp, flow4(nil, df, 6, ports, "some payload"), false},
		"source":      {udp, edited(udp, 15, 200), false},
		"destination": {udp, edited(udp, 19, 200), false},
		"TCP": {flow4(nil, df, 6, ports, ""),
			flow4(nil, df, 6, others, ""), false},
		"no ports in ICMP": {flow4(nil, 0, 1, "\x08\x00\x12\x34", "a"),
			flow4(nil, 0, 1, "\x08\x00\x56\x78", "b"), true},
		"truncated before the ports": {flow4(nil, df, 17, "", ""),
			flow4(nil, df, 17, ports[:3], ""), true},
		"fragments": {flow4(nil, mf, 17, ports, "first"),
			flow4(nil, mf|10, 17, "more", "of it"), true},
		"last fragment": {flow4(nil, mf, 17, ports, "first"),
			flow4(nil, 20, 17, "last", "of it"), true},
		"IPv6 hop limit, class, flow label": {six,
			edited(edited(edited(six, 7, 3), 1, 5), 3, 7), true},
		"IPv6 payload":     {six, packet6(17, []byte(ports), pattern(30)), true},
		"IPv6 ports":       {six, packet6(17, []byte(others), pattern(20)), false},
		"IPv6 source":      {six, edited(six, 23, 200), false},
		"IPv6 destination": {six, edited(six, 39, 200), false},
		"IPv6 protocol":    {six, packet6(6, []byte(ports), pattern(20)), false},
		"IPv6 fragments": {fragmented,
			packet6(headerFragment, fragmentHeader(17, 8, false), []byte("more"),
				pattern(9)), true},
		"IPv6 extension headers": {packet6(headerHopByHop, extension(17, 8), []byte(ports)),
			packet6(headerHopByHop, extension(17, 8), []byte(others)), true},
	} {
		t.Run(name, func(t *testing.T) {
			seed := maphash.MakeSeed()
			if got := FlowHash(seed, tc.a) == FlowHash(seed, tc.b); got != tc.same {
				t.Errorf("same hash: %v, want %v, for\n%x\n%x", got, tc.same, tc.a, tc.b)
			}
			if FlowHash(seed, tc.a) == FlowHash(maphash.MakeSeed(), tc.a) {
				t.Error("the hash does not depend on the seed")
			}
		})
	}
}

func TestFlowHashAllocations(t *testing.T) {
	seed := maphash.MakeSeed()
	b4, b6 := udp4(t, 100, nil), packet6(17, pattern(100))
	if got := testing.AllocsPerRun(100, func() {
		FlowHash(seed, b4)
		FlowHash(seed, b6)
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

// FuzzFlowHash checks that FlowHash accepts any bytes, and ignores all bytes
// behind the longest header with ports.
func FuzzFlowHash(f *testing.F) {
	for _, c := range linuxPackets(f) {
		f.Add(c.b)
	}
	f.Add([]byte{})
	f.Add([]byte{0x4f})
	f.Add([]byte{0x60})
	f.Add(flow4(nil, 0, 17, "", ""))
	f.Add(flow4(make([]byte, 40), 0, 17, "\x13\x88", ""))
	f.Add(packet6(17, pattern(3)))
	seed := maphash.MakeSeed()
	f.Fuzz(func(t *testing.T, b []byte) {
		hash := FlowHash(seed, b)
		if longer := append(bytes.Clone(b), 1, 2, 3, 4); len(b) >= 64 &&
			FlowHash(seed, longer) != hash {
			t.Errorf("%x: appending four bytes changes the hash", b)
		}
	})
}
