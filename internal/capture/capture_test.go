package capture

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// record is a packet from a capture file.
type record struct {
	time   time.Time
	length int
	data   []byte
}

// read parses a capture file.
func read(t *testing.T, file []byte) (snapLen uint32, records []record) {
	t.Helper()
	r, err := pcapgo.NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if r.LinkType() != layers.LinkTypeRaw {
		t.Errorf("link type %v, want raw", r.LinkType())
	}
	for {
		data, info, err := r.ReadPacketData()
		if err == io.EOF {
			return r.Snaplen(), records
		}
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, record{info.Timestamp, info.Length, data})
	}
}

// write runs c.Write in a goroutine. The returned function ends it and returns
// the file.
func write(t *testing.T, c *Capture) (file func() []byte) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var b bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- c.Write(ctx, &b) }()
	return func() []byte {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return b.Bytes()
	}
}

func TestCapture(t *testing.T) {
	var tap Tap
	one, two := tap.At("1"), tap.At("2")
	one.Packet([]byte("no capture"))
	Point{}.Packet([]byte("no tap"))
	(*Tap)(nil).At("1").Packet([]byte("no tap"))

	before := time.Now()
	everything, onlyTwo, short := tap.Start(Options{}), tap.Start(Options{Session: "2"}),
		tap.Start(Options{SnapLen: 3})
	all, second, truncated := write(t, everything), write(t, onlyTwo), write(t, short)
	pkt := []byte("first")
	one.Packet(pkt)
	copy(pkt, "xxxxx") // Packet must not retain pkt
	two.Packet([]byte("second"))
	after := time.Now()

	snapLen, records := read(t, all())
	if snapLen != MaxSnapLen || len(records) != 2 || string(records[0].data) != "first" ||
		string(records[1].data) != "second" {
		t.Errorf("snap length %d, records %v", snapLen, records)
	}
	for _, r := range records {
		if r.time.Before(before) || r.time.After(after) {
			t.Errorf("time %v, want between %v and %v", r.time, before, after)
		}
	}
	if _, records := read(t, second()); len(records) != 1 || string(records[0].data) != "second" {
		t.Errorf("records of one session: %v", records)
	}
	if captured, dropped := onlyTwo.Counts(); captured != 1 || dropped != 0 {
		t.Errorf("captured %d, dropped %d, want 1, 0", captured, dropped)
	}
	if snapLen, records := read(t, truncated()); snapLen != 3 || len(records) != 2 ||
		string(records[0].data) != "fir" || records[0].length != 5 {
		t.Errorf("with a snap length of 3: snap length %d, records %v", snapLen, records)
	}
	if tap.running.Load() != nil {
		t.Error("ended captures are still running")
	}
	one.Packet([]byte("late"))
	if captured, _ := everything.Counts(); captured != 2 {
		t.Errorf("captured %d packets, want 2, because the capture has ended", captured)
	}
}

func TestCaptureCount(t *testing.T) {
	var tap Tap
	c := tap.Start(Options{Count: 3})
	p := tap.At("")
	for range 5 {
		p.Packet([]byte("x"))
	}
	var b bytes.Buffer
	if err := c.Write(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	if _, records := read(t, b.Bytes()); len(records) != 3 {
		t.Errorf("%d packets, want 3", len(records))
	}
}

// gate is a file whose Write blocks until opened is closed.
type gate struct {
	bytes.Buffer
	entered chan struct{}
	opened  chan struct{}
	once    sync.Once
}

func (g *gate) Write(b []byte) (int, error) {
	if len(b) > fileHeaderLen {
		g.once.Do(func() { close(g.entered) })
		<-g.opened
	}
	return g.Buffer.Write(b)
}

// TestCaptureDrops checks that packets do not wait for a file that blocks, and
// that those without room in the buffer are counted.
func TestCaptureDrops(t *testing.T) {
	var tap Tap
	c := tap.Start(Options{})
	p := tap.At("")
	ctx, stop := context.WithCancel(t.Context())
	g := &gate{entered: make(chan struct{}), opened: make(chan struct{})}
	done := make(chan error, 1)
	go func() { done <- c.Write(ctx, g) }()
	pkt := make([]byte, 1400)
	p.Packet(pkt)
	<-g.entered
	const sent = 3 * bufferSize / 1400
	for range sent {
		p.Packet(pkt)
	}
	captured, dropped := c.Counts()
	if want := uint64(bufferSize / (headerLen + 1400)); captured != 1+want ||
		captured+dropped != 1+sent {
		t.Errorf("captured %d, dropped %d of %d", captured, dropped, sent)
	}
	close(g.opened)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, records := read(t, g.Bytes()); uint64(len(records)) != captured {
		t.Errorf("%d packets in the file, %d captured", len(records), captured)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestCaptureFails(t *testing.T) {
	var tap Tap
	if err := tap.Start(Options{}).Write(t.Context(), failing{}); !errors.Is(err,
		io.ErrShortWrite) {
		t.Errorf("got %v, want io.ErrShortWrite", err)
	}
	if tap.running.Load() != nil {
		t.Error("the capture is still running")
	}
}

// TestCaptureConcurrently starts and ends captures while many sessions have
// packets, and compares the counts with the files.
func TestCaptureConcurrently(t *testing.T) {
	var tap Tap
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			p := tap.At(string(rune('0' + i)))
			pkt := bytes.Repeat([]byte{byte(i)}, 100+i)
			for {
				select {
				case <-stop:
					return
				default:
					p.Packet(pkt)
				}
			}
		})
	}
	for range 20 {
		c := tap.Start(Options{Count: 1000})
		var b bytes.Buffer
		if err := c.Write(t.Context(), &b); err != nil {
			t.Fatal(err)
		}
		_, records := read(t, b.Bytes())
		if captured, _ := c.Counts(); captured != 1000 || len(records) != 1000 {
			t.Errorf("captured %d, in the file %d", captured, len(records))
		}
		for _, r := range records {
			if r.length != 100+int(r.data[0]) {
				t.Fatalf("a packet of session %d has %d bytes", r.data[0], r.length)
			}
		}
	}
	close(stop)
	wg.Wait()
}

func TestPacketAllocatesNothing(t *testing.T) {
	var tap Tap
	p := tap.At("1")
	pkt := make([]byte, 1400)
	if n := testing.AllocsPerRun(100, func() { p.Packet(pkt) }); n != 0 {
		t.Errorf("without a capture: %v allocations", n)
	}
	c := tap.Start(Options{})
	if n := testing.AllocsPerRun(100, func() { p.Packet(pkt) }); n != 0 {
		t.Errorf("with a capture: %v allocations", n)
	}
	write(t, c)()
}

func BenchmarkPacket(b *testing.B) {
	var tap Tap
	p := tap.At("1")
	pkt := make([]byte, 1400)
	b.Run("off", func(b *testing.B) {
		for b.Loop() {
			p.Packet(pkt)
		}
	})
	c := tap.Start(Options{})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Write(ctx, io.Discard) }()
	b.Run("on", func(b *testing.B) {
		for b.Loop() {
			p.Packet(pkt)
		}
	})
	stop()
	<-done
}
