package client

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

const (
	protocolUDP = 17 // IANA protocol number

	// maxOuter limits how many of the newest outer sockets are remembered. A
	// dial of several servers opens many.
	maxOuter = 32

	// loopNoticeTime is how long the status shows the notice of a loop after
	// the last packet that came back.
	loopNoticeTime = time.Minute
)

// outerSocket identifies a UDP socket that carries the tunnel's packets, or may
// soon do so.
type outerSocket struct {
	port  uint16 // local port
	proxy netip.AddrPort
}

// outerSockets remembers the newest outer sockets. The zero value is empty. Its
// methods may be called concurrently.
type outerSockets struct{ list atomic.Pointer[[]outerSocket] }

// add remembers the socket from local to proxy.
func (o *outerSockets) add(local net.Addr, proxy netip.AddrPort) {
	a, ok := local.(*net.UDPAddr)
	if !ok {
		return
	}
	socket := outerSocket{uint16(a.Port), netip.AddrPortFrom(proxy.Addr().Unmap(), proxy.Port())}
	for {
		old := o.list.Load()
		var next []outerSocket
		if old != nil {
			next = slices.Clone((*old)[max(0, len(*old)-maxOuter+1):])
		}
		next = append(next, socket)
		if o.list.CompareAndSwap(old, &next) {
			return
		}
	}
}

// sent reports whether one of the sockets sent the IP packet.
func (o *outerSockets) sent(pkt []byte) bool {
	list := o.list.Load()
	dst, ok := ippacket.Destination(pkt)
	if list == nil || !ok {
		return false
	}
	protocol, header := pkt[6], 40
	if dst.Is4() {
		protocol, header = pkt[9], int(pkt[0]&0xf)*4
	}
	if protocol != protocolUDP || len(pkt) < header+4 {
		return false
	}
	source, destination := binary.BigEndian.Uint16(pkt[header:]),
		binary.BigEndian.Uint16(pkt[header+2:])
	return slices.Contains(*list, outerSocket{source, netip.AddrPortFrom(dst, destination)})
}

// noticeLoop is the key of the notice that the host routes packets of the outer
// socket into the tunnel.
const noticeLoop = "loop"

// dropLoops drops the packets that an outer socket sent, because they would
// loop through the tunnel. If there are any, it queues the other packets,
// clears the slice and returns true. Otherwise it does nothing.
func (c *Client) dropLoops(packets []*flowqueue.Packet) bool {
	outer := func(p *flowqueue.Packet) bool { return c.dialer.outer.sent(p.Bytes()[tun.Headroom:]) }
	if !slices.ContainsFunc(packets, outer) {
		return false
	}
	c.noteLoop()
	var kept []*flowqueue.Packet
	for _, p := range packets {
		if outer(p) {
			c.stats.Send.Drop(connectip.DropDestination)
			p.Free()
		} else {
			kept = append(kept, p)
		}
	}
	c.stats.Send.DropMany(connectip.DropQueueFull, c.queue.Push(kept))
	clear(packets)
	return true
}

// noteLoop degrades the tunnel until no packet has come back for
// loopNoticeTime.
func (c *Client) noteLoop() {
	c.mu.Lock()
	timer := c.loopTimer
	if timer != nil && timer.Reset(loopNoticeTime) {
		c.mu.Unlock()
		return
	}
	c.loopTimer = time.AfterFunc(loopNoticeTime, func() { c.degrade(noticeLoop, "") })
	c.mu.Unlock()
	text := fmt.Sprintf("packets of the tunnel's own socket are sent into the tunnel, because "+
		"another program removes their mark: "+
		"have it leave the bits %#x alone, or name others in routes.mark", c.cfg.Mark)
	c.cfg.Logger.Warn(text)
	c.degrade(noticeLoop, text)
}
