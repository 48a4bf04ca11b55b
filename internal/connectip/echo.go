package connectip

import (
	"context"
	"crypto/rand"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

const (
	// probeInterval is the time between two rounds of Probe.
	probeInterval = 200 * time.Millisecond

	// echoHeaders is the length in bytes of an IPv6 header and an ICMPv6 echo
	// header.
	echoHeaders = 40 + 8

	// probeData is the number of data bytes with which an ICMPv6 echo request
	// has 1280 bytes, the minimum link MTU of IPv6 (RFC 9484 section 7.2).
	probeData = MinIPv6MTU - echoHeaders

	// replyRate is the maximum number of echo replies per second.
	replyRate = 100

	// keepAliveSeq is the sequence number of echo requests whose replies nobody
	// waits for.
	keepAliveSeq = 0
)

// allNodes is the link-local all-nodes multicast address (RFC 4291 section
// 2.7.1).
var allNodes = netip.MustParseAddr("ff02::1")

// echo sends and answers ICMPv6 echo requests on the link itself, which never
// reach a device. They tell whether the link works and how large its packets
// may be.
type echo struct {
	addr       netip.Addr // link-local address of this endpoint
	id         uint16     // identifier of this endpoint's echo requests
	replyLimit *rate.Limiter
	answered   atomic.Bool // the peer has answered an echo request

	// replies contains the sequence numbers of received replies, for
	// mtuWatcher. When it is full, further ones are dropped.
	replies chan uint16

	// seq is the last sequence number that mtuWatcher used. Only its goroutine
	// accesses it.
	seq uint16
}

func newEcho() *echo {
	var b [16]byte
	copy(b[:], []byte{0xfe, 0x80})
	rand.Read(b[8:])
	return &echo{
		addr:       netip.AddrFrom16(b),
		id:         uint16(b[14])<<8 | uint16(b[15]),
		replyLimit: rate.NewLimiter(replyRate, replyRate),
		seq:        1 << 15, // Probe uses the numbers below
		replies:    make(chan uint16, 8),
	}
}

// Probe tests whether the tunnel carries packets, until FirstPacket is closed
// or ctx ends. In each round it sends two kinds of ICMP echo requests: to all
// nodes of the link, which a peer of this project answers itself, and from each
// address of this endpoint to a destination behind the peer with hop limit 1,
// which any peer's IP stack answers with an ICMP error. Neither goes beyond the
// peer.
func (c *Conn) Probe(ctx context.Context) {
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for seq := uint16(1); ; seq++ {
		c.sendProbes(seq)
		select {
		case <-ctx.Done():
			return
		case <-c.firstPacket:
			return
		case <-tick.C:
		}
	}
}

// KeepAlive calls Ping at every interval until ctx ends. QUIC's own keep-alive
// packets are not enough: they are so short that a restarted peer, which does
// not know the connection, need not answer them with a stateless reset (RFC
// 9000 section 10.3.3). An idle endpoint would not learn of the restart.
func (c *Conn) KeepAlive(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.Ping()
		}
	}
}

// Ping sends an echo request to the peer. QUIC acknowledges it even if the peer
// does not answer. Like Send, Ping may block.
func (c *Conn) Ping() { c.sendLinkEcho(keepAliveSeq, nil) }

func (c *Conn) sendProbes(seq uint16) {
	var data [probeData]byte
	size := max(0, min(probeData, int(c.quicMTU.Load())-echoHeaders))
	c.sendLinkEcho(seq, data[:size])

	pol := c.policy.Load()
	for _, src := range pol.self {
		if dst, ok := pol.sendTo.probeTarget(src.Is4()); ok {
			c.sendEcho(src, dst, 1, seq, nil)
		}
	}
}

// sendLinkEcho sends an echo request to all nodes of the link.
func (c *Conn) sendLinkEcho(seq uint16, data []byte) {
	c.sendEcho(c.echo.addr, allNodes, 255, seq, data)
}

func (c *Conn) sendEcho(src, dst netip.Addr, hopLimit uint8, seq uint16, data []byte) {
	buf := make([]byte, tun.Headroom, tun.Headroom+echoHeaders+len(data))
	buf = ippacket.AppendEcho(buf, src, dst, hopLimit, true, c.echo.id, seq, data)
	_ = c.datagrams.send(buf, tun.Headroom) // an echo request may get lost
}

// handleLinkLocal answers echo requests of the peer and notes replies to those
// of this endpoint. It reports whether pkt was one of them. pkt is not
// retained.
func (c *Conn) handleLinkLocal(pkt []byte, p ippacket.Packet) bool {
	request, id, seq, data, ok := ippacket.ParseEcho(pkt, p)
	switch {
	case !ok || !p.Src.IsLinkLocalUnicast():
		return false
	case request && (p.Dst == allNodes || p.Dst == c.echo.addr):
		if c.echo.replyLimit.Allow() {
			buf := make([]byte, tun.Headroom, tun.Headroom+echoHeaders+len(data))
			c.answer(ippacket.AppendEcho(buf, c.echo.addr, p.Src, 255, false, id, seq, data))
		}
		return true
	case !request && p.Dst == c.echo.addr && id == c.echo.id:
		c.noteReceived()
		c.echo.answered.Store(true)
		if seq == keepAliveSeq {
			return true
		}
		select {
		case c.echo.replies <- seq:
		default:
		}
		return true
	}
	return false
}
