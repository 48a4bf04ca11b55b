package proxy

import (
	"net/netip"

	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

const (
	minMTU = 1280
	maxMTU = flowqueue.MaxSize
	// sendBatch is how many packets are taken from a queue at once: few,
	// because they are past what keeps the queue fair.
	sendBatch = 16
	// autoMTU is what a QUIC packet of the largest size that quic-go sends has
	// room for. A session that carries less says so to whoever sends too much,
	// by Packet Too Big.
	autoMTU = 1400
)

// dispatch queues packets for their sessions, which own them from then on: they
// are set to nil. The others stay the caller's. A single packet for an idle
// session is sent at once. It never waits for a session: a queue that is full
// drops.
func (s *Server) dispatch(packets []*flowqueue.Packet) {
	s.reading.Begin()
	defer s.reading.End()
	var to *ipSession
	first := 0 // index of the first packet for it
	queue := func(end int) {
		switch {
		case to == nil:
		case end-first == 1 && to.queue.Idle() && to.userState.down.Delay() == 0 &&
			to.conn.Ready():
			// who is in the table has a conn
			to.userState.down.Spend(packets[first].Size)
			// waking another goroutine takes longer
			to.conn.TrySend(packets[first].Bytes(), tun.Headroom)
		default:
			to.push(packets[first:end])
		}
	}
	for i, p := range packets {
		if next := s.sessionOf(p); next != to {
			queue(i)
			to, first = next, i
		}
	}
	queue(len(packets))
}

// sessionOf returns the session that p is for; when there is none, p is
// answered and counted.
func (s *Server) sessionOf(p *flowqueue.Packet) *ipSession {
	pkt := p.Bytes()[tun.Headroom:]
	dst, ok := ippacket.Destination(pkt)
	if !ok {
		s.unrouted.Send.Drop(connectip.DropMalformed)
		return nil
	}
	to, ok := s.table.lookup(dst)
	if !ok {
		s.noSession(pkt, dst)
		return nil
	}
	return to
}

// noSession answers a packet to an address of the pool that nobody holds.
func (s *Server) noSession(pkt []byte, dst netip.Addr) {
	if ippacket.IsLinkLocal(dst) {
		s.unrouted.Send.Drop(connectip.DropLinkLocal)
		return
	}
	s.unrouted.Send.Drop(connectip.DropNoSession)
	if !s.pool.Contains(dst) || !s.errorLimit.Allow() {
		return
	}
	p, err := ippacket.Parse(pkt)
	if err != nil {
		return
	}
	buf := make([]byte, tun.Headroom, tun.Headroom+minMTU)
	buf, ok := ippacket.AppendICMPError(buf, pkt, p, ippacket.NoSession, s.pool.Gateway(dst), 0)
	if ok {
		s.unrouted.ICMPSent.Count(ippacket.NoSession)
		_, _ = s.supervisor.Current().device.Write([][]byte{buf}, tun.Headroom)
	}
}

func newErrorLimit() *rate.Limiter { return rate.NewLimiter(10, 10) }
