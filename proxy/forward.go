package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/time/rate"

	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
)

const (
	headroom = connectip.Headroom
	minMTU   = 1280
	maxMTU   = 1500
	// autoMTU is what a QUIC packet of the largest size that quic-go sends has room for. A session that carries less says so
	// to whoever sends too much, by Packet Too Big.
	autoMTU = 1400
	// queueLen is how many packets wait for one session. It absorbs what the device hands over in one batch or two; a longer
	// queue would only add delay.
	queueLen = 256
)

// packet is an IP packet with headroom, in a buffer of the pool below.
type packet struct {
	buf  *[headroom + maxMTU]byte
	size int // bytes, without the headroom
}

var buffers = sync.Pool{New: func() any { return new([headroom + maxMTU]byte) }}

func (p packet) free() { buffers.Put(p.buf) }

// readDevice takes packets from the device to the sessions they are for, until the device is closed. It never waits for
// a session: a full queue drops.
func (s *Server) readDevice() error {
	n := s.device.BatchSize()
	bufs := make([][]byte, n)
	held := make([]*[headroom + maxMTU]byte, n)
	sizes := make([]int, n)
	for {
		for i := range held {
			if held[i] == nil {
				held[i] = buffers.Get().(*[headroom + maxMTU]byte)
				bufs[i] = held[i][:]
			}
		}
		count, err := s.device.Read(bufs, sizes, headroom)
		for i := range count {
			if s.dispatch(packet{held[i], sizes[i]}) {
				held[i] = nil
			}
		}
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading from %s: %w", s.device.Name(), err)
		}
	}
}

// dispatch queues p for its session, which owns it from then on when dispatch returns true.
func (s *Server) dispatch(p packet) bool {
	pkt := p.buf[headroom : headroom+p.size]
	dst, ok := ippacket.Destination(pkt)
	if !ok {
		s.unrouted.Drop(connectip.DropMalformed)
		return false
	}
	to, ok := s.table.lookup(dst)
	if !ok {
		s.noSession(pkt, dst)
		return false
	}
	select {
	case to.queue <- p:
		return true
	default:
		to.stats.Send.Drop(connectip.DropQueueFull)
		return false
	}
}

// noSession answers a packet to an address of the pool that nobody holds.
func (s *Server) noSession(pkt []byte, dst netip.Addr) {
	if ippacket.IsLinkLocal(dst) {
		s.unrouted.Drop(connectip.DropLinkLocal)
		return
	}
	s.unrouted.Drop(connectip.DropNoSession)
	if !s.pool.contains(dst) || !s.errorLimit.Allow() {
		return
	}
	p, err := ippacket.Parse(pkt)
	if err != nil {
		return
	}
	buf := make([]byte, headroom, headroom+minMTU)
	buf, ok := ippacket.AppendICMPError(buf, pkt, p, ippacket.NoSession, s.gateway(dst), 0)
	if ok {
		s.icmpSent.Add(1)
		_, _ = s.device.Write([][]byte{buf}, headroom)
	}
}

func newErrorLimit() *rate.Limiter { return rate.NewLimiter(10, 10) }
