package flowqueue

import (
	"sync"
	"time"
)

const (
	// Headroom is how many bytes are free before each packet, for the prefix of a datagram.
	Headroom = 16
	// MaxSize is the length of the longest packet, in bytes.
	MaxSize = 1500
)

// Packet is one IP packet. Whoever has one owns it until it is pushed or freed.
type Packet struct {
	// Size is the length of the packet in bytes, without the headroom.
	Size int

	buf    [Headroom + MaxSize]byte
	queued time.Duration
	after  *Packet // in its flow
}

var pool = sync.Pool{New: func() any { return new(Packet) }}

// Get returns a Packet with undefined contents.
func Get() *Packet { return pool.Get().(*Packet) }

// Free gives p back.
func (p *Packet) Free() { pool.Put(p) }

// Room returns the whole buffer: to be filled from Headroom on.
func (p *Packet) Room() []byte { return p.buf[:] }

// Bytes returns headroom and packet.
func (p *Packet) Bytes() []byte { return p.buf[:Headroom+p.Size] }
