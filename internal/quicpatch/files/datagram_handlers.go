package quic

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/wire"
	"github.com/quic-go/quic-go/quicvarint"
)

// DatagramHandler takes datagrams as they come in. Its methods are called by
// the goroutine that runs the connection: they must not wait for it, which
// SendDatagram does when its queue is full.
type DatagramHandler interface {
	// HandleDatagram takes one datagram, without the number that it begins
	// with. The datagram must not be kept.
	HandleDatagram([]byte)
	// FlushDatagrams is called after one or more datagrams: before another
	// handler gets one, and at the end of each run of packets that were at
	// hand.
	FlushDatagrams()
}

// datagramHandlers are the handlers of a connection by the number that their
// datagrams begin with.
type datagramHandlers struct {
	mu   sync.Mutex // serializes changes
	by   atomic.Pointer[map[uint64]DatagramHandler]
	busy DatagramHandler // the handler to flush, nil for none
}

// HandleDatagrams gives h, from now on, the datagrams that begin with the
// number id, as HTTP Datagrams of one stream do (RFC 9297 section 2.1). With
// nil they go to ReceiveDatagram again.
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

// handle reports whether there is a handler for the datagram.
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

// datagramBuffer is what datagrams wait in until they are packed.
type datagramBuffer [1500]byte

var datagramBuffers = sync.Pool{New: func() any { return new(datagramBuffer) }}

func getDatagramBuffer(size int) []byte {
	if size > len(datagramBuffer{}) {
		return make([]byte, size)
	}
	return datagramBuffers.Get().(*datagramBuffer)[:size]
}

// releaseDatagrams takes the contents of datagrams back that were packed, which
// is once. What remains of them in the history of sent packets is not looked
// at: a datagram has no handler for its loss.
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
