package quic

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/wire"
	"github.com/quic-go/quic-go/quicvarint"
)

// DatagramHandler receives datagrams. The connection's goroutine calls its
// methods, so they must not wait for the connection. SendDatagram waits for it
// when its queue is full.
type DatagramHandler interface {
	// HandleDatagram receives a datagram without its leading number. It must
	// not retain the datagram.
	HandleDatagram([]byte)
	// FlushDatagrams is called after one or more calls of HandleDatagram:
	// before another handler receives a datagram, and after the last of the
	// packets that were received together.
	FlushDatagrams()
}

// datagramHandlers are the handlers of a connection by the leading number of
// their datagrams.
type datagramHandlers struct {
	mu   sync.Mutex // serializes changes
	by   atomic.Pointer[map[uint64]DatagramHandler]
	busy DatagramHandler // the handler to flush, nil for none
}

// HandleDatagrams makes h receive all further datagrams that begin with the
// number id, as the HTTP Datagrams of a stream do (RFC 9297 section 2.1). If h
// is nil, ReceiveDatagram returns them again.
func (c *Conn) HandleDatagrams(id uint64, h DatagramHandler) {
	d := &c.datagramHandlers
	d.mu.Lock()
	defer d.mu.Unlock()
	next := make(map[uint64]DatagramHandler)
	if by := d.by.Load(); by != nil {
		maps.Copy(next, *by)
	}
	next[id] = h
	if h == nil {
		delete(next, id)
	}
	d.by.Store(&next)
}

// handle passes the datagram to its handler. It returns false if there is none.
func (d *datagramHandlers) handle(datagram []byte) bool {
	by := d.by.Load()
	if by == nil {
		return false
	}
	id, n, err := quicvarint.Parse(datagram)
	if err != nil {
		return false
	}
	h := (*by)[id]
	if h == nil {
		return false
	}
	if d.busy != h {
		d.flush()
		d.busy = h
	}
	h.HandleDatagram(datagram[n:])
	return true
}

func (d *datagramHandlers) flush() {
	if d.busy != nil {
		d.busy.FlushDatagrams()
		d.busy = nil
	}
}

// datagramBuffer holds a datagram until it is packed.
type datagramBuffer [1500]byte

var datagramBuffers = sync.Pool{New: func() any { return new(datagramBuffer) }}

func getDatagramBuffer(size int) []byte {
	if size > len(datagramBuffer{}) {
		return make([]byte, size)
	}
	return datagramBuffers.Get().(*datagramBuffer)[:size]
}

// releaseDatagrams reuses the buffers of datagrams that were packed. Each
// datagram is packed once, and nothing reads its data afterwards: datagram
// frames have no handler for their loss.
func releaseDatagrams(frames []ackhandler.Frame) {
	for _, f := range frames {
		if d, ok := f.Frame.(*wire.DatagramFrame); ok {
			if cap(d.Data) == len(datagramBuffer{}) {
				datagramBuffers.Put((*datagramBuffer)(d.Data[:cap(d.Data)]))
			}
			d.Data = nil
		}
	}
}
