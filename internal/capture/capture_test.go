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

// record is a packet as it is in a file.
type record struct {
	at     time.Time
	length int
	data   []byte
}

// read reads a whole file.
func read(t *testing.T, file []byte) (snapLen uint32, records []record) {
	t.Helper()
	r, err := pcapgo.NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if r.LinkType() != layers.LinkTypeRaw {
		t.Errorf("the link type is %v", r.LinkType())
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

// write runs c until the function is called that it returns, which gives the file.
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
	one.Packet([]byte("nobody looks"))
	Point{}.Packet([]byte("nobody can look"))
	(*Tap)(nil).At("1").Packet([]byte("nobody can look"))

	before := time.Now()
	everything, onlyTwo, short := tap.Start(Options{}), tap.Start(Options{Session: "2"}), tap.Start(Options{SnapLen: 3})
	all, second, cut := write(t, everything), write(t, onlyTwo), write(t, short)
	pkt := []byte("first")
	one.Packet(pkt)
	copy(pkt, "xxxxx") // it is the caller's
	two.Packet([]byte("second"))
	after := time.Now()

	snapLen, records := read(t, all())
	if snapLen != MaxSnapLen || len(records) != 2 || string(records[0].data) != "first" || string(records[1].data) != "second" {
		t.Errorf("captured %d, %v", snapLen, records)
	}
	for _, r := range records {
		if r.at.Before(before) || r.at.After(after) {
			t.Errorf("the time is %v, not between %v and %v", r.at, before, after)
		}
	}
	if _, records := read(t, second()); len(records) != 1 || string(records[0].data) != "second" {
		t.Errorf("of one session: %v", records)
	}
	if captured, dropped := onlyTwo.Counts(); captured != 1 || dropped != 0 {
		t.Errorf("counted %d and %d", captured, dropped)
	}
	if snapLen, records := read(t, cut()); snapLen != 3 || len(records) != 2 || string(records[0].data) != "fir" || records[0].length != 5 {
		t.Errorf("cut: %d, %v", snapLen, records)
	}
	if tap.running.Load() != nil {
		t.Error("captures that have ended are not gone")
	}
	one.Packet([]byte("late"))
	if captured, _ := everything.Counts(); captured != 2 {
		t.Errorf("%d packets after the end", captured)
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
	if err := c.Write(t.Context(), &b); err != nil { // ends by itself
		t.Fatal(err)
	}
	if _, records := read(t, b.Bytes()); len(records) != 3 {
		t.Errorf("%d packets", len(records))
	}
}

// gate is a file that takes nothing until it is opened.
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

// Packets do not wait for a file that takes none, and what finds no room is counted.
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
	if want := uint64(bufferSize / (headerLen + 1400)); captured != 1+want || captured+dropped != 1+sent {
		t.Errorf("captured %d, dropped %d of %d", captured, dropped, sent)
	}
	close(g.opened)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, records := read(t, g.Bytes()); uint64(len(records)) != captured {
		t.Errorf("%d packets are in the file, %d were captured", len(records), captured)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestCaptureFails(t *testing.T) {
	var tap Tap
	if err := tap.Start(Options{}).Write(t.Context(), failing{}); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("got %v", err)
	}
	if tap.running.Load() != nil {
		t.Error("it goes on")
	}
}

// Many sessions at once, with captures that come and go: of each, what was counted is in the file.
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
		t.Errorf("off: %v allocations", n)
	}
	c := tap.Start(Options{})
	if n := testing.AllocsPerRun(100, func() { p.Packet(pkt) }); n != 0 {
		t.Errorf("on: %v allocations", n)
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
