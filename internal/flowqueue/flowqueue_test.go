package flowqueue

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// minSize is the length of an IPv4 packet with UDP ports and a serial number.
const minSize = 32

// packet returns a packet from a UDP port with a serial number.
func packet(port uint16, serial, size int) *Packet {
	p := Get()
	p.Size = size
	ip := p.Bytes()[tun.Headroom:]
	clear(ip[:minSize])
	ip[0], ip[9] = 0x45, 17
	binary.BigEndian.PutUint16(ip[22:], port)
	binary.BigEndian.PutUint32(ip[28:], uint32(serial))
	return p
}

func portOf(p *Packet) uint16 { return binary.BigEndian.Uint16(p.Bytes()[tun.Headroom+22:]) }
func serialOf(p *Packet) int  { return int(binary.BigEndian.Uint32(p.Bytes()[tun.Headroom+28:])) }

// run returns n packets from a port with serial numbers from 0.
func run(port uint16, n, size int) []*Packet {
	packets := make([]*Packet, n)
	for i := range packets {
		packets[i] = packet(port, i, size)
	}
	return packets
}

// ports returns n ports whose flows have different buckets in q.
func ports(q *Queue, n int) []uint16 {
	var found []uint16
	taken := make(map[uint64]bool)
	for port := uint16(1); len(found) < n; port++ {
		p := packet(port, 0, minSize)
		bucket := ippacket.FlowHash(q.seed, p.Bytes()[tun.Headroom:]) % buckets
		p.Free()
		if !taken[bucket] {
			taken[bucket], found = true, append(found, port)
		}
	}
	return found
}

// popOne takes one packet from a Queue that is not empty.
func popOne(t testing.TB, q *Queue) (p *Packet, dropped int) {
	t.Helper()
	var packets [1]*Packet
	n, dropped := q.Pop(packets[:])
	if n != 1 {
		t.Fatalf("Pop returned %d packets, want 1", n)
	}
	return packets[0], dropped
}

// waiting returns the number of packets in q.
func waiting(q *Queue) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.packets
}

// TestNothingIsLost checks that each pushed packet is popped or counted as
// dropped exactly once, and that packets of a flow keep their order.
func TestNothingIsLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		before := total.Load()
		q := New()
		q.now = fakeClock()
		pushed, popped, dropped := 0, 0, 0
		var next [8]int // serial number of the next packet of each flow
		var last [8]int // serial number + 1 of the packet popped last
		pop := func(n int) {
			packets := make([]*Packet, n)
			n, late := q.Pop(packets)
			popped, dropped = popped+n, dropped+late
			for _, p := range packets[:n] {
				port, serial := portOf(p), serialOf(p)+1
				if serial <= last[port] {
					t.Fatalf("packet %d of flow %d after %d", serial, port, last[port])
				}
				last[port] = serial
				p.Free()
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				port := rapid.IntRange(0, len(next)-1).Draw(t, "flow")
				size := rapid.IntRange(minSize, MaxSize).Draw(t, "size")
				batch := make([]*Packet,
					rapid.OneOf(rapid.IntRange(0, 40), rapid.IntRange(0, 2*Limit)).Draw(t,
						"packets"))
				for i := range batch {
					batch[i] = packet(uint16(port), next[port], size)
					next[port]++
				}
				pushed += len(batch)
				dropped += q.Push(batch)
			},
			"pop": func(t *rapid.T) {
				if waiting(q) > 0 {
					pop(rapid.IntRange(1, 300).Draw(t, "packets"))
				}
			},
			"wait": func(t *rapid.T) {
				q.now = later(q, rapid.Int64Range(0, int64(2*interval)).Draw(t, "nanoseconds"))
			},
			"": func(t *rapid.T) {
				queued := waiting(q)
				if pushed != popped+dropped+queued || total.Load() != before+int64(queued) ||
					queued > Limit {
					t.Fatalf("%d pushed, %d popped, %d dropped, %d in the queue, %d in all",
						pushed, popped,
						dropped, queued, total.Load()-before)
				}
			},
		})
		for waiting(q) > 0 {
			pop(100)
		}
		if pushed != popped+dropped || total.Load() != before {
			t.Fatalf("at the end: %d pushed, %d popped, %d dropped, %d in all", pushed, popped,
				dropped, total.Load()-before)
		}
		for i := 0; q.flows != nil && i < buckets; i++ {
			if f := &q.flows[i]; f.bytes != 0 {
				t.Fatalf("a flow without packets has %d bytes", f.bytes)
			}
		}
	})
}

