package connectip

import (
	"golang.org/x/time/rate"

	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// ICMP errors per second and in a burst, for each direction; Packet Too Big has
// an allowance of its own, because path MTU discovery depends on it (RFC 4443
// section 2.4 f).
const (
	errorRate  = 10
	errorBurst = 10
)

// errorLimits are the token buckets of one direction.
type errorLimits struct{ other, tooBig *rate.Limiter }

func newErrorLimits() errorLimits {
	return errorLimits{other: rate.NewLimiter(errorRate, errorBurst),
		tooBig: rate.NewLimiter(errorRate, errorBurst)}
}

func (l errorLimits) of(kind ippacket.ICMPError) *rate.Limiter {
	if kind == ippacket.TooBig {
		return l.tooBig
	}
	return l.other
}

// maxICMPError is the size of the largest ICMP error that is made, in bytes
// (RFC 4443 section 2.4 c).
const maxICMPError = 1280

// icmpError makes the ICMP error about pkt behind tun.Headroom free bytes, or
// returns nil when none may be sent.
func (c *Conn) icmpError(limits errorLimits, pkt []byte, p ippacket.Packet, kind ippacket.ICMPError,
	mtu int) []byte {
	limit := limits.of(kind)
	if limit.Tokens() < 1 { // so that a flood of what deserves an error costs no memory
		c.cfg.Stats.ICMPSuppressed.Add(1)
		return nil
	}
	src := c.policy.Load().selfFor(p.Src)
	if p.Version == 6 && !src.IsValid() {
		src = c.echo.addr
	}
	buf, ok := ippacket.AppendICMPError(make([]byte, tun.Headroom, tun.Headroom+maxICMPError), pkt,
		p, kind,
		src, mtu)
	if !ok {
		return nil
	}
	if !limit.Allow() {
		c.cfg.Stats.ICMPSuppressed.Add(1)
		return nil
	}
	c.cfg.Stats.ICMPSent.Count(kind)
	return buf
}

// answerHost answers a packet that came from the device, through the device.
func (c *Conn) answerHost(pkt []byte, p ippacket.Packet, kind ippacket.ICMPError, mtu int) {
	if buf := c.icmpError(c.toHost, pkt, p, kind, mtu); buf != nil {
		_, _ = c.cfg.Device.Write([][]byte{buf}, tun.Headroom) // an ICMP error may get lost
	}
}

// answerPeer answers a packet that came from the peer, into the tunnel: never
// through the routing table, which might send it to somebody else.
func (c *Conn) answerPeer(pkt []byte, p ippacket.Packet, kind ippacket.ICMPError) {
	if buf := c.icmpError(c.toPeer, pkt, p, kind, 0); buf != nil {
		c.answer(buf)
	}
}

// answer queues a packet for the peer, behind free bytes, and drops it
// when many wait: those who answer the peer's packets must not wait for QUIC,
// which may be what calls them.
func (c *Conn) answer(buf []byte) {
	select {
	case c.toSend <- buf:
		c.sender.Wake()
	default:
		c.cfg.Stats.Send.Drop(DropQueueFull)
	}
}

// sendAnswers sends what answer queued.
func (c *Conn) sendAnswers() {
	for {
		select {
		case buf := <-c.toSend:
			_ = c.datagrams.send(buf, tun.Headroom)
		default:
			return
		}
	}
}
