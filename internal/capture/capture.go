// Package capture writes copies of a tunnel's packets to files for tcpdump and
// Wireshark.
//
// A program has one [Tap]. Each session has a [Point] of it, which gets all
// packets of the session. [Tap.Start] starts a [Capture], and [Capture.Write]
// writes the packets to a file until it is stopped.
//
// Packets never wait for a file. Without a running Capture, a Point costs one
// load of a pointer. Otherwise it copies packets to a buffer of fixed size; the
// Capture counts packets that do not fit.
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

// MaxSnapLen is the greatest snap length in bytes. No packet is longer.
const MaxSnapLen = 1 << 16

const (
	// bufferSize is the size in bytes of each of the two buffers of a Capture:
	// one is filled while the other is written. At 1 Gbit/s it takes 60 ms to
	// fill one.
	bufferSize = 8 << 20

	// The file format is pcap-savefile(5) with nanoseconds.
	magic         = 0xa1b23c4d
	major, minor  = 2, 4
	linkTypeRaw   = 101 // packets start with an IPv4 or IPv6 header
	fileHeaderLen = 24  // bytes
	headerLen     = 16  // bytes in front of each packet
)

// Tap connects the Points of a program with its Captures. The zero value is
// ready to use.
type Tap struct {
	mu sync.Mutex // serializes changes of running

	// running is the list of running Captures. It is nil if there is none.
	running atomic.Pointer[[]*Capture]
}

// At returns the Point of a session. t may be nil.
func (t *Tap) At(session string) Point { return Point{t, session} }

// Point gets the packets of a session in both directions. The zero value and
// the Points of a nil Tap ignore them.
type Point struct {
	tap     *Tap
	session string
}

// Packet gives an IP packet to the running Captures. It does not retain pkt,
// waits for nothing but other calls of Packet, and does not allocate.
func (p Point) Packet(pkt []byte) {
	// Packet is short so that the compiler inlines it.
	if p.tap != nil && p.tap.running.Load() != nil {
		p.record(pkt)
	}
}

// record adds pkt to the Captures that want it.
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

// Options select the packets of a Capture. The zero value means all packets of
// all sessions.
type Options struct {
	// Session is the session to capture. Empty means all sessions.
	Session string

	// SnapLen is the number of bytes to keep of each packet. 0 means
	// MaxSnapLen.
	SnapLen int

	// Count is the number of packets after which Write returns. 0 means no
	// limit.
	Count uint64
}

// Capture collects packets until its Write returns.
type Capture struct {
	tap     *Tap
	session string
	snapLen int // bytes
	count   uint64

	// wake wakes Write when buf has records. It has a capacity of 1.
	wake chan struct{}

	// full is closed when count packets are captured.
	full chan struct{}

	mu       sync.Mutex // guards the fields below
	buf      []byte     // unwritten records; the capacity never grows
	captured uint64     // packets
	dropped  uint64     // packets
	ended    bool
}

// Start starts a Capture. The caller must call Write to end it.
func (t *Tap) Start(o Options) *Capture {
	if o.SnapLen <= 0 || o.SnapLen > MaxSnapLen {
		o.SnapLen = MaxSnapLen
	}
	c := &Capture{
		tap: t, session: o.Session, snapLen: o.SnapLen, count: o.Count,
		wake: make(chan struct{}, 1), full: make(chan struct{}),
		buf: make([]byte, 0, bufferSize), // the kernel provides memory only on use
	}
	t.change(func(running []*Capture) []*Capture { return append(running, c) })
	return c
}

// change replaces the list of running Captures by the result of f.
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

// add appends the record of a packet, or counts it as dropped.
func (c *Capture) add(now time.Time, pkt []byte) {
	data := pkt[:min(len(pkt), c.snapLen)]
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended || c.count > 0 && c.captured == c.count:
		return
	case len(c.buf)+headerLen+len(data) > cap(c.buf):
		c.dropped++
		return
	}
	c.captured++
	b := c.buf
	b = binary.LittleEndian.AppendUint32(b, uint32(now.Unix()))
	b = binary.LittleEndian.AppendUint32(b, uint32(now.Nanosecond()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(pkt)))
	c.buf = append(b, data...)
	if c.captured == c.count {
		close(c.full)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Write writes the captured packets to w and then ends the Capture. It returns
// when ctx is done, w fails, or Options.Count packets are written. Each call of
// w.Write gets complete packets, so the file can be read at any time. The error
// is the error of w.
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

// header returns the file header.
func (c *Capture) header() []byte {
	b := make([]byte, 0, fileHeaderLen)
	b = binary.LittleEndian.AppendUint32(b, magic)
	b = binary.LittleEndian.AppendUint16(b, major)
	b = binary.LittleEndian.AppendUint16(b, minor)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // time zone and accuracy, always 0
	b = binary.LittleEndian.AppendUint32(b, uint32(c.snapLen))
	return binary.LittleEndian.AppendUint32(b, linkTypeRaw)
}

// Counts returns the numbers of packets that were captured, and of packets that
// were dropped because the buffer was full.
func (c *Capture) Counts() (captured, dropped uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.captured, c.dropped
}
