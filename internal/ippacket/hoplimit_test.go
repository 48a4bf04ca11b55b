package ippacket

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/gopacket/gopacket/layers"
)

// TestDecrementHopLimitAllChecksums compares the updated checksum with a newly
// computed one for all values of the checksum and the time to live.
func TestDecrementHopLimitAllChecksums(t *testing.T) {
	fold := func(sum uint32) uint16 { return uint16(sum + sum>>16) }
	for name, step := range map[string]int{"udp4": 1, "udp4-options": 23} {
		t.Run(name, func(t *testing.T) {
			header := linuxPacket(t, name)
			header = header[:int(header[0]&0xf)*4]
			// The loop below sets the identification to all values.
			binary.BigEndian.PutUint16(header[4:], 0)
			binary.BigEndian.PutUint16(header[10:], 0) // the checksum
			for ttl := 2; ttl <= 255; ttl += step {
				header[8] = byte(ttl - 1)
				sumAfter := ^referenceChecksum(header)
				header[8] = byte(ttl)
				sumBefore := ^referenceChecksum(header)
				for id := range uint32(1 << 16) {
					before, after := ^fold(uint32(sumBefore)+id), ^fold(uint32(sumAfter)+id)
					checkDecrement(t, header, uint16(id), before, after)
					if before == 0 { // 0xffff is another way to write it
						checkDecrement(t, header, uint16(id), 0xffff, after)
					}
				}
			}
		})
	}
}

// checkDecrement decrements the time to live of header with the identification
// id and the checksum before. It checks that the new checksum is after.
func checkDecrement(t *testing.T, header []byte, id, before, after uint16) {
	var buf [60]byte
	got := buf[:copy(buf[:], header)]
	binary.BigEndian.PutUint16(got[4:], id)
	binary.BigEndian.PutUint16(got[10:], before)
	if !DecrementHopLimit(got) || got[8] != header[8]-1 ||
		binary.BigEndian.Uint16(got[10:]) != after {
		t.Fatalf("time to live %d, checksum %#04x: became %x, want checksum %#04x", header[8],
			before, got, after)
	}
}

func TestDecrementHopLimit(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			want := mustParse(t, c.b)
			b := bytes.Clone(c.b)
			if DecrementHopLimit(b) != (want.HopLimit > 1) {
				t.Errorf("hop limit %d: wrong result of DecrementHopLimit", want.HopLimit)
			}
			if want.HopLimit > 1 {
				want.HopLimit--
			}
			if got := mustParse(t, b); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			decode(t, b)
		})
	}
}

func TestDecrementHopLimitExceeded(t *testing.T) {
	for _, limit := range []uint8{0, 1} {
		b4 := udp4(t, 10, func(ip *layers.IPv4) { ip.TTL = limit })
		b6 := packet6(17, pattern(10))
		b6[7] = limit
		for _, b := range [][]byte{b4, b6} {
			before := bytes.Clone(b)
			if DecrementHopLimit(b) || !bytes.Equal(b, before) {
				t.Errorf("hop limit %d: %x became %x", limit, before, b)
			}
		}
	}
}

// TestDecrementHopLimitToTheEnd checks that the packet is valid after each step
// down to 1.
func TestDecrementHopLimitToTheEnd(t *testing.T) {
	b4 := udp4(t, 10, func(ip *layers.IPv4) {
		ip.TTL = 255
		ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4,
			OptionData: []byte{0, 0}}}
	})
	b6 := packet6(17, pattern(10))
	b6[7] = 255
	for _, b := range [][]byte{b4, b6} {
		steps := 0
		for DecrementHopLimit(b) {
			steps++
			if p := mustParse(t, b); int(p.HopLimit) != 255-steps {
				t.Fatalf("after %d steps the hop limit is %d", steps, p.HopLimit)
			}
		}
		if steps != 254 {
			t.Errorf("%d steps, want 254", steps)
		}
	}
}