// TestThinFlow checks that a packet of a flow that sends little is sent before
// the waiting packets of other flows.
func TestThinFlow(t *testing.T) {
	q := New()
	q.now = fakeClock()
	flows := ports(q, 3)
	bulk, bulk2, thin := flows[0], flows[1], flows[2]
	q.Push(run(bulk, 1000, MaxSize))
	q.Push(run(bulk2, 1000, MaxSize))
	for range 10 {
		popOne(t, q)
	}
	for i := range 20 {
		q.Push([]*Packet{packet(thin, i, minSize)})
		if p, _ := popOne(t, q); portOf(p) != thin || serialOf(p) != i {
			t.Fatalf("packet %d of the thin flow waits behind packet %d of flow %d", i, serialOf(p),
				portOf(p))
		}
		// Between its packets, the bulk flows have their turns.
		for range 5 {
			if p, _ := popOne(t, q); portOf(p) == thin {
				t.Fatal("Pop returned a packet of the thin flow, which has none")
			}
		}
	}
}

// TestShareOfOneAtATime checks that a flow does not exceed its share by having
// one packet at a time, each of which makes it a new flow.
func TestShareOfOneAtATime(t *testing.T) {
	q := New()
	q.now = fakeClock()
	flows := ports(q, 3)
	q.Push(run(flows[0], 100, MaxSize))
	q.Push(run(flows[1], 100, MaxSize))
	for range 10 {
		popOne(t, q)
	}
	const turns = 90
	sent, has := 0, false
	for range turns {
		if p, _ := popOne(t, q); portOf(p) == flows[2] {
			sent, has = sent+1, false
		} else if !has {
			q.Push(run(flows[2], 1, MaxSize))
			has = true
		}
	}
	if sent < turns/3-5 || sent > turns/3+5 {
		t.Errorf("one of three flows sent %d of %d packets, want a third", sent, turns)
	}
}

func TestSharesAreOfBytes(t *testing.T) {
	q := New()
	q.now = fakeClock()
	sizes := []int{60, 576, 1280, MaxSize}
	flows := ports(q, len(sizes))
	for i, size := range sizes {
		q.Push(run(flows[i], 60_000/size, size))
	}
	sent := make([]int, len(sizes)) // bytes
	for sum := 0; sum < 160_000; {
		p, _ := popOne(t, q)
		sum += p.Size
		sent[slices.Index(flows, portOf(p))] += p.Size
		if d := slices.Max(sent) - slices.Min(sent); d > 2*quantum+MaxSize {
			t.Fatalf("after %d bytes the flows have sent %d", sum, sent)
		}
	}
}

func TestLimit(t *testing.T) {
	q := New()
	q.now = fakeClock()
	flows := ports(q, 3)
	bulk, medium, thin := flows[0], flows[1], flows[2]
	const mediums, thins, more = 500, 20, 1000
	dropped := q.Push(run(bulk, Limit-mediums-thins, 1000))
	dropped += q.Push(run(medium, mediums, 1000))
	dropped += q.Push(run(thin, thins, minSize))
	if dropped != 0 {
		t.Fatalf("%d packets dropped below the limit, want 0", dropped)
	}
	if dropped = q.Push(run(bulk, more, 1000)); dropped != more {
		t.Errorf("%d packets dropped, but %d were above the limit", dropped, more)
	}
	remaining := make(map[uint16]int)
	oldest := -1
	for waiting(q) > 0 {
		p, _ := popOne(t, q)
		if remaining[portOf(p)]++; portOf(p) == bulk && oldest < 0 {
			oldest = serialOf(p)
		}
	}
	if remaining[bulk] != Limit-mediums-thins || remaining[medium] != mediums ||
		remaining[thin] != thins ||
		oldest != more {
		t.Errorf("%d, %d and %d packets remain; the oldest of the longest flow is %d",
			remaining[bulk], remaining[medium],
			remaining[thin], oldest)
	}
}

