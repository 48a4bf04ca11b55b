package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// Limits of a connection with Config.AwaitAdmission until Admit is called.
const (
	maxPendingPackets   = 16 // received packets in the queue
	maxPendingDatagrams = 32 // datagrams without a handler, in total
)

// admission is the state of the limits of a connection.
type admission struct {
	done atomic.Bool // Admit was called

	// datagrams counts received datagrams without a handler. Only the
	// connection's goroutine uses it.
	datagrams int
}

// Admit lifts the limits of a connection with Config.AwaitAdmission and allows
// the peer that many open bidirectional streams.
func (c *Conn) Admit(streams int) {
	c.admission.done.Store(true)
	c.streamsMap.incomingBidiStreams.raise(uint64(streams))
}

// pending reports whether the limits apply.
func (c *Conn) pending() bool { return c.config.AwaitAdmission && !c.admission.done.Load() }

// maxPackets returns the length limit of the queue of received packets.
func (c *Conn) maxPackets() int {
	if c.pending() {
		return maxPendingPackets
	}
	return protocol.MaxConnUnprocessedPackets
}

// mayQueueDatagram counts a datagram without a handler and reports whether to
// queue it.
func (c *Conn) mayQueueDatagram() bool {
	if !c.pending() {
		return true
	}
	c.admission.datagrams++
	return c.admission.datagrams <= maxPendingDatagrams
}

// raise raises the number of streams that the peer may open to n. It never
// lowers the number.
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
