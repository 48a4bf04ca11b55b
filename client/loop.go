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
	protocolUDP = 17
	// maxOuter is how many of the newest outer sockets are known.
	maxOuter = 8
	// loopMemory is for how long after the last packet that came back the
	// status says so.
	loopMemory = time.Minute
)

// outerSocket is the two ends of a socket that carries the tunnel, or is to.
type outerSocket struct {
	port  uint16 // this host's port
	proxy netip.AddrPort
}

// outerSockets are the newest sockets to the proxy.
type outerSockets struct{ list atomic.Pointer[[]outerSocket] }

// add notes a socket.
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

// sent reports whether an IP packet is of one of the sockets.
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

const noticeLoop = "loop" // packets of the outer socket come out of the tunnel's interface

// dropLoops reports whether there are packets of the outer socket among those
// that the host sends into the tunnel: they would go round and round. Then it
// drops them, and takes the others.
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

// noteLoop says why the tunnel does not work, until nothing has come back for a
// while.
func (c *Client) noteLoop() {
	c.mu.Lock()
	timer := c.loopTimer
	if timer != nil && timer.Reset(loopMemory) {
		c.mu.Unlock()
		return
	}
	c.loopTimer = time.AfterFunc(loopMemory, func() { c.degrade(noticeLoop, "") })
	c.mu.Unlock()
	text := fmt.Sprintf("packets of the tunnel's own socket are sent into the tunnel, because another program takes their mark away: "+
		"have it leave the bits %#x alone, or name others in routes.mark", c.cfg.Mark)
	c.cfg.Logger.Warn(text)
	c.degrade(noticeLoop, text)
}
