package flowqueue

import (
	"sync"
	"time"

	"masquevpn/tun"
)

// MaxSize is the length of the longest packet in bytes.
const MaxSize = 1500

// Packet is one IP packet behind [tun.Headroom] free bytes, which have room for
// the prefix of a datagram. The caller of Get owns it until it gives it to
// [Queue.Push] or calls Free.
type Packet struct {
	// Size is the length of the packet in bytes, excluding the headroom.
	Size int

	buf    [tun.Headroom + MaxSize]byte
	queued time.Duration // time of Push
	after  *Packet       // next packet of the flow
}

var pool = sync.Pool{New: func() any { return new(Packet) }}

// Get returns a Packet with undefined contents.
func Get() *Packet { return pool.Get().(*Packet) }

// Free releases p for another Get.
func (p *Packet) Free() { pool.Put(p) }

// Buffer returns the buffer of p, in which the packet starts at tun.Headroom.
func (p *Packet) Buffer() []byte { return p.buf[:] }

// Bytes returns the headroom and the packet.
func (p *Packet) Bytes() []byte { return p.buf[:tun.Headroom+p.Size] }
