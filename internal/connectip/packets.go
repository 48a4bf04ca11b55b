package connectip

import (
	"errors"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/internal/ippacket"
	"masquevpn/internal/rescue"
	"masquevpn/tun"
)

// Send sends the IP packet buf[off:] to the peer, or drops it and says why. Up
// to tun.Headroom bytes before it are overwritten, and its hop limit is
// decremented when it is forwarded; the buffer stays the caller's. Send blocks
// while QUIC's queue is full. What a router would answer with an ICMP error is
// answered through the device.
//
// A panic ends c alone: callers serve more than one peer.
func (c *Conn) Send(buf []byte, off int) Drop { return c.sendBy((*datagrams).send, buf, off) }

// TrySend is Send for those who serve other peers as well: it drops the packet
// where Send would block.
func (c *Conn) TrySend(buf []byte, off int) Drop { return c.sendBy((*datagrams).trySend, buf, off) }

// sendFunc is one of the ways to send of datagrams.
type sendFunc func(d *datagrams, buf []byte, off int) error

func (c *Conn) sendBy(send sendFunc, buf []byte, off int) (d Drop) {
	defer rescue.Catch(func(e *rescue.Error) {
		d = DropClosed
		c.cfg.Stats.Send.Drop(d)
		c.panicked(e)
	})
	d = c.forward(send, buf, off)
	if d == DropNone {
		c.cfg.Stats.Send.Add(len(buf) - off)
	} else {
		c.cfg.Stats.Send.Drop(d)
	}
	return d
}

// Ready reports whether Send would not wait. Builds without the edits to
// quic-go cannot tell.
func (c *Conn) Ready() bool { return c.datagrams.ready() }

func (c *Conn) forward(send sendFunc, buf []byte, off int) Drop {
	pkt := buf[off:]
	p, err := ippacket.Parse(pkt)
	if err != nil {
		if errors.Is(err, ippacket.ErrHeaderChain) {
			c.answerHost(pkt, p, ippacket.HeaderChain, 0)
		}
		return DropMalformed
	}
	if ippacket.IsLinkLocal(p.Src) || ippacket.IsLinkLocal(p.Dst) {
		if beyondScope(p) {
			c.answerHost(pkt, p, ippacket.BeyondScope, 0)
		}
		return DropLinkLocal // RFC 9484 section 7.2; kernels send router solicitations and the like
	}
	pol := c.policy.Load()
	if from := pol.sendFrom.judge(p.Src, p.Protocol); from != allowed && !pol.isSelf(p.Src) &&
		!pol.quotesReceived(pkt, p) {
		kind, drop := from.asSource()
		if !pol.selfFor(p.Src).IsValid() { // a tunnel without this family: no source would do
			kind = ippacket.NoRoute
		}
		c.answerHost(pkt, p, kind, 0)
		return drop
	}
	if to := pol.sendTo.judge(p.Dst, p.Protocol); to != allowed {
		c.answerHost(pkt, p, to.asDestination(), 0)
		return DropDestination
	}
	if q, ok := ippacket.Quoted(pkt, p); ok && q.Src != p.Dst {
		return DropSource // an ICMP error goes to whom it is about (RFC 9484 section 11)
	}
	if pol.own != nil && pol.own.Contains(p.Dst) { // it would come back
		c.answerHost(pkt, p, ippacket.NoRoute, 0)
		return DropDestination
	}
	mtu := c.MTU()
	if !carriesIPv6(p, mtu) {
		c.answerHost(pkt, p, ippacket.NoRoute, 0)
		return DropTooBig
	}
	// A packet of this very host is sent, not forwarded (RFC 9484 section 7.2).
	decrement := !c.cfg.KernelHopLimit && !pol.isSelf(p.Src)
	if decrement && p.HopLimit <= 1 {
		c.answerHost(pkt, p, ippacket.HopLimitExceeded, 0)
		return DropHopLimit
	}
	if len(pkt) > mtu {
		return c.sendTooBig(send, pkt, p, mtu, decrement)
	}
	if decrement {
		ippacket.DecrementHopLimit(pkt)
	}
	ippacket.ClampMSS(pkt, p, mtu)
	if c.closed.Load() {
		return DropClosed
	}
	if len(pkt) > largePacket && !c.sentLarge.Load() {
		c.sentLarge.Store(true)
	}
	if err := send(&c.datagrams, buf, off); err != nil {
		var tooLarge *quic.DatagramTooLargeError
		if errors.As(err, &tooLarge) { // the limit shrank since it was looked at
			c.updateMTU()
			return c.sendTooBig(send, pkt, p, c.MTU(), false)
		}
		return notSent(err)
	}
	return DropNone
}

// notSent is why a packet was dropped that QUIC did not take.
func notSent(err error) Drop {
	if err == errNoRoom {
		return DropQueueFull
	}
	return DropClosed
}