// TestEmptyPackets checks that empty packets count towards the limit.
func TestEmptyPackets(t *testing.T) {
	q := New()
	q.now = fakeClock()
	batch := make([]*Packet, Limit+10)
	for i := range batch {
		batch[i] = Get()
		batch[i].Size = 0
	}
	if dropped := q.Push(batch); dropped != 10 || waiting(q) != Limit {
		t.Errorf("%d dropped, %d waiting", dropped, waiting(q))
	}
	q.Close()
}

// occupy makes the process hold n more packets until the test ends.
func occupy(t *testing.T, n int64) {
	total.Add(n)
	t.Cleanup(func() { total.Add(-n) })
}

// TestCrowded checks that flooded queues share the free space equally,
// whichever came first, and do not exceed it together.
func TestCrowded(t *testing.T) {
	const free, late, early = 2000, 15, 4
	occupy(t, maxTotal-reserve-free-total.Load())
	queues := make([]*Queue, early+late)
	most := 0
	for round := range 50 {
		for i := range queues {
			if queues[i] == nil {
				queues[i] = New()
				defer queues[i].Close()
			}
			if i >= early && round < 10 {
				continue
			}
			queues[i].Push(run(uint16(i), 60, minSize))
			most = max(most, int(total.Load()))
		}
	}
	if most > maxTotal-reserve+minLimit*late {
		t.Errorf("the queues held %d packets at a time", most)
	}
	for i, q := range queues {
		if fair := free / (len(queues) + 1); waiting(q) < fair*3/4 || waiting(q) > fair*5/4 {
			t.Errorf("queue %d has %d packets, want about %d", i, waiting(q), fair)
		}
	}
}

// TestBound checks that a queue can use the reserve when others hold everything
// else, and that maxTotal is never exceeded.
func TestBound(t *testing.T) {
	occupy(t, maxTotal-reserve-total.Load())
	var queues []*Queue
	push := func(want int) {
		q := New()
		queues = append(queues, q)
		if dropped := q.Push(run(1, 100, minSize)); waiting(q) != want || dropped != 100-want {
			t.Fatalf("queue %d has %d packets, want %d; %d of 100 dropped", len(queues), waiting(q),
				want, dropped)
		}
	}
	for range reserve / minLimit {
		push(minLimit)
	}
	for range 10 {
		push(0)
	}
	if n := total.Load(); n != maxTotal {
		t.Errorf("%d packets in all, want %d", n, maxTotal)
	}
	for _, q := range queues {
		q.Close()
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := total.Load()
		q := New()
		ended := make(chan int)
		go func() {
			n, _ := q.Pop(make([]*Packet, 4))
			ended <- n
		}()
		synctest.Wait()
		q.Close()
		if n := <-ended; n != 0 {
			t.Errorf("the waiting Pop returned %d packets, want 0", n)
		}
		q.Close()

		q = New()
		q.Push(run(1, 10, minSize))
		q.Close()
		if n, dropped := q.Pop(make([]*Packet, 4)); n != 0 || dropped != 0 {
			t.Errorf("Pop returned %d packets and dropped %d after Close, want 0 and 0", n, dropped)
		}
		if dropped := q.Push(run(1, 3, minSize)); dropped != 3 {
			t.Errorf("Push dropped %d of 3 packets after Close, want 3", dropped)
		}
		if n := total.Load() - before; n != 0 {
			t.Errorf("total counts %d packets, want 0", n)
		}
	})
}

