package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
)

// unwritten counts the entries of a sendQueue that are not yet written,
// including the one being written.
type unwritten = atomic.Int32

// sendNow writes a short packet if the queue is empty, and reports whether it
// did. Only the goroutine that fills the queue may call it, so that the queue
// stays empty during the write.
func (h *sendQueue) sendNow(p *packetBuffer, gsoSize uint16, ecn protocol.ECN) bool {
	if p.Len() > protocol.MaxPacketBufferSize || h.unwritten.Load() > 0 ||
		h.conn.Write(p.Data, gsoSize, ecn) != nil {
		return false
	}
	p.Release()
	return true
}
