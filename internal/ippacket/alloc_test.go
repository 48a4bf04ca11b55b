package ippacket

import "testing"

// TestAllocations checks that the functions for the packet path do not
// allocate.
func TestAllocations(t *testing.T) {
	b4, b6 := udp4(t, 3000, nil), packet6(headerHopByHop, extension(17, 8), pattern(3000))
	p4, p6 := mustParse(t, b4), mustParse(t, b6)
	big4 := udp4(t, 3000, dontFragment)
	bigP4 := mustParse(t, big4)
	buf := make([]byte, 0, 4000)
	error4, _ := AppendICMPError(nil, b4, p4, NoRoute, router4, 0)
	error6, _ := AppendICMPError(nil, b6, p6, NoRoute, router6, 0)
	errorP4, errorP6 := mustParse(t, error4), mustParse(t, error6)
	echo := AppendEcho(nil, host6, server6, 64, true, 1, 2, pattern(1232))
	echoP := mustParse(t, echo)
	bad := packet6(headerDestination)
	emitted := 0
	emit := func(f []byte) { emitted += len(f) }

	for name, f := range map[string]func(){
		"Parse IPv4":  func() { Parse(b4) },
		"Parse IPv6":  func() { Parse(b6) },
		"Parse error": func() { Parse(bad) },
		"Destination": func() { Destination(b6) },
		"IsLinkLocal": func() { IsLinkLocal(p6.Dst) },
		"DecrementHopLimit": func() {
			DecrementHopLimit(b4)
			b4[8] = 64
			DecrementHopLimit(b6)
			b6[7] = 64
		},
		"ClampMSS": func() { ClampMSS(b4, p4, 1280); ClampMSS(b6, p6, 1280) },
		"AppendICMPError IPv4": func() {
			AppendICMPError(buf, big4, bigP4, TooBig, router4, 1280)
		},
		"AppendICMPError IPv6":  func() { AppendICMPError(buf, b6, p6, TooBig, router6, 1280) },
		"AppendICMPError dummy": func() { AppendICMPError(buf, b4, p4, NoRoute, router6, 0) },
		"IsICMPError":           func() { IsICMPError(error4, errorP4) },
		"Quoted IPv4":           func() { Quoted(error4, errorP4) },
		"Quoted IPv6":           func() { Quoted(error6, errorP6) },
		"AppendEcho IPv4": func() {
			AppendEcho(buf, host4, server4, 64, true, 1, 2, echo[:100])
		},
		"AppendEcho IPv6": func() { AppendEcho(buf, host6, server6, 64, true, 1, 2, echo[:100]) },
		"ParseEcho":       func() { ParseEcho(echo, echoP) },
		"Fragment": func() {
			if err := Fragment(buf, b4, p4, 1280, emit); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := testing.AllocsPerRun(100, f); got != 0 {
				t.Errorf("%v allocations", got)
			}
		})
	}
	if emitted == 0 {
		t.Error("Fragment did not call emit")
	}
}

func BenchmarkParse(b *testing.B) {
	for name, packet := range map[string][]byte{
		"IPv4": udp4(b, 1372, nil),
		"IPv6": packet6(17, pattern(1360)),
		"IPv6 ext": packet6(headerHopByHop, extension(headerDestination, 8), extension(17, 8),
			pattern(1344)),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse(packet); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDecrementHopLimit(b *testing.B) {
	packet := udp4(b, 1372, nil)
	for b.Loop() {
		if !DecrementHopLimit(packet) {
			packet[8] = 255 // leaves a wrong checksum, which does not matter here
		}
	}
}
