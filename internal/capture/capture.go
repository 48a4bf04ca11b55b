// Package capture copies the packets of tunnels into files that tcpdump and Wireshark read. Where packets pass is a Point; while
// nobody looks, it costs them one load of a pointer. While somebody does, they are copied into a buffer of fixed size, and what finds
// no room there is counted: packets never wait for a file.
package capture

import (
	"context"
	"encoding/binary"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// MaxSnapLen is the most that is kept of a packet, in bytes: all of it.
const MaxSnapLen = 1 << 16

const (
	// bufferSize is what may wait to be written, in bytes: as much again is being written. At 1 Gbit/s it is full in 60 ms.
	bufferSize = 8 << 20

	// The format is that of pcap-savefile(5) with nanoseconds.
	magic         = 0xa1b23c4d
	major, minor  = 2, 4
	linkTypeRaw   = 101 // packets begin with the header of IPv4 or IPv6
	fileHeaderLen = 24
	headerLen     = 16 // of a packet
)

// A Tap is all the points of a program where packets pass. Its zero value is ready to use.
type Tap struct {
	mu      sync.Mutex                 // of those who change running
	running atomic.Pointer[[]*Capture] // nil while there is none
}

// At returns the point of a session.
func (t *Tap) At(session string) Point { return Point{t, session} }

// A Point is where the packets of a session pass, in both directions. That of a nil Tap, and the zero value, are looked at by
// nobody.
type Point struct {
	tap     *Tap
	session string
}

// Packet shows a whole IP packet, which stays the caller's. It never waits for anything but other calls of it, and allocates
// nothing.
func (p Point) Packet(pkt []byte) {
	if p.tap != nil && p.tap.running.Load() != nil { // which is inlined
		p.record(pkt)
	}
}

func (p Point) record(pkt []byte) {
	running := p.tap.running.Load()
	if running == nil {
		return
	}
	now := time.Now()
	for _, c := range *running {
		if c.session == "" || c.session == p.session {
			c.add(now, pkt)
		}
	}
}

// Options say what a Capture is of. The zero value is all packets of all sessions.
type Options struct {
	Session string // "" for all
	SnapLen int    // bytes to keep of each packet, 0 for MaxSnapLen
	Count   uint64 // packets after which it ends, 0 for no end
}

// A Capture is one look at the packets that pass.
type Capture struct {
	tap     *Tap
	session string
	snapLen int
	count   uint64
	wake    chan struct{} // there is something to write
	full    chan struct{} // closed when there are as many packets as were wanted

	mu       sync.Mutex
	buf      []byte // records to be written; its room never grows
	captured uint64
	dropped  uint64
	ended    bool
}

// Start begins a capture. Write has to be called.
func (t *Tap) Start(o Options) *Capture {
	if o.SnapLen <= 0 || o.SnapLen > MaxSnapLen {
		o.SnapLen = MaxSnapLen
	}
	c := &Capture{
		tap: t, session: o.Session, snapLen: o.SnapLen, count: o.Count,
		wake: make(chan struct{}, 1), full: make(chan struct{}),
		buf: make([]byte, 0, bufferSize), // which costs no memory before it is used
	}
	t.change(func(running []*Capture) []*Capture { return append(running, c) })
	return c
}

func (t *Tap) change(f func([]*Capture) []*Capture) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var running []*Capture
	if old := t.running.Load(); old != nil {
		running = slices.Clone(*old)
	}
	if running = f(running); len(running) == 0 {
		t.running.Store(nil)
		return
	}
	t.running.Store(&running)
}

// add appends a record.
func (c *Capture) add(at time.Time, pkt []byte) {
	kept := pkt[:min(len(pkt), c.snapLen)]
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended || c.count > 0 && c.captured == c.count:
		return
	case len(c.buf)+headerLen+len(kept) > cap(c.buf):
		c.dropped++
		return
	}
	c.captured++
	b := c.buf
	b = binary.LittleEndian.AppendUint32(b, uint32(at.Unix()))
	b = binary.LittleEndian.AppendUint32(b, uint32(at.Nanosecond()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(kept)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(pkt)))
	c.buf = append(b, kept...)
	if c.captured == c.count {
		close(c.full)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Write writes the capture to w until ctx ends, w fails, or there are as many packets as were wanted, and then ends it. Each call
// of w gets whole packets, so what is written can be read at any time. The error is that of w.
func (c *Capture) Write(ctx context.Context, w io.Writer) error {
	defer c.tap.change(func(running []*Capture) []*Capture {
		return slices.DeleteFunc(running, func(other *Capture) bool { return other == c })
	})
	if _, err := w.Write(c.header()); err != nil {
		return err
	}
	spare := make([]byte, 0, bufferSize)
	for last := false; !last; {
		select {
		case <-c.wake:
		case <-c.full:
			last = true
		case <-ctx.Done():
			last = true
		}
		c.mu.Lock()
		c.buf, spare = spare[:0], c.buf
		c.ended = last
		c.mu.Unlock()
		if len(spare) > 0 {
			if _, err := w.Write(spare); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Capture) header() []byte {
	b := make([]byte, 0, fileHeaderLen)
	b = binary.LittleEndian.AppendUint32(b, magic)
	b = binary.LittleEndian.AppendUint16(b, major)
	b = binary.LittleEndian.AppendUint16(b, minor)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // time zone and accuracy, which nobody uses
	b = binary.LittleEndian.AppendUint32(b, uint32(c.snapLen))
	return binary.LittleEndian.AppendUint32(b, linkTypeRaw)
}

// Counts are how many packets were captured, and how many more there was no room for.
func (c *Capture) Counts() (captured, dropped uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.captured, c.dropped
}
