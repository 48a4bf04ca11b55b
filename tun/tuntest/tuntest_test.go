package tuntest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"testing/synctest"

	"masquevpn/tun"
)

// The methods that both devices have.
var _ = []interface {
	Name() string
	Index() int
	MTU() int
	SetMTU(int) error
	Offload() bool
	BatchSize() int
	Dropped() uint64
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	Close() error
}{(*tun.Device)(nil), (*Device)(nil)}

const offset = tun.Headroom

func buffers(n int) ([][]byte, []int) {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, offset+1500)
	}
	return bufs, make([]int, n)
}

func TestRead(t *testing.T) {
	d := New(1400)
	pkt := []byte{0}
	for i := range byte(5) {
		pkt[0] = i
		d.Inject(pkt) // does not retain pkt
	}
	bufs, sizes := buffers(3)
	for _, want := range [][]byte{{0, 1, 2}, {3, 4}} {
		n, err := d.Read(bufs, sizes, offset)
		if n != len(want) || err != nil {
			t.Fatalf("%d packets, error %v, want %d", n, err, len(want))
		}
		for i, w := range want {
			if got := bufs[i][offset : offset+sizes[i]]; !bytes.Equal(got, []byte{w}) {
				t.Errorf("packet %x, want %x", got, w)
			}
		}
	}
}

func TestReadBounds(t *testing.T) {
	d := New(1400)
	for range QueueLen {
		d.Inject([]byte{1})
	}
	d.Inject([]byte{2})
	if d.Dropped() != 1 {
		t.Errorf("%d dropped, want 1", d.Dropped())
	}
	bufs, sizes := buffers(QueueLen)
	for range QueueLen / batchSize {
		if n, err := d.Read(bufs, sizes, offset); n != batchSize || err != nil {
			t.Errorf("%d packets, error %v, want a full batch", n, err)
		}
	}
	d.Inject(make([]byte, 1501))
	d.Inject(make([]byte, 1500))
	if n, err := d.Read(bufs, sizes, offset); n != 1 || err != nil || sizes[0] != 1500 ||
		d.Dropped() != 2 {
		t.Errorf("%d packets of %d bytes, error %v, %d dropped; want 1, 1500, none, 2", n, sizes[0],
			err, d.Dropped())
	}
}

func TestWrite(t *testing.T) {
	d := New(1400)
	b := append(make([]byte, offset+4), 1, 2, 3)
	copy(b, "keep")
	long := make([]byte, offset+5+tun.MaxPacketLen)
	n, err := d.Write([][]byte{b, make([]byte, offset+4), nil, long}, offset+4)
	if n != 1 || !errors.Is(err, tun.ErrInvalid) {
		t.Errorf("%d packets written, error %v, want 1 and ErrInvalid", n, err)
	}
	got, err := d.Receive(t.Context())
	if err != nil || !bytes.Equal(got, []byte{1, 2, 3}) {
		t.Errorf("received %x, error %v, want 010203", got, err)
	}
	if full := b[:cap(b)]; string(full[:4]) != "keep" ||
		bytes.Count(full[4:], []byte{0xee}) != cap(b)-4 {
		t.Errorf("buffer is %x after Write", full)
	}
}

func TestWriteBounds(t *testing.T) {
	d := New(1400)
	for range QueueLen + 1 {
		if n, err := d.Write([][]byte{make([]byte, offset+1)}, offset); n != 1 || err != nil {
			t.Fatalf("%d packets written, error %v, want 1", n, err)
		}
	}
	if d.Dropped() != 1 {
		t.Errorf("%d dropped, want 1", d.Dropped())
	}
}

func TestArguments(t *testing.T) {
	d := New(1400)
	bufs, sizes := buffers(2)
	for name, call := range map[string]func() (int, error){
		"no buffers":      func() (int, error) { return d.Read(nil, sizes, offset) },
		"too few sizes":   func() (int, error) { return d.Read(bufs, sizes[:1], offset) },
		"offset past end": func() (int, error) { return d.Read(bufs, sizes, len(bufs[0])) },
		"negative offset": func() (int, error) { return d.Read(bufs, sizes, -1) },
		"no headroom":     func() (int, error) { return d.Write(bufs, offset-1) },
		"MTU too small":   func() (int, error) { return 0, d.SetMTU(tun.MinMTU - 1) },
	} {
		t.Run(name, func(t *testing.T) {
			if n, err := call(); n != 0 || !errors.Is(err, tun.ErrInvalid) {
				t.Errorf("got %d, %v, want ErrInvalid", n, err)
			}
		})
	}
}

func TestSetMTU(t *testing.T) {
	d := New(1400)
	if d.MTU() != 1400 {
		t.Errorf("MTU %d, want 1400", d.MTU())
	}
	if err := d.SetMTU(1300); err != nil || d.MTU() != 1300 {
		t.Errorf("MTU %d, error %v, want 1300", d.MTU(), err)
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(1400)
		bufs, sizes := buffers(1)
		var waiting sync.WaitGroup
		waiting.Go(func() {
			if _, err := d.Read(bufs, sizes, offset); err != os.ErrClosed {
				t.Errorf("Read ended with %v, want os.ErrClosed", err)
			}
		})
		waiting.Go(func() {
			if _, err := d.Receive(t.Context()); err != os.ErrClosed {
				t.Errorf("Receive ended with %v, want os.ErrClosed", err)
			}
		})
		synctest.Wait()
		for range 2 {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		waiting.Wait()
	})
}

func TestClosed(t *testing.T) {
	d := New(1400)
	d.Inject([]byte{1})
	d.Write([][]byte{make([]byte, offset+1)}, offset)
	d.Close()
	if _, err := d.Receive(t.Context()); err != nil {
		t.Errorf("Receive of a packet written before Close: %v", err)
	}
	bufs, sizes := buffers(1)
	d.Inject([]byte{1})
	for name, call := range map[string]func() error{
		"Read":    func() error { _, err := d.Read(bufs, sizes, offset); return err },
		"Write":   func() error { _, err := d.Write(bufs, offset); return err },
		"Receive": func() error { _, err := d.Receive(context.Background()); return err },
		"SetMTU":  func() error { return d.SetMTU(1300) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := call(); err != os.ErrClosed {
				t.Errorf("after Close: %v, want os.ErrClosed", err)
			}
		})
	}
}

func TestReceiveCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(1400).Receive(ctx); err != context.Canceled {
		t.Errorf("error %v, want context.Canceled", err)
	}
}
