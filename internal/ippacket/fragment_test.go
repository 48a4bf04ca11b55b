package ippacket

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/layers"
)

// fragments returns copies of the fragments of b.
func fragments(t testing.TB, b []byte, mtu int) [][]byte {
	t.Helper()
	var all [][]byte
	if err := Fragment(make([]byte, 0, mtu), b, mustParse(t, b), mtu, func(f []byte) {
		all = append(all, bytes.Clone(f))
	}); err != nil {
		t.Fatalf("Fragment of %d bytes for an MTU of %d: %v", len(b), mtu, err)
	}
	return all
}

// checkFragments checks that all are the fragments that a router makes of the
// valid packet b for an MTU of mtu bytes.
func checkFragments(t testing.TB, b []byte, mtu int, all [][]byte) {
	t.Helper()
	original := mustParse(t, b)
	var payload []byte
	for i, f := range all {
		p := mustParse(t, f)
		if len(f) > mtu {
			t.Fatalf("fragment %d has %d bytes, but the MTU is %d", i, len(f), mtu)
		}
		if p.FragmentOffset != original.FragmentOffset+len(payload) {
			t.Fatalf("fragment %d is at %d, want %d", i, p.FragmentOffset,
				original.FragmentOffset+len(payload))
		}
		if last := i == len(all)-1; p.MoreFragments != (!last || original.MoreFragments) {
			t.Fatalf("fragment %d of %d: more fragments is %v", i, len(all), p.MoreFragments)
		} else if !last && (len(f)-p.HeaderLen)%8 != 0 {
			t.Fatalf("fragment %d has %d bytes of payload", i, len(f)-p.HeaderLen)
		}
		if p.DontFragment != original.DontFragment {
			t.Fatalf("fragment %d: don't fragment is %v", i, p.DontFragment)
		}
		// Version, type of service, identification, time to live, protocol,
		// addresses.
		for _, r := range [][2]int{{1, 2}, {4, 6}, {8, 10}, {12, 20}} {
			if !bytes.Equal(f[r[0]:r[1]], b[r[0]:r[1]]) {
				t.Fatalf("fragment %d: header %x, original header %x", i, f[:20], b[:20])
			}
		}
		want := b[20:original.HeaderLen]
		if i > 0 {
			want = copiedOptions(want)
		}
		if got := f[20:p.HeaderLen]; !bytes.Equal(got, want) {
			t.Fatalf("fragment %d: options %x, want %x", i, got, want)
		}
		payload = append(payload, f[p.HeaderLen:]...)
	}
	if !bytes.Equal(payload, b[original.HeaderLen:]) {
		t.Fatalf("the payload of the fragments is %x, want %x", payload, b[original.HeaderLen:])
	}
}

// copiedOptions returns the options that later fragments have, with padding.
func copiedOptions(options []byte) []byte {
	var copied []byte
	for i := 0; i < len(options) && options[i] != 0; {
		size := 1
		if options[i] != 1 {
			if i+1 == len(options) || options[i+1] < 2 || i+int(options[i+1]) > len(options) {
				break
			}
			size = int(options[i+1])
			if options[i] >= 128 {
				copied = append(copied, options[i:i+size]...)
			}
		}
		i += size
	}
	return append(copied, make([]byte, (4-len(copied)%4)%4)...)
}

func TestFragment(t *testing.T) {
	// The captured packets have the options router alert, which is copied to
	// all fragments, and record route, which is not.
	for _, tt := range []struct {
		name string
		b    []byte
		mtu  int
		want []int // lengths of the fragments
	}{
		{"exact", udp4(t, 1472, nil), 1500, []int{1500}},
		{"one byte over", udp4(t, 1473, nil), 1500, []int{1500, 21}},
		{"not a multiple of 8", udp4(t, 1472, nil), 1400, []int{1396, 124}},
		{"smallest link", udp4(t, 100, nil), 68, []int{68, 68, 32}},
		{"8 bytes at a time", udp4(t, 10, nil), 28, []int{28, 28, 22}},
		{"room for 15 bytes", udp4(t, 10, nil), 35, []int{28, 30}},
		{"middle fragment", linuxPacket(t, "udp4-frag"), 1280, []int{1276, 244}},
		{"options", linuxPacket(t, "udp4-options-frag"), 1280, []int{1276, 248}},
		{"options on a small link", linuxPacket(t, "udp4-options-frag"), 576, []int{572, 576, 400}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := fragments(t, tt.b, tt.mtu)
			var got []int
			for _, f := range all {
				got = append(got, len(f))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("lengths (-want +got):\n%s", diff)
			}
			checkFragments(t, tt.b, tt.mtu, all)
			if len(all) == 1 && !bytes.Equal(all[0], tt.b) {
				t.Errorf("the packet fits, but became %x", all[0])
			}
		})
	}
}

// TestFragmentTwice checks that fragments of fragments are valid fragments of
// the original packet.
func TestFragmentTwice(t *testing.T) {
	b := udp4(t, 4000, func(ip *layers.IPv4) {
		ip.Options = []layers.IPv4Option{
			{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}},
			{OptionType: 1},
			{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}},
		}
	})
	var all [][]byte
	for _, f := range fragments(t, b, 1500) {
		all = append(all, fragments(t, f, 620)...)
	}
	checkFragments(t, b, 620, all)
}

