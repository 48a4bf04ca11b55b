package connectip

import (
	"golang.org/x/time/rate"

	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// The limits of ICMP errors per direction, per second and in a burst. Packet
// Too Big has a limit of its own, because path MTU discovery depends on it (RFC
// 4443 section 2.4 f).
const (
	errorRate  = 10
	errorBurst = 10
)

// errorLimits contains the token buckets of one direction.
type errorLimits struct{ other, tooBig *rate.Limiter }

func newErrorLimits() errorLimits {
	return errorLimits{other: rate.NewLimiter(errorRate, errorBurst),
		tooBig: rate.NewLimiter(errorRate, errorBurst)}
}

func (l errorLimits) bucket(kind ippacket.ICMPError) *rate.Limiter {
	if kind == ippacket.TooBig {
		return l.tooBig
	}
	return l.other
}

// maxICMPError is the maximum length of an ICMP error in bytes (RFC 4443
// section 2.4 c).
const maxICMPError = 1280

// icmpError returns an ICMP error about pkt, with tun.Headroom free bytes in
// front of it, or nil if none may be sent. The buffer is new, and pkt is not
// retained.
func (c *Conn) icmpError(limits errorLimits, pkt []byte, p ippacket.Packet, kind ippacket.ICMPError,
	mtu int) []byte {
	limit := limits.bucket(kind)
	if limit.Tokens() < 1 { // a flood of such packets must not allocate memory
		c.cfg.Stats.ICMPSuppressed.Add(1)
		return nil
	}
	src := c.policy.Load().selfFor(p.Src)
	if p.Version == 6 && !src.IsValid() {
		src = c.echo.addr
	}
	buf := make([]byte, tun.Headroom, tun.Headroom+maxICMPError)
	buf, ok := ippacket.AppendICMPError(buf, pkt, p, kind, src, mtu)
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

// answerHost sends the host an ICMP error about a packet from the device.
func (c *Conn) answerHost(pkt []byte, p ippacket.Packet, kind ippacket.ICMPError, mtu int) {
	if buf := c.icmpError(c.hostErrors, pkt, p, kind, mtu); buf != nil {
		_, _ = c.cfg.Device.Write([][]byte{buf}, tun.Headroom) // an ICMP error may get lost
	}
}

// answerPeer sends an ICMP error about a packet from the peer through the
// tunnel. The host's routing table could deliver it to someone else.
func (c *Conn) answerPeer(pkt []byte, p ippacket.Packet, kind ippacket.ICMPError) {
	if buf := c.icmpError(c.peerErrors, pkt, p, kind, 0); buf != nil {
		c.answer(buf)
	}
}

// answer queues a packet for the peer, with tun.Headroom free bytes in front of
// it, or drops it if the queue is full. It does not block, because it may be
// called by the goroutine that runs the QUIC connection. The caller must not
// use buf afterwards.
func (c *Conn) answer(buf []byte) {
	select {
	case c.answerQueue <- buf:
		c.answerSender.Wake()
	default:
		c.cfg.Stats.Send.Drop(DropQueueFull)
	}
}

// sendAnswers sends the packets in answerQueue.
func (c *Conn) sendAnswers() {
	for {
		select {
		case buf := <-c.answerQueue:
			_ = c.datagrams.send(buf, tun.Headroom)
		default:
			return
		}
	}
}
