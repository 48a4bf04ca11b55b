package proxy

import (
	"net/netip"

	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy/internal/addrpool"
	"masquevpn/tun"
)

const (
	// minMTU and maxMTU bound the MTU of the device, in bytes.
	minMTU = 1280
	maxMTU = flowqueue.MaxSize

	// sendBatch is the number of packets taken from a queue at once. It is
	// small because packets taken from a fair queue no longer give way to
	// others.
	sendBatch = 16

	// autoMTU is the MTU in bytes of the device if none is configured: the
	// payload of the largest QUIC packets that quic-go sends. A session with
	// less room answers packets that are too large with Packet Too Big.
	autoMTU = 1400
)

// forwarder takes packets from the device to the sessions.
type forwarder struct {
	table  *table
	pool   *addrpool.Pool
	device connectip.Device

	errorLimit *rate.Limiter // limits ICMP errors of noSession

	reading connectip.Busy // busy while dispatch runs

	// unrouted counts packets of no session, and ICMP errors about them.
	unrouted connectip.Stats
}

func newForwarder(t *table, p *addrpool.Pool, d connectip.Device) *forwarder {
	return &forwarder{table: t, pool: p, device: d, errorLimit: rate.NewLimiter(10, 10)}
}

// dispatch queues packets for their sessions. It sets the entries of packets
// that a session owns then to nil; the caller keeps the others. A single packet
// for an idle session is sent at once, which is faster than to wake its
// goroutine. dispatch does not wait for a session: a full queue drops packets.
func (f *forwarder) dispatch(packets []*flowqueue.Packet) {
	f.reading.Begin()
	defer f.reading.End()
	var to *ipSession
	first := 0 // index of the first packet for to
	queue := func(end int) {
		switch {
		case to == nil:
		case end-first == 1 && to.queue.Idle() && to.userState.down.Delay() == 0 &&
			to.conn.Ready(): // a session in the table has a conn
			to.userState.down.Spend(packets[first].Size)
			to.conn.TrySend(packets[first].Bytes(), tun.Headroom)
		default:
			to.push(packets[first:end])
		}
	}
	for i, p := range packets {
		if next := f.sessionOf(p); next != to {
			queue(i)
			to, first = next, i
		}
	}
	queue(len(packets))
}

// sessionOf returns the session that holds the destination of p. If there is
// none, it counts p, may answer it, and returns nil.
func (f *forwarder) sessionOf(p *flowqueue.Packet) *ipSession {
	pkt := p.Bytes()[tun.Headroom:]
	dst, ok := ippacket.Destination(pkt)
	if !ok {
		f.unrouted.Send.Drop(connectip.DropMalformed)
		return nil
	}
	to, ok := f.table.lookup(dst)
	if !ok {
		f.noSession(pkt, dst)
		return nil
	}
	return to
}

// noSession counts a packet whose destination no session holds. If the
// destination is in the pool, it answers with an ICMP error.
func (f *forwarder) noSession(pkt []byte, dst netip.Addr) {
	if ippacket.IsLinkLocal(dst) {
		f.unrouted.Send.Drop(connectip.DropLinkLocal)
		return
	}
	f.unrouted.Send.Drop(connectip.DropNoSession)
	if !f.pool.Contains(dst) || !f.errorLimit.Allow() {
		return
	}
	p, err := ippacket.Parse(pkt)
	if err != nil {
		return
	}
	buf := make([]byte, tun.Headroom, tun.Headroom+minMTU)
	buf, ok := ippacket.AppendICMPError(buf, pkt, p, ippacket.NoSession, f.pool.Gateway(dst), 0)
	if ok {
		f.unrouted.ICMPSent.Count(ippacket.NoSession)
		_, _ = f.device.Write([][]byte{buf}, tun.Headroom)
	}
}
