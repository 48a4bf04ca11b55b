// Package tuntest is a TUN device in memory, with the methods of tun.Device, for tests without a kernel.
package tuntest

import (
	"context"
	"os"
	"sync"
)

// queueLen is how many packets wait in each direction; more are dropped, as a device does.
const queueLen = 1024

// Device is a TUN device whose host is the test. All methods may be called from any goroutine.
type Device struct {
	mtu    int
	toRead chan []byte // from the host into the tunnel
	toHost chan []byte
	once   sync.Once
	closed chan struct{}
}

// New makes a device with an MTU of mtu bytes.
func New(mtu int) *Device {
	return &Device{
		mtu:    mtu,
		toRead: make(chan []byte, queueLen),
		toHost: make(chan []byte, queueLen),
		closed: make(chan struct{}),
	}
}

// Inject lets the host send pkt, which it keeps, into the tunnel.
func (d *Device) Inject(pkt []byte) {
	select {
	case d.toRead <- append([]byte(nil), pkt...):
	default:
	}
}

// Receive waits for the next packet that came out of the tunnel. The packet belongs to the caller.
func (d *Device) Receive(ctx context.Context) ([]byte, error) {
	select {
	case pkt := <-d.toHost:
		return pkt, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Name returns a name that no device of the kernel has.
func (d *Device) Name() string { return "tuntest" }

// MTU returns what New was given, in bytes.
func (d *Device) MTU() int { return d.mtu }

// BatchSize is as small as it can be while batches are still batches.
func (d *Device) BatchSize() int { return 4 }

// Read is that of tun.Device.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n := 0
	select {
	case pkt := <-d.toRead:
		sizes[n] = copy(bufs[n][offset:], pkt)
		n++
	case <-d.closed:
		return 0, os.ErrClosed
	}
	for n < min(len(bufs), d.BatchSize()) {
		select {
		case pkt := <-d.toRead:
			sizes[n] = copy(bufs[n][offset:], pkt)
			n++
		default:
			return n, nil
		}
	}
	return n, nil
}

// Write is that of tun.Device.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	select {
	case <-d.closed:
		return 0, os.ErrClosed
	default:
	}
	for _, b := range bufs {
		select {
		case d.toHost <- append([]byte(nil), b[offset:]...):
		default:
		}
	}
	return len(bufs), nil
}

// Close makes Read and Write return os.ErrClosed.
func (d *Device) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}
