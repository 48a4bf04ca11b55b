package quic

import (
	"errors"
	"time"

	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// SendDatagramNow queues a datagram like SendDatagram but does not block. It
// returns false if the queue is full.
func (c *Conn) SendDatagramNow(p []byte) (queued bool, _ error) {
	if !c.supportsDatagrams() {
		return false, errors.New("datagram support disabled")
	}
	f := &wire.DatagramFrame{DataLenPresent: true}
	limit := min(
		f.MaxDataLen(c.peerParams.MaxDatagramFrameSize, c.version),
		protocol.ByteCount(c.maxPayloadSizeEstimate.Load()),
	)
	if protocol.ByteCount(len(p)) > limit {
		return false, &DatagramTooLargeError{MaxDatagramPayloadSize: int64(limit)}
	}
	return c.datagramQueue.addNow(f, p)
}

// addNow queues f with a copy of p as its data. It returns false if the queue
// is full.
func (h *datagramQueue) addNow(f *wire.DatagramFrame, p []byte) (queued bool, _ error) {
	select {
	case <-h.closed:
		return false, h.closeErr
	default:
	}
	h.sendMx.Lock()
	if h.sendQueue.Len() >= h.limit() {
		h.sendMx.Unlock()
		return false, nil
	}
	f.Data = getDatagramBuffer(len(p))
	copy(f.Data, p)
	h.sendQueue.PushBack(f)
	h.sendMx.Unlock()
	h.hasData()
	return true, nil
}

// OldestReceived returns the age of the oldest received packet in the queue, or
// 0 if the queue is empty.
func (c *Conn) OldestReceived() time.Duration {
	c.receivedPacketMx.Lock()
	defer c.receivedPacketMx.Unlock()
	if c.receivedPackets.Empty() {
		return 0
	}
	return monotime.Since(c.receivedPackets.PeekFront().rcvTime)
}

// DatagramsWaiting reports whether datagrams are queued to be packed. If it
// returns false, SendDatagram does not block.
func (c *Conn) DatagramsWaiting() bool {
	h := c.datagramQueue
	h.sendMx.Lock()
	defer h.sendMx.Unlock()
	return !h.sendQueue.Empty()
}
