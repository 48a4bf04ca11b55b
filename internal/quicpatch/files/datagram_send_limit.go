package quic

import "github.com/quic-go/quic-go/internal/protocol"

// minDatagramSendQueueLen keeps packets at hand for what the pacer lets go at
// once.
const minDatagramSendQueueLen = 8

// datagramSendLimit is how many datagrams may wait to be packed. Under
// congestion control they wait for most of the time, so it is an eighth of what
// the window lets be under way, which costs an eighth of a round trip.
func (c *Conn) datagramSendLimit() int {
	if on := c.congestionSwitch(); on != nil && !on.Load() {
		return maxDatagramSendQueueLen
	}
	packets := c.connStats.CongestionWindow.Load() / protocol.InitialPacketSize
	return int(min(max(packets/8, minDatagramSendQueueLen), maxDatagramSendQueueLen))
}
