package proxy

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
	"masquevpn/proxy/internal/pacer"
)

// maxWaiting is how many packets of the client wait for their user's rate.
const maxWaiting = 64

// udpEndTimeout is for a packet that is being sent in a capsule at the end.
const udpEndTimeout = time.Second

// udpFlow is what a session for UDP proxying carries (RFC 9298): packets
// between its stream and one target. A packet that is too large for the path to
// the target is dropped (RFC 9298 section 3.1); one that is too large for a
// datagram goes to the client in a capsule.
type udpFlow struct {
	target udpTarget
	to     netip.AddrPort // the target's address
	socket net.Conn       // connected to the target
}

// nextHop returns the value of Proxy-Status by which the proxy called name
// tells the client the target's address (RFC 9209 section 2.1.2), "" for none.
func (f *udpFlow) nextHop(name string) string {
	item := httpsfv.NewItem(name)
	item.Params.Add("next-hop", f.to.String())
	s, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil {
		return "" // a name that no field can carry
	}
	return s
}

// up carries a packet of the client to the target.
func (f *udpFlow) up(payload []byte, count *connectip.Traffic) error {
	switch _, err := f.socket.Write(payload); {
	case err == nil:
		count.Add(len(payload))
	case errors.Is(err, unix.EMSGSIZE):
		count.Drop(connectip.DropTooBig)
	default:
		return err
	}
	return nil
}

// down carries packets of the target to the client until the socket or the
// stream fails.
func (f *udpFlow) down(str *connectip.UDPStream, count *connectip.Traffic, rate *pacer.Pacer,
	done <-chan struct{}) error {
	buf := make([]byte, connectip.MaxUDPPayload+1) // what fills it is too long
	for {
		n, err := f.socket.Read(buf)
		if errors.Is(err, unix.EMSGSIZE) {
			continue // about a packet to the target that a router refused
		}
		if err != nil {
			return err
		}
		if n == len(buf) {
			count.Drop(connectip.DropTooBig)
			continue
		}
		rate.Wait(done)
		rate.Spend(n)
		if err := str.Send(buf[:n]); err != nil {
			return connectip.ErrClosedByPeer
		}
		count.Add(n)
	}
}

// receive carries a packet of the client to the target. Those of a user with a
// rate wait for that in a short queue, up: what is above the rate for long is
// dropped.
func (ss *session) receive(payload []byte, up chan<- []byte) {
	count := &ss.stats.Receive
	if ss.userState.up.Rate() == 0 {
		if err := ss.udp.up(payload, count); err != nil {
			ss.stop(err)
		}
		return
	}
	select {
	case up <- bytes.Clone(payload):
	default:
		count.Drop(connectip.DropQueueFull)
	}
}

// sendWaiting carries packets that wait in up to the target until ss.ctx ends.
func (ss *session) sendWaiting(up <-chan []byte) {
	rate := &ss.userState.up
	for {
		select {
		case <-ss.ctx.Done():
			return
		case b := <-up:
			rate.Wait(ss.ctx.Done())
			rate.Spend(len(b))
			if err := ss.udp.up(b, &ss.stats.Receive); err != nil {
				ss.stop(err)
			}
		}
	}
}

var errIdle = errors.New("no packet passed for long")

// runUDP carries the session until its stream, the socket to its target or
// ss.ctx ends, or until no packet passed for long, and gives back all that it
// held. The header of the answer was written.
func (ss *session) runUDP(w http.ResponseWriter) error {
	str := connectip.NewUDPStream(w.(http3.HTTPStreamer).HTTPStream())
	var sending, receiving sync.WaitGroup
	sending.Go(ss.guarded(func() {
		ss.stop(ss.udp.down(str, &ss.stats.Send, &ss.userState.down, ss.ctx.Done()))
	}))
	up := make(chan []byte, maxWaiting)
	receiving.Go(ss.guarded(func() { ss.sendWaiting(up) }))
	receiving.Go(ss.guarded(func() {
		str.ReceiveDatagrams(ss.ctx, func(b []byte) { ss.receive(b, up) })
	}))
	receiving.Go(ss.guarded(func() {
		str.ReceiveCapsules(func(b []byte) {
			ss.receive(b, up)
		}, func() { ss.stats.Receive.Drop(connectip.DropTooBig) })
		ss.stop(connectip.ErrClosedByPeer)
	}))
	ss.awaitIdle(ss.server.cfg().UDPIdleTimeout)
	ss.udp.socket.Close() // which ends down, unless it waits for the client
	unread := time.AfterFunc(udpEndTimeout, str.Interrupt)
	connectip.Drain(ss.quic, sending.Wait)
	unread.Stop()
	str.Close()
	receiving.Wait()
	return context.Cause(ss.ctx)
}

// awaitIdle returns when ss.ctx ends, and ends it when no packet passed for
// limit, or up to a quarter of it longer.
func (ss *session) awaitIdle(limit time.Duration) {
	const looks = 4
	tick := time.NewTicker(limit / looks)
	defer tick.Stop()
	seen, quiet := uint64(0), 0
	for quiet < looks {
		select {
		case <-ss.ctx.Done():
			return
		case <-tick.C:
		}
		quiet++
		if n := ss.stats.Receive.Packets.Load() + ss.stats.Send.Packets.Load(); n != seen {
			seen, quiet = n, 0
		}
	}
	ss.stop(errIdle)
}
