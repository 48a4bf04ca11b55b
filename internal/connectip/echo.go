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
	probeInterval = 200 * time.Millisecond
	// With probeData bytes of data, an ICMPv6 echo fills the smallest link that
	// may carry IPv6 (RFC 9484 section 7.2).
	probeData = 1232
	// answerRate is how many echo requests on the link are answered in a
	// second.
	answerRate = 100
	// keepAliveSeq is the sequence number of echoes whose answer nobody waits
	// for.
	keepAliveSeq = 0
)

var allNodes = netip.MustParseAddr("ff02::1")

// echo is what a Conn needs to ask whether the link works, and to answer when
// the peer asks.
type echo struct {
	addr     netip.Addr // our link-local address
	id       uint16
	answers  *rate.Limiter
	answered atomic.Bool // the peer answers echoes on the link

	// What follows belongs to linkWatch.
	seq     uint16
	replies chan uint16 // sequence numbers of answers; full: dropped
}

func newEcho() *echo {
	var b [16]byte
	copy(b[:], []byte{0xfe, 0x80})
	rand.Read(b[8:])
	return &echo{
		addr:    netip.AddrFrom16(b),
		id:      uint16(b[14])<<8 | uint16(b[15]),
		answers: rate.NewLimiter(answerRate, answerRate),
		seq:     1 << 15, // apart from those of Probe
		replies: make(chan uint16, 8),
	}
}

// Probe asks for a sign of life until FirstPacket or ctx ends: an ICMPv6 echo
// to all nodes of the link, which a peer like this one answers itself, and an
// echo from one of our addresses that expires at the peer's end of the tunnel,
// which any peer's IP stack answers. Neither goes beyond the peer.
func (c *Conn) Probe(ctx context.Context) {
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for seq := uint16(1); ; seq++ {
		c.sendProbes(seq)
		select {
		case <-ctx.Done():
			return
		case <-c.firstIn:
			return
		case <-tick.C:
		}
	}
}

// KeepAlive sends an echo to the peer at every interval until ctx ends. It is
// larger than the packets by which QUIC keeps a connection alive: to those a
// peer that has forgotten the connection need not answer with a stateless reset
// (RFC 9000 section 10.3.3), and an endpoint with nothing to send would not
// learn of the peer's restart.
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

// Ping sends an echo to the peer, which QUIC acknowledges even if the peer does
// not answer it. Like Send it may block.
func (c *Conn) Ping() { c.sendEcho(c.echo.addr, allNodes, 255, true, keepAliveSeq, nil) }

func (c *Conn) sendProbes(seq uint16) {
	var data [probeData]byte
	size := max(0, min(probeData, int(c.quicMTU.Load())-48))
	c.sendEcho(c.echo.addr, allNodes, 255, true, seq, data[:size])

	pol := c.policy.Load()
	for _, src := range pol.self {
		if dst, ok := pol.sendTo.some(src.Is4()); ok {
			c.sendEcho(src, dst, 1, true, seq, nil)
		}
	}
}

func (c *Conn) sendEcho(src, dst netip.Addr, hopLimit uint8, request bool, seq uint16,
	data []byte) {
	buf := make([]byte, tun.Headroom, tun.Headroom+48+len(data))
	buf = ippacket.AppendEcho(buf, src, dst, hopLimit, request, c.echo.id, seq, data)
	_ = c.datagrams.send(buf, tun.Headroom) // an echo may get lost
}

// handleLinkLocal takes echo requests to all nodes and answers to our own;
// anything else on the link is not for us.
func (c *Conn) handleLinkLocal(pkt []byte, p ippacket.Packet) bool {
	request, id, seq, data, ok := ippacket.ParseEcho(pkt, p)
	switch {
	case !ok || !p.Src.IsLinkLocalUnicast():
		return false
	case request && (p.Dst == allNodes || p.Dst == c.echo.addr):
		if c.echo.answers.Allow() {
			c.answer(ippacket.AppendEcho(make([]byte, tun.Headroom, tun.Headroom+48+len(data)),
				c.echo.addr,
				p.Src, 255, false, id, seq, data))
		}
		return true
	case !request && p.Dst == c.echo.addr && id == c.echo.id:
		c.notePacket()
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
