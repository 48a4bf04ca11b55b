package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/masque-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
)

// maxUDPPayload is more than QUIC's datagrams carry, in bytes: what fills a buffer of this size is too big.
const maxUDPPayload = 2048

// udpFlow is what a session for UDP proxying carries (RFC 9298): packets between its stream and one target.
//
// The stream is masque-go's, which relays it to a socket. That socket leads not to the target but back here, because masque-go
// neither counts packets nor tells when none pass, and ends a flow with the first packet that is too large for the path, in
// either direction, where RFC 9298 sections 3.1 and 6.1 have it dropped.
type udpFlow struct {
	target udpTarget
	to     netip.AddrPort // of the target
	socket net.Conn       // to it
	inner  *net.UDPConn   // masque-go's end of a pair of sockets
	outer  *net.UDPConn   // and ours
	relay  masque.Proxy   // of this one flow, so that it can be ended alone
}

// newUDPFlow makes a flow of a socket to the target's address. The socket is the flow's then, also with an error.
func newUDPFlow(target udpTarget, to netip.AddrPort, socket net.Conn) (*udpFlow, error) {
	f := &udpFlow{target: target, to: to, socket: socket}
	var err error
	if f.inner, f.outer, err = udpPair(); err != nil {
		socket.Close()
		return nil, fmt.Errorf("opening a pair of sockets: %w", err)
	}
	return f, nil
}

// nextHop returns the value of Proxy-Status by which the proxy called name tells the client the target's address (RFC 9209
// section 2.1.2), "" for none.
func (f *udpFlow) nextHop(name string) string {
	item := httpsfv.NewItem(name)
	item.Params.Add("next-hop", f.to.String())
	s, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil {
		return "" // a name that no field can carry
	}
	return s
}

// close frees the sockets.
func (f *udpFlow) close() {
	f.socket.Close()
	f.inner.Close()
	f.outer.Close()
}

// udpPair returns two sockets on the loopback interface, each connected to the other.
func udpPair() (a, b *net.UDPConn, err error) {
	loopback := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}
	b, err = net.ListenUDP("udp4", loopback)
	if err != nil {
		return nil, nil, err
	}
	if a, err = net.DialUDP("udp4", loopback, b.LocalAddr().(*net.UDPAddr)); err == nil {
		err = connectUDP(b, a.LocalAddr().(*net.UDPAddr))
	}
	if err != nil {
		b.Close()
		if a != nil {
			a.Close()
		}
		return nil, nil, err
	}
	return a, b, nil
}

// connectUDP connects a bound socket, which net cannot do.
func connectUDP(c *net.UDPConn, to *net.UDPAddr) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.Connect(int(fd), &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())})
	})
	return errors.Join(controlErr, err)
}

// up carries packets of the client to the target until a socket fails or is closed. Those that wait because of the user's rate do so
// in the kernel.
func (f *udpFlow) up(count *connectip.Traffic, rate *pacer, done <-chan struct{}) error {
	buf := make([]byte, maxUDPPayload)
	for {
		n, err := f.outer.Read(buf)
		if err != nil { // the other end is closed
			return connectip.ErrClosedByPeer
		}
		rate.wait(done)
		rate.spend(n)
		switch _, err := f.socket.Write(buf[:n]); {
		case err == nil:
			count.Add(n)
		case errors.Is(err, unix.EMSGSIZE):
			count.Drop(connectip.DropTooBig)
		default:
			return err
		}
	}
}

// down is up for packets of the target to the client. capacity is the largest payload that fits on the client's path now.
func (f *udpFlow) down(count *connectip.Traffic, rate *pacer, done <-chan struct{}, capacity func() (int, error)) error {
	buf := make([]byte, maxUDPPayload)
	limit := 0
	for {
		n, err := f.socket.Read(buf)
		if errors.Is(err, unix.EMSGSIZE) {
			continue // about a packet to the target that a router refused
		}
		if err != nil {
			return err
		}
		if n > limit { // the path may carry more by now
			if limit, err = capacity(); err != nil {
				return err
			}
		}
		if n > limit {
			count.Drop(connectip.DropTooBig)
			continue
		}
		rate.wait(done)
		rate.spend(n)
		count.Add(n)
		if _, err := f.outer.Write(buf[:n]); err != nil {
			return connectip.ErrClosedByPeer
		}
	}
}

var errIdle = errors.New("no packet passed for long")

// runUDP carries the session until its stream, the socket to its target or ss.ctx ends, or until no packet passed for long, and
// gives back all that it held. The header of the answer was written.
func (ss *session) runUDP(w http.ResponseWriter) error {
	f := ss.udp
	str := w.(http3.HTTPStreamer).HTTPStream()
	capacity := func() (int, error) { return connectip.MaxPayload(ss.quic, str.StreamID()) }
	var wg sync.WaitGroup
	defer wg.Wait()
	defer f.close()
	defer ss.stop(connectip.ErrClosedByPeer)
	wg.Go(ss.guarded(func() { ss.stop(f.up(&ss.stats.Receive, &ss.account.up, ss.ctx.Done())) }))
	wg.Go(ss.guarded(func() { ss.stop(f.down(&ss.stats.Send, &ss.account.down, ss.ctx.Done(), capacity)) }))
	wg.Go(ss.guarded(func() {
		ss.awaitIdle(ss.server.cfg().UDPIdleTimeout)
		connectip.Drain(ss.quic, func() { _ = f.relay.Close() })
	}))
	_ = f.relay.ProxyConnectedSocket(w, &masque.ProxyRequest{Target: f.target.String()}, f.inner)
	ss.stop(connectip.ErrClosedByPeer)
	_ = str.Close() // the relay did not when it was closed before it began
	str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
	return context.Cause(ss.ctx)
}

// awaitIdle returns when ss.ctx ends, and ends it when no packet passed for limit, or up to a quarter of it longer.
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
