package connectip

import (
	"errors"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/internal/ippacket"
	"masquevpn/internal/rescue"
	"masquevpn/tun"
)

// Send sends the IP packet buf[off:] to the peer, or drops it and returns the
// reason. It blocks while QUIC's queue is full. Where a router would send an
// ICMP error, Send writes one to the device.
//
// off is at least tun.Headroom. Send overwrites up to tun.Headroom bytes in
// front of the packet, and may modify the packet. It does not retain buf: the
// caller may reuse it after the call.
//
// A panic in Send ends only c, because the caller may serve other peers.
func (c *Conn) Send(buf []byte, off int) Drop { return c.sendWith((*datagrams).send, buf, off) }

// TrySend is like Send, but drops the packet instead of blocking. Goroutines
// that serve several peers use it.
func (c *Conn) TrySend(buf []byte, off int) Drop {
	return c.sendWith((*datagrams).trySend, buf, off)
}

// sendFunc is the type of datagrams.send and datagrams.trySend.
type sendFunc func(d *datagrams, buf []byte, off int) error

func (c *Conn) sendWith(send sendFunc, buf []byte, off int) (d Drop) {
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

// Ready reports whether Send would not block. It is always false in builds with
// the stock quic-go.
func (c *Conn) Ready() bool { return c.datagrams.ready() }

// forward checks a packet of the host against the policy, as a router does, and
// sends it. The buffer contract is Send's.
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
		// RFC 9484 section 7.2. Kernels send router solicitations, for example.
		return DropLinkLocal
	}
	pol := c.policy.Load()
	if from := pol.sendFrom.judge(p.Src, p.Protocol); from != allowed && !pol.isSelf(p.Src) &&
		!pol.quotesReceived(pkt, p) {
		kind, drop := from.sourceError()
		if !pol.selfFor(p.Src).IsValid() { // the tunnel carries no packets of this family
			kind = ippacket.NoRoute
		}
		c.answerHost(pkt, p, kind, 0)
		return drop
	}
	if to := pol.sendTo.judge(p.Dst, p.Protocol); to != allowed {
		c.answerHost(pkt, p, to.destinationError(), 0)
		return DropDestination
	}
	if q, ok := ippacket.Quoted(pkt, p); ok && q.Src != p.Dst {
		// An ICMP error must go to the sender of the packet that it quotes (RFC
		// 9484 section 11).
		return DropSource
	}
	if pol.delegated != nil && pol.delegated.Contains(p.Dst) { // the peer would send it back
		c.answerHost(pkt, p, ippacket.NoRoute, 0)
		return DropDestination
	}
	mtu := c.MTU()
	if !carriesVersion(p, mtu) {
		c.answerHost(pkt, p, ippacket.NoRoute, 0)
		return DropTooBig
	}
	// Packets that this host made are not forwarded, so they keep their hop
	// limit (RFC 9484 section 7.2).
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
		if errors.As(err, &tooLarge) { // the MTU shrank after c.MTU was called
			c.updateMTU()
			return c.sendTooBig(send, pkt, p, c.MTU(), false)
		}
		return sendFailure(err)
	}
	return DropNone
}

// sendFailure returns the reason for dropping a packet if QUIC returned err.
func sendFailure(err error) Drop {
	if err == errNoRoom {
		return DropQueueFull
	}
	return DropClosed
}

// sendTooBig handles a packet that is longer than mtu, as a router does: it
// fragments the packet if it is IPv4 without DF, and otherwise answers with the
// MTU (RFC 9484 section 10.1). The fragments are built in a buffer of their
// own.
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
			drop = sendFailure(err)
		}
	})
	if err != nil {
		return DropTooBig
	}
	return drop
}

// packetWriter writes packets to the device, at once or in batches.
type packetWriter interface {
	// push writes a copy of pkt, sooner or later. It returns false if the Conn
	// has ended and the packet is lost.
	push(pkt []byte) bool
}

// handleDatagram processes one HTTP Datagram, starting with the context ID (RFC
// 9484 section 6). It may modify b and does not retain it. It must not wait for
// QUIC, because it may run in the goroutine that runs the connection.
func (c *Conn) handleDatagram(b []byte, to packetWriter) {
	contextID, n, err := quicvarint.Parse(b)
	if err != nil || contextID != contextIPPacket {
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

// sourceError returns the ICMP error and the drop reason for a packet whose
// source got verdict v, which is not allowed.
func (v verdict) sourceError() (ippacket.ICMPError, Drop) {
	if v == forbidden { // the address is allowed for other protocols
		return ippacket.Prohibited, DropDestination
	}
	return ippacket.SourceNotAssigned, DropSource
}

// destinationError returns the ICMP error for a packet whose destination got
// verdict v, which is not allowed.
func (v verdict) destinationError() ippacket.ICMPError {
	if v == forbidden {
		return ippacket.Prohibited
	}
	return ippacket.NoRoute
}

// consumed is the result of admit for packets that this endpoint itself
// processed, such as an echo request on the link.
const consumed = numDrops

// admit decides whether a packet of the peer may go to the host: DropNone means
// that it may. Where a router would send an ICMP error, admit sends one to the
// peer. It may modify pkt and does not retain it.
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
		kind, drop := from.sourceError()
		c.answerPeer(pkt, p, kind)
		return drop
	}
	if to := pol.recvTo.judge(p.Dst, p.Protocol); to != allowed {
		c.answerPeer(pkt, p, to.destinationError())
		return DropDestination
	}
	ippacket.ClampMSS(pkt, p, c.MTU()) // the host's segments must fit the tunnel too
	c.noteReceived()
	return DropNone
}

// beyondScope reports whether p has a link-local source and a destination
// beyond the link.
func beyondScope(p ippacket.Packet) bool {
	return p.Src.IsLinkLocalUnicast() && !ippacket.IsLinkLocal(p.Dst)
}

// quotesSent reports whether pkt is an ICMP error about a packet that this
// endpoint could have sent through the tunnel. Any router may be its source
// (RFC 9484 section 7.2.1).
func (pol *policy) quotesSent(pkt []byte, p ippacket.Packet) bool {
	q, ok := ippacket.Quoted(pkt, p)
	return ok && q.Src == p.Dst && (pol.sendFrom.allow(q.Src, q.Protocol) || pol.isSelf(q.Src)) &&
		pol.sendTo.allow(q.Dst, q.Protocol)
}

// quotesReceived reports whether pkt is an ICMP error about a packet that the
// peer could have sent through the tunnel. If several peers share an external
// address, this ensures that each gets only the errors about its own packets
// (RFC 9484 section 11).
func (pol *policy) quotesReceived(pkt []byte, p ippacket.Packet) bool {
	q, ok := ippacket.Quoted(pkt, p)
	return ok && q.Src == p.Dst && pol.recvFrom.allow(q.Src, q.Protocol) &&
		pol.recvTo.allow(q.Dst, q.Protocol)
}
