package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// udpFrame returns an Ethernet frame of total bytes with an IPv4 header and a
// number.
func udpFrame(n, total int) []byte {
	f := make([]byte, total)
	binary.BigEndian.PutUint16(f[12:], etherTypeIPv4)
	f[etherHeaderLen] = 0x45
	binary.BigEndian.PutUint32(f[etherHeaderLen+20:], uint32(n))
	return f
}

// arrival is a frame that a pipe delivered.
type arrival struct {
	N  int
	At time.Duration
}

// through sends count frames of size bytes, one every gap, and returns the
// arrivals. It runs on the fake clock of synctest.
func through(t *testing.T, imp Impairment, seed uint64, count, size int,
	gap time.Duration) (got []arrival, stats Stats) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		p := newPipe(imp, seed, func(f []byte) {
			got = append(got, arrival{int(binary.BigEndian.Uint32(f[etherHeaderLen+20:])),
				time.Since(start)})
		})
		for i := range count {
			p.send(udpFrame(i, size))
			time.Sleep(gap)
		}
		time.Sleep(time.Hour)
		stats = p.snapshot()
		p.close()
	})
	return got, stats
}

func TestDelayKeepsOrder(t *testing.T) {
	got, _ := through(t, Impairment{Delay: 30 * time.Millisecond}, 1, 3, 100, time.Millisecond)
	want := []arrival{{0, 30 * time.Millisecond}, {1, 31 * time.Millisecond},
		{2, 32 * time.Millisecond}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestJitterKeepsOrder(t *testing.T) {
	got, _ := through(t, Impairment{Delay: 10 * time.Millisecond, Jitter: 20 * time.Millisecond}, 1,
		200, 100, time.Millisecond)
	if len(got) != 200 || !slices.IsSortedFunc(got, func(a, b arrival) int { return a.N - b.N }) {
		t.Fatalf("lost or reordered: %v", got)
	}
	different := false
	for _, a := range got {
		d := a.At - time.Duration(a.N)*time.Millisecond
		if d < 10*time.Millisecond || d > 30*time.Millisecond {
			t.Errorf("frame %d took %v", a.N, d)
		}
		different = different || d != got[0].At
	}
	if !different {
		t.Error("every frame took the same time")
	}
}

func TestLossIsDeterministic(t *testing.T) {
	imp := Impairment{Loss: 0.2, Duplicate: 0.1, Jitter: time.Millisecond}
	a, stats := through(t, imp, 7, 1000, 100, 2*time.Millisecond)
	b, _ := through(t, imp, 7, 1000, 100, 2*time.Millisecond)
	c, _ := through(t, imp, 8, 1000, 100, 2*time.Millisecond)
	if !slices.Equal(a, b) {
		t.Error("the same seed gave different results")
	}
	if slices.Equal(a, c) {
		t.Error("different seeds gave the same result")
	}
	if stats.Lost < 100 || stats.Lost > 300 || int(stats.Delivered) != len(a) ||
		stats.Delivered <= stats.Received-stats.Lost {
		t.Errorf("1000 frames, a fifth lost, some duplicated: got %+v", stats)
	}
}

func TestReorder(t *testing.T) {
	got, _ := through(t, Impairment{Delay: 10 * time.Millisecond, Reorder: 0.1}, 1, 100, 100,
		time.Millisecond)
	if len(got) != 100 {
		t.Fatalf("%d frames arrived, want 100", len(got))
	}
	if slices.IsSortedFunc(got, func(a, b arrival) int { return a.N - b.N }) {
		t.Error("nothing was reordered")
	}
}

func TestRateAndQueue(t *testing.T) {
	// 1000 bytes at 8 Mbit/s take 1 ms. The queue has room for five frames of
	// ten.
	got, stats := through(t, Impairment{Rate: 8_000_000, Queue: 5000}, 1, 10, 1000, 0)
	var want []arrival
	for i := range 5 {
		want = append(want, arrival{i, time.Duration(i+1) * time.Millisecond})
	}
	if !slices.Equal(got, want) || stats.QueueFull != 5 {
		t.Errorf("got %v and %+v, want %v", got, stats, want)
	}
	// At the rate itself no frame is dropped.
	_, stats = through(t, Impairment{Rate: 8_000_000, Queue: 5000}, 1, 100, 1000, time.Millisecond)
	if stats.Delivered != 100 {
		t.Errorf("%+v, want all 100 delivered", stats)
	}
}

func TestDrops(t *testing.T) {
	for _, tt := range []struct {
		name string
		imp  Impairment
		size int // frame length in bytes
		want Stats
	}{
		{"packet of the MTU", Impairment{MTU: 1300}, etherHeaderLen + 1300,
			Stats{Received: 1, Delivered: 1}},
		{"packet above the MTU", Impairment{MTU: 1300}, etherHeaderLen + 1301,
			Stats{Received: 1, TooBig: 1}},
		{"loss", Impairment{Loss: 1}, 100, Stats{Received: 1, Lost: 1}},
		{"black hole", Impairment{Blackhole: true}, 100, Stats{Received: 1, Dropped: 1}},
		{"Drop returns true", Impairment{Drop: func(ip []byte) bool {
			return ip[0] == 0x45
		}}, 100, Stats{Received: 1, Dropped: 1}},
		{"Drop returns false", Impairment{Drop: func(ip []byte) bool {
			return len(ip) != 86
		}}, 100, Stats{Received: 1, Delivered: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, got := through(t, tt.imp, 1, 1, tt.size, 0); got != tt.want {
				t.Errorf("%+v, %d bytes: got %+v, want %+v", tt.imp, tt.size, got, tt.want)
			}
		})
	}
}

func TestAddressResolutionPasses(t *testing.T) {
	arp := make([]byte, 60)
	binary.BigEndian.PutUint16(arp[12:], etherTypeARP)
	solicitation := make([]byte, 86)
	binary.BigEndian.PutUint16(solicitation[12:], etherTypeIPv6)
	solicitation[etherHeaderLen+6], solicitation[etherHeaderLen+40] = 58, 135
	synctest.Test(t, func(t *testing.T) {
		p := newPipe(Impairment{Loss: 1, MTU: 1}, 1, func([]byte) {})
		defer p.close()
		p.send(arp)
		p.send(solicitation)
		synctest.Wait()
		if s := p.snapshot(); s.Delivered != 2 {
			t.Errorf("%+v, want both delivered", s)
		}
		p.set(Impairment{Blackhole: true})
		p.send(arp)
		if s := p.snapshot(); s.Dropped != 1 {
			t.Errorf("%+v, want one dropped by the black hole", s)
		}
	})
}

func TestWire(t *testing.T) {
	topo := newTopology(t, TopologyOptions{Impair: &Impairment{}})
	wire := topo.Wires[0]
	ping := func(size int) (Answer, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return topo.Client.Probe(ctx, Probe{To: ProxyIPv4, Size: size, DontFragment: true})
	}
	works := func(what string) {
		t.Helper()
		if _, err := topo.Client.Ping(testContext(t), ProxyIPv6); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := topo.Client.Ping(testContext(t), ProxyIPv4); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	works("unimpaired")
	for what, imp := range map[string]Impairment{
		"loss":       {Loss: 1},
		"black hole": {Blackhole: true},
		"MTU":        {MTU: 1399},
	} {
		wire.Set(imp)
		if a, err := ping(1400); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, %v; want no answer", what, a, err)
		}
		wire.Set(Impairment{})
		works("after " + what)
	}
	wire.SetAB(Impairment{Delay: 30 * time.Millisecond})
	rtt, err := topo.Client.Ping(testContext(t), ProxyIPv4)
	must(t, err)
	if rtt < 30*time.Millisecond {
		t.Errorf("round trip %v over a delay of 30 ms", rtt)
	}
	if ab, ba := wire.Stats(); ab.Delivered == 0 || ba.Delivered == 0 || ab.TooBig == 0 ||
		ba.TooBig != 0 {
		t.Errorf("counters: %+v, %+v", ab, ba)
	}
}

func TestWireSurvivesDeletedInterface(t *testing.T) {
	needTUN(t)
	l := newLab(t)
	a, b := newHost(t, l, "a"), newHost(t, l, "b")
	w, err := l.Wire(End{a, "eth0", nil}, End{b, "eth0", nil}, WireOptions{MTU: 9000})
	must(t, err)
	link, err := a.nl.LinkByName("eth0")
	must(t, err)
	if link.Attrs().MTU != 9000 {
		t.Errorf("MTU %d, want 9000", link.Attrs().MTU)
	}
	must(t, a.nl.LinkDel(link))
	must(t, w.Close())
	must(t, w.Close())
	if _, err := b.nl.LinkByName("eth0"); err == nil {
		t.Error("the interface outlives the wire")
	}
}

// A test writes the addresses of an interface as literals.
func ExamplePrefixes() {
	fmt.Println(Prefixes("192.0.2.1/24")[0].Masked())
	// Output: 192.0.2.0/24
}