// sendTooBig does what a router does with a packet that the link does not
// carry: fragment it where IPv4 allows, otherwise tell the sender what the link
// does carry (RFC 9484 section 10.1).
func (c *Conn) sendTooBig(send sendFunc, pkt []byte, p ippacket.Packet, mtu int,
	decrement bool) Drop {
	if p.Version == 6 || p.DontFragment {
		c.answerHost(pkt, p, ippacket.TooBig, mtu)
		return DropTooBig
	}
	if decrement {
		ippacket.DecrementHopLimit(pkt)
	}
	drop := DropNone
	buf := make([]byte, tun.Headroom+mtu)
	err := ippacket.Fragment(buf[tun.Headroom:], pkt, p, mtu, func(fragment []byte) {
		if err := send(&c.datagrams, buf[:tun.Headroom+len(fragment)], tun.Headroom); err != nil {
			drop = notSent(err)
		}
	})
	if err != nil {
		return DropTooBig
	}
	return drop
}

// sink takes packets on their way to the device.
type sink interface {
	// push takes a packet, of which it makes a copy. It returns false when
	// nobody will take the packet any more.
	push(pkt []byte) bool
}

// handleDatagram takes one HTTP Datagram, context ID first (RFC 9484 section
// 6), which it may change but does not keep. It must not wait for QUIC.
func (c *Conn) handleDatagram(b []byte, to sink) {
	context, n, err := quicvarint.Parse(b)
	if err != nil || context != contextIPPacket {
		c.cfg.Stats.Receive.Drop(DropUnknownContext)
		return
	}
	pkt := b[n:]
	d := c.admit(pkt)
	if d == DropNone && !to.push(pkt) {
		d = DropClosed
	}
	switch d {
	case DropNone:
		c.cfg.Stats.Receive.Add(len(pkt))
		c.cfg.Tap.Packet(pkt)
	case consumed:
		c.cfg.Tap.Packet(pkt)
	default:
		c.cfg.Stats.Receive.Drop(d)
	}
}

// asSource is how a packet is answered and counted whose source got the verdict
// v, which is not allowed.
func (v verdict) asSource() (ippacket.ICMPError, Drop) {
	if v == forbidden { // the address is right, the protocol is not in the scope
		return ippacket.Prohibited, DropDestination
	}
	return ippacket.SourceNotAssigned, DropSource
}

// asDestination is asSource for the destination.
func (v verdict) asDestination() ippacket.ICMPError {
	if v == forbidden {
		return ippacket.Prohibited
	}
	return ippacket.NoRoute
}

// consumed stands for a packet that this endpoint itself took, such as an echo
// on the link.
const consumed = numDrops

// admit decides whether a packet of the peer may go to the host. What may not
// is answered into the tunnel, as a router would.
func (c *Conn) admit(pkt []byte) Drop {
	p, err := ippacket.Parse(pkt)
	if err != nil {
		if errors.Is(err, ippacket.ErrHeaderChain) &&
			c.policy.Load().recvFrom.covered.Contains(p.Src) {
			c.answerPeer(pkt, p, ippacket.HeaderChain)
		}
		return DropMalformed
	}
	if ippacket.IsLinkLocal(p.Src) || ippacket.IsLinkLocal(p.Dst) {
		if c.handleLinkLocal(pkt, p) {
			return consumed
		}
		if beyondScope(p) {
			c.answerPeer(pkt, p, ippacket.BeyondScope)
		}
		return DropLinkLocal
	}
	pol := c.policy.Load()
	if pol.isSelf(p.Src) {
		c.answerPeer(pkt, p, ippacket.SourceNotAssigned)
		return DropSource
	}
	if from := pol.recvFrom.judge(p.Src, p.Protocol); from != allowed &&
		(c.cfg.PeerIsHost || !pol.quotesSent(pkt, p)) {
		kind, drop := from.asSource()
		c.answerPeer(pkt, p, kind)
		return drop
	}
	if to := pol.recvTo.judge(p.Dst, p.Protocol); to != allowed {
		c.answerPeer(pkt, p, to.asDestination())
		return DropDestination
	}
	ippacket.ClampMSS(pkt, p, c.MTU()) // what the host answers with comes back this way
	c.notePacket()
	return DropNone
}

// beyondScope reports whether p, with a link-local address, is from one to a
// destination beyond the link.
func beyondScope(p ippacket.Packet) bool {
	return p.Src.IsLinkLocalUnicast() && !ippacket.IsLinkLocal(p.Dst)
}

// quotesSent reports whether pkt is an ICMP error, from any router, about a
// packet that could have left through this tunnel (RFC 9484 section 7.2.1).
func (pol *policy) quotesSent(pkt []byte, p ippacket.Packet) bool {
	q, ok := ippacket.Quoted(pkt, p)
	return ok && q.Src == p.Dst && (pol.sendFrom.allow(q.Src, q.Protocol) || pol.isSelf(q.Src)) &&
		pol.sendTo.allow(q.Dst, q.Protocol)
}

// quotesReceived is quotesSent for an ICMP error on its way to the peer: the
// packet it quotes came, or could have come, from this very peer. With an
// external address shared by several peers this is what keeps errors apart
// (section 11).
func (pol *policy) quotesReceived(pkt []byte, p ippacket.Packet) bool {
	q, ok := ippacket.Quoted(pkt, p)
	return ok && q.Src == p.Dst && pol.recvFrom.allow(q.Src, q.Protocol) &&
		pol.recvTo.allow(q.Dst, q.Protocol)
}

// notePacket remembers that the tunnel carries packets.
func (c *Conn) notePacket() {
	if !c.sawPacket.Load() && c.sawPacket.CompareAndSwap(false, true) {
		close(c.firstIn)
	}
}
