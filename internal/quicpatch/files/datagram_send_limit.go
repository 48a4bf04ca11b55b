package quic

import "github.com/quic-go/quic-go/internal/protocol"

// minDatagramSendQueueLen is enough for a burst that the pacer allows.
const minDatagramSendQueueLen = 8

// datagramSendLimit returns the number of datagrams that may be queued to be
// packed. Under congestion control the queue is full most of the time. The
// limit is an eighth of the congestion window, so the queue adds an eighth of a
// round trip.
func (c *Conn) datagramSendLimit() int {
	if on := c.congestionSwitch(); on != nil && !on.Load() {
		return maxDatagramSendQueueLen
	}
	packets := c.connStats.CongestionWindow.Load() / protocol.InitialPacketSize
	return int(min(max(packets/8, minDatagramSendQueueLen), maxDatagramSendQueueLen))
}