// TestPopWaits checks that Pop returns all packets of several pushes.
func TestPopWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := New()
		var got atomic.Int64
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				n, _ := q.Pop(make([]*Packet, 2))
				if n == 0 {
					return
				}
				got.Add(int64(n))
			}
		}()
		for _, want := range []int64{3, 6} {
			synctest.Wait()
			q.Push(run(1, 1, minSize))
			q.Push(run(2, 2, minSize))
			synctest.Wait()
			if got.Load() != want {
				t.Errorf("%d packets popped, want %d", got.Load(), want)
			}
		}
		q.Close()
		<-done
	})
}

// TestConcurrent pushes from several goroutines while another one pops, for the
// race detector. In its second part, Close comes in between.
func TestConcurrent(t *testing.T) {
	before := total.Load()
	for _, early := range []bool{false, true} {
		q := New()
		var pushed, dropped, popped atomic.Int64
		var pushers, popper sync.WaitGroup
		popper.Go(func() {
			var packets [16]*Packet
			for {
				n, late := q.Pop(packets[:])
				popped.Add(int64(n))
				dropped.Add(int64(late))
				if n == 0 {
					return
				}
				for _, p := range packets[:n] {
					p.Bytes()[0]++
					p.Free()
				}
			}
		})
		for i := range 4 {
			pushers.Go(func() {
				for range 500 {
					batch := run(uint16(i), 32, 200)
					pushed.Add(int64(len(batch)))
					dropped.Add(int64(q.Push(batch)))
				}
			})
		}
		if early {
			for pushed.Load() < 10_000 {
				runtime.Gosched()
			}
			q.Close()
		}
		pushers.Wait()
		for waiting(q) > 0 {
			runtime.Gosched()
		}
		q.Close()
		popper.Wait()
		if lost := pushed.Load() - popped.Load() - dropped.Load(); !early && lost != 0 ||
			lost < 0 || lost > Limit {
			t.Errorf("%d packets pushed, %d popped, %d dropped", pushed.Load(), popped.Load(),
				dropped.Load())
		}
	}
	if n := total.Load() - before; n != 0 {
		t.Errorf("total counts %d packets, want 0", n)
	}
}

func TestAllocations(t *testing.T) {
	q := New()
	batch := slices.Concat(run(1, 16, MaxSize), run(2, 16, minSize))
	packets := make([]*Packet, len(batch))
	if got := testing.AllocsPerRun(100, func() {
		q.Push(batch)
		if n, _ := q.Pop(packets); n != len(batch) {
			t.Fatalf("Pop returned %d packets", n)
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

// BenchmarkPushPop pushes and pops in batches of the sizes that the device and
// QUIC use.
func BenchmarkPushPop(b *testing.B) {
	q := New()
	var batch []*Packet
	for i := range 32 {
		batch = append(batch, packet(uint16(i%8), i, 1400))
	}
	packets := make([]*Packet, 16)
	b.SetBytes(1400)
	b.ReportAllocs()
	for n := 0; n < b.N; n += len(batch) {
		q.Push(batch)
		for got := 0; got < len(batch); {
			k, _ := q.Pop(packets)
			got += k
		}
	}
}

// TestIdle checks that a Queue is idle only if no packet is in it or is still
// being sent.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := New()
		if q.Idle() {
			t.Error("idle before Pop is called")
		}
		sent := make(chan struct{})
		go func() {
			for {
				p, _ := popOne(t, q)
				last := portOf(p) == 0
				<-sent
				p.Free()
				if last {
					return
				}
			}
		}()
		synctest.Wait()
		if !q.Idle() {
			t.Error("not idle while the queue is empty and Pop waits")
		}
		q.Push(run(1, 2, MaxSize))
		for range 2 {
			synctest.Wait()
			if q.Idle() {
				t.Error("idle while a packet waits or is being sent")
			}
			sent <- struct{}{}
		}
		synctest.Wait()
		if !q.Idle() {
			t.Error("not idle after all packets are sent")
		}
		q.Push(run(0, 1, MaxSize))
		sent <- struct{}{}
		synctest.Wait()
		if q.Idle() {
			t.Error("idle after the last Pop")
		}
	})
}
