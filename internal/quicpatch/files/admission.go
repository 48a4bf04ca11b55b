package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// What a connection with Config.AwaitAdmission takes from a peer until Admit is
// called.
const (
	maxPendingPackets   = 16 // that wait to be processed
	maxPendingDatagrams = 32 // in all that have no handler
)

// admission is whether a peer was admitted.
type admission struct {
	done      atomic.Bool
	datagrams int // received without a handler; the connection's goroutine alone uses it
}

// Admit lifts the limits on a connection with Config.AwaitAdmission, and lets
// the peer have that many bidirectional streams open.
func (c *Conn) Admit(streams int) {
	c.admission.done.Store(true)
	c.streamsMap.incomingBidiStreams.raise(uint64(streams))
}

// pending reports whether the peer has to be admitted still.
func (c *Conn) pending() bool { return c.config.AwaitAdmission && !c.admission.done.Load() }

// maxPackets is how many packets may wait to be processed.
func (c *Conn) maxPackets() int {
	if c.pending() {
		return maxPendingPackets
	}
	return protocol.MaxConnUnprocessedPackets
}

// mayQueueDatagram reports whether one more datagram without a handler is kept.
func (c *Conn) mayQueueDatagram() bool {
	if !c.pending() {
		return true
	}
	c.admission.datagrams++
	return c.admission.datagrams <= maxPendingDatagrams
}

// raise lets the peer have n streams open, if it may have fewer now.
func (m *incomingStreamsMap[T]) raise(n uint64) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if n <= m.maxNumStreams {
		return
	}
	m.maxNumStreams = n
	m.maxStream = m.nextStreamToOpen + 4*protocol.StreamID(n-uint64(len(m.streams))-1)
	m.queueMaxStreamID(&wire.MaxStreamsFrame{Type: m.streamType,
		MaxStreamNum: m.maxStream.StreamNum()})
}
