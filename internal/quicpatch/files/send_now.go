package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
)

// unwritten counts the entries of a sendQueue that are not written yet, the one
// that is being written among them.
type unwritten = atomic.Int32

// sendNow writes a short packet, unless others wait to be written before it,
// and reports whether it did. Only the goroutine that fills the queue calls it,
// so that nothing is written meanwhile.
func (h *sendQueue) sendNow(p *packetBuffer, gsoSize uint16, ecn protocol.ECN) bool {
	if p.Len() > protocol.MaxPacketBufferSize || h.unwritten.Load() > 0 ||
		h.conn.Write(p.Data, gsoSize, ecn) != nil {
		return false
	}
	p.Release()
	return true
}