// TestFragmentLongest fragments the longest packet.
func TestFragmentLongest(t *testing.T) {
	b := make([]byte, 65535)
	copy(b, udp4(t, 0, nil))
	copy(b[28:], pattern(len(b)))
	repair(b)
	checkFragments(t, b, 68, fragments(t, b, 68))
}

func TestFragmentOptions(t *testing.T) {
	for _, options := range [][]byte{
		{0, 0, 0, 0},
		{1, 1, 1, 1},
		{148, 4, 0, 0},
		{148, 4, 0, 0, 7, 3, 4, 0},
		{7, 3, 4, 148, 4, 0, 0, 0},
		{1, 148, 4, 0, 0, 136, 3, 4},
		{0, 148, 4, 0}, // an option after the end
		{148, 1, 0, 0}, // a length less than 2
		{148, 5, 0, 0}, // a length beyond the header
		{148, 4, 0, 0, 130, 9, 0, 0},
		{1, 1, 1, 148}, // no length
		bytes.Repeat([]byte{148, 4, 0, 0}, 10),
	} {
		t.Run(fmt.Sprintf("% x", options), func(t *testing.T) {
			b := append(bytes.Clone(udp4(t, 0, nil)[:20]), options...)
			b = append(b, pattern(200)...)
			b[0] = 4<<4 | uint8(5+len(options)/4)
			repair(b)
			checkFragments(t, b, 100, fragments(t, b, 100))
		})
	}
}

func TestFragmentErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		b    []byte
		mtu  int
		want error
	}{
		{"don't fragment", udp4(t, 1473, dontFragment), 1500, ErrDontFragment},
		{"IPv6", packet6(17, pattern(1461)), 1500, ErrDontFragment},
		{"no room for 8 bytes", udp4(t, 20, nil), 27, ErrMTU},
		{"no room behind options", linuxPacket(t, "udp4-options-frag"), 43, ErrMTU},
		{"no MTU", udp4(t, 20, nil), 0, ErrMTU},
		{"negative MTU", udp4(t, 20, nil), -1, ErrMTU},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Fragment(nil, tt.b, mustParse(t, tt.b), tt.mtu, func(f []byte) {
				t.Errorf("emitted %x", f)
			})
			if err != tt.want {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// TestFragmentFits checks that packets that fit are emitted unchanged, even if
// they must not be fragmented.
func TestFragmentFits(t *testing.T) {
	for _, b := range [][]byte{udp4(t, 100, dontFragment), packet6(17, pattern(100))} {
		if all := fragments(t, b, len(b)); len(all) != 1 || !bytes.Equal(all[0], b) {
			t.Errorf("%x became %x", b, all)
		}
	}
}

// TestFragmentScratch checks that fragments are built at the start of scratch
// and that the packet is not changed.
func TestFragmentScratch(t *testing.T) {
	b := udp4(t, 3000, nil)
	before := bytes.Clone(b)
	scratch := make([]byte, 1500)
	if err := Fragment(scratch, b, mustParse(t, b), 1500, func(f []byte) {
		if &f[0] != &scratch[0] {
			t.Error("a fragment is not at the start of scratch")
		}
	}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, before) {
		t.Error("the packet was changed")
	}
}

// fragmentable returns an IPv4 fragment at an offset in bytes. Options and
// payload are truncated to the greatest possible lengths.
func fragmentable(options, payload []byte, offset uint16, more bool) []byte {
	options = options[:min(len(options), 40)&^3]
	b := []byte{4<<4 | uint8(5+len(options)/4), 0x20, 0, 0, 0x12, 0x34, 0, 0, 64, 17, 0, 0, 198, 51,
		100, 7, 203, 0, 113, 9}
	field := offset / 8
	if more {
		field |= flagMF
	}
	binary.BigEndian.PutUint16(b[6:], field)
	b = append(b, options...)
	b = append(b, payload[:min(len(payload), max(0, 65535-len(b)-int(offset&^7)))]...)
	repair(b)
	return b
}

func FuzzFragment(f *testing.F) {
	f.Add([]byte{}, pattern(3000), uint16(0), false, uint16(1500))
	f.Add([]byte{148, 4, 0, 0, 7, 7, 4, 0, 0, 0, 0, 0}, pattern(1000), uint16(1480), true,
		uint16(576))
	f.Add([]byte{1, 1, 136, 3, 4, 68, 4, 5}, pattern(100), uint16(65400), false, uint16(60))
	f.Add([]byte{}, []byte{}, uint16(0), false, uint16(0))
	f.Fuzz(func(t *testing.T, options, payload []byte, offset uint16, more bool, mtu uint16) {
		b := fragmentable(options, payload, offset, more)
		p, err := Parse(b)
		if err == ErrLength || err == ErrSourceRoute {
			// The fragment ends beyond 65535, or has a source route.
			return
		}
		if err != nil {
			t.Fatalf("Parse(%x): %v", b, err)
		}
		var all [][]byte
		err = Fragment(nil, b, p, int(mtu), func(f []byte) { all = append(all, bytes.Clone(f)) })
		if tooSmall := len(b) > int(mtu) && int(mtu) < p.HeaderLen+8; tooSmall != (err == ErrMTU) ||
			err != nil && err != ErrMTU {
			t.Fatalf("%d bytes, MTU %d: %v", len(b), mtu, err)
		}
		if err != nil {
			return
		}
		if len(b) <= int(mtu) {
			if len(all) != 1 || !bytes.Equal(all[0], b) {
				t.Fatalf("%x fits, but became %x", b, all)
			}
			return
		}
		checkFragments(t, b, int(mtu), all)
	})
}
