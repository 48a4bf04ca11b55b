// Package tuntest provides a TUN device in memory. It has the methods of
// tun.Device that move packets, and the test takes the part of the host:
// [Device.Inject] sends packets into the tunnel, [Device.Receive] returns
// packets that came out of it.
//
// Tests with this device need no privileges and run in a synctest bubble.
package tuntest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"masquevpn/tun"
)

const (
	// QueueLen is the number of packets that can wait in each direction. Like a
	// kernel device, the Device drops further packets, so that a test cannot
	// block itself.
	QueueLen = 1024

	batchSize = 128
)

// Device is a TUN device in memory. It is always up. Its methods may be called
// concurrently.
type Device struct {
	mtu      atomic.Int64
	dropped  atomic.Uint64
	fromHost chan []byte
	toHost   chan []byte
	once     sync.Once
	closed   chan struct{}
}

// New returns a device with an MTU of mtu bytes.
func New(mtu int) *Device {
	d := &Device{
		fromHost: make(chan []byte, QueueLen),
		toHost:   make(chan []byte, QueueLen),
		closed:   make(chan struct{}),
	}
	d.mtu.Store(int64(mtu))
	return d
}

// Inject sends pkt from the host into the tunnel, where Read returns it. It
// never blocks, does not retain pkt, and does nothing after Close.
func (d *Device) Inject(pkt []byte) { d.push(d.fromHost, pkt) }

// Receive waits for the next packet that was written to the device. The caller
// owns the packet. The error is ctx.Err(), or os.ErrClosed if the device is
// closed and has no more packets.
func (d *Device) Receive(ctx context.Context) ([]byte, error) {
	select {
	case pkt := <-d.toHost:
		return pkt, nil
	default:
	}
	select {
	case pkt := <-d.toHost:
		return pkt, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-d.closed:
		return nil, os.ErrClosed
	}
}

// push appends a copy of pkt to queue, or drops it if the queue is full.
func (d *Device) push(queue chan<- []byte, pkt []byte) {
	if d.isClosed() {
		return
	}
	select {
	case queue <- append([]byte(nil), pkt...):
	default:
		d.dropped.Add(1)
	}
}

func (d *Device) isClosed() bool {
	select {
	case <-d.closed:
		return true
	default:
		return false
	}
}

// Name returns "tuntest".
func (d *Device) Name() string { return "tuntest" }

// Index returns 0, which no kernel device has.
func (d *Device) Index() int { return 0 }

// MTU returns the MTU in bytes. The device does not enforce it.
func (d *Device) MTU() int { return int(d.mtu.Load()) }

// SetMTU follows tun.Device.
func (d *Device) SetMTU(mtu int) error {
	if err := tun.CheckMTU(mtu); err != nil {
		return err
	}
	if d.isClosed() {
		return os.ErrClosed
	}
	d.mtu.Store(int64(mtu))
	return nil
}

// Offload returns true, because Read returns batches.
func (d *Device) Offload() bool { return true }

// BatchSize follows tun.Device.
func (d *Device) BatchSize() int { return batchSize }

// Dropped returns the number of packets dropped because a queue was full or a
// buffer given to Read was too short.
func (d *Device) Dropped() uint64 { return d.dropped.Load() }

// Read follows tun.Device. It waits for one packet and returns it with all
// other packets in the queue, up to BatchSize.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	if len(bufs) == 0 || len(sizes) < len(bufs) {
		return 0, fmt.Errorf("tuntest: read: %d buffers, %d sizes: %w", len(bufs), len(sizes),
			tun.ErrInvalid)
	}
	for _, b := range bufs {
		if offset < 0 || offset >= len(b) {
			return 0, fmt.Errorf("tuntest: read: offset %d in a buffer of %d bytes: %w", offset,
				len(b), tun.ErrInvalid)
		}
	}
	if d.isClosed() {
		return 0, os.ErrClosed
	}
	n := 0
	for n == 0 {
		select {
		case pkt := <-d.fromHost:
			n += d.deliver(pkt, bufs[n][offset:], &sizes[n])
		case <-d.closed:
			return 0, os.ErrClosed
		}
	}
	for n < min(len(bufs), batchSize) {
		select {
		case pkt := <-d.fromHost:
			n += d.deliver(pkt, bufs[n][offset:], &sizes[n])
		default:
			return n, nil
		}
	}
	return n, nil
}

// deliver copies pkt to buf and returns 1, or drops it and returns 0.
func (d *Device) deliver(pkt, buf []byte, size *int) int {
	if len(pkt) > len(buf) {
		d.dropped.Add(1)
		return 0
	}
	*size = copy(buf, pkt)
	return 1
}

// Write follows tun.Device. Before it returns, it overwrites all memory that
// tun.Device may overwrite, from the headroom to the capacity of each buffer,
// so that tests fail if the caller still relies on the contents.
func (d *Device) Write(bufs [][]byte, offset int) (n int, err error) {
	if offset < tun.Headroom {
		return 0, fmt.Errorf("tuntest: write: offset %d is less than Headroom, %d: %w", offset,
			tun.Headroom, tun.ErrInvalid)
	}
	if d.isClosed() {
		return 0, os.ErrClosed
	}
	for _, b := range bufs {
		if len(b) <= offset || len(b)-offset > tun.MaxPacketLen {
			err = fmt.Errorf("tuntest: write: packet of %d bytes: %w", len(b)-offset,
				tun.ErrInvalid)
			continue
		}
		d.push(d.toHost, b[offset:])
		n++
		owned := b[offset-tun.Headroom : min(cap(b), offset+tun.MaxPacketLen)]
		for i := range owned {
			owned[i] = 0xee
		}
	}
	return n, err
}

// Close ends Read, Write and Receive with os.ErrClosed. It may be called more
// than once.
func (d *Device) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}
