package proxy

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sys/unix"

	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
)

const (
	// maxWaiting is the number of packets from the client that wait for the
	// rate of their user.
	maxWaiting = 64

	// udpEndTimeout is the time that the capsule being sent at the end of a
	// session has to reach the client.
	udpEndTimeout = time.Second
)

// udpSession is a session of UDP proxying (RFC 9298): packets between the
// stream of the request and one target. A packet that is too large for the path
// to the target is dropped (RFC 9298 section 3.1). A packet that is too large
// for an HTTP datagram goes to the client in a capsule.
type udpSession struct {
	sessionBase

	// The fields of this group are set before the session starts.

	target udpTarget      // as requested
	to     netip.AddrPort // address of target
	socket net.Conn       // connected to the address
}

// prepare resolves the target and connects a socket to it, before the request
// is answered (RFC 9298 section 3.1).
func (ss *udpSession) prepare(ctx context.Context, path string) *refusal {
	target, err := parseUDPTarget(path)
	if errors.Is(err, errNotServed) {
		return refuse(http.StatusNotFound, "", "%v", err)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "http_request_error", "%v", err)
	}
	addrs := []netip.Addr{target.addr}
	if target.name != "" {
		var refused *refusal
		if addrs, refused = ss.shared.names.resolve(ctx, ss.user, target.name); refused != nil {
			return refused
		}
	}
	addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool {
		return !ss.shared.access.reachesByUDP(a, ss.user.allowed())
	})
	if len(addrs) == 0 {
		return refuse(http.StatusForbidden, "destination_ip_prohibited",
			"%v: clients may not reach it", target)
	}
	var errs []error
	for _, a := range addrs {
		to := netip.AddrPortFrom(a, target.port)
		socket, err := ss.shared.cfg().DialUDP(ctx, to)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		ss.target, ss.to, ss.socket = target, to, socket
		return nil
	}
	err = errors.Join(errs...)
	if errors.Is(err, os.ErrPermission) { // an address of this host, or a multicast address
		return refuse(http.StatusForbidden, "destination_ip_prohibited", "%v: %v", target, err)
	}
	return refuse(http.StatusBadGateway, "destination_ip_unroutable", "%v: %v", target, err)
}

func (ss *udpSession) discard() {
	ss.stop(nil)
	if ss.socket != nil {
		ss.socket.Close()
	}
}

func (ss *udpSession) kind() string { return KindUDP }

// limits returns the limits on the number of UDP flows. They do not count as
// tunnels, because one client may have many. Without authentication all clients
// are one user, who has the limit of all.
func (ss *udpSession) limits() limits {
	cfg := ss.shared.cfg()
	l := limits{cfg.MaxUDPFlows, cfg.MaxUDPFlowsPerUser, errTooManyFlows, errTooManyFlowsOfUser,
		"UDP flows"}
	if ss.user.Name == "" {
		l.maxOfUser = l.max
	}
	return l
}

// replaces reports whether old is a flow of the same client instance on another
// connection: a client has flows on one connection only.
func (ss *udpSession) replaces(old session) bool {
	b := old.base()
	return ss.instance != "" && ss.instance == b.instance && old.kind() == KindUDP &&
		ss.quic != b.quic
}

// added turns on congestion control for the connection, because the packets
// inside may not be subject to any (RFC 9298 section 6).
func (ss *udpSession) added([]session) { congestion.Control(ss.quic) }

func (ss *udpSession) isSite() bool { return false }

// setHeader adds the address of the target to the response (RFC 9209 section
// 2.1.2).
func (ss *udpSession) setHeader(h http.Header) {
	if s := ss.proxyStatus(); s != "" {
		h.Set("Proxy-Status", s)
	}
}

// proxyStatus returns the value of Proxy-Status with the address of the target,
// or "" if the name of the proxy cannot be written in a header field.
func (ss *udpSession) proxyStatus() string {
	item := httpsfv.NewItem(ss.shared.cfg().Name)
	item.Params.Add("next-hop", ss.to.String())
	s, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil {
		return ""
	}
	return s
}

// serve runs the session. It logs at debug level because clients may make many
// flows, for a packet each.
func (ss *udpSession) serve(w http.ResponseWriter, remote string, ended endFunc) {
	ss.log.Debug("session started", "remote", remote, "udp_target", ss.target.String())
	ended(slog.LevelDebug, ss.run(connectip.NewUDPStream(w.(http3.HTTPStreamer).HTTPStream())))
}

// run carries packets until the stream, the socket or ss.ctx ends, or no packet
// has passed for Config.UDPIdleTimeout. It releases everything that the session
// holds.
func (ss *udpSession) run(str *connectip.UDPStream) error {
	var sending, receiving sync.WaitGroup
	sending.Go(ss.guarded(func() { ss.stop(ss.sendToClient(str)) }))
	waiting := make(chan []byte, maxWaiting)
	receiving.Go(ss.guarded(func() { ss.sendWaiting(waiting) }))
	receiving.Go(ss.guarded(func() {
		str.ReceiveDatagrams(ss.ctx, func(b []byte) { ss.receive(b, waiting) })
	}))
	receiving.Go(ss.guarded(func() {
		str.ReceiveCapsules(func(b []byte) {
			ss.receive(b, waiting)
		}, func() { ss.stats.Receive.Drop(connectip.DropTooBig) })
		ss.stop(connectip.ErrClosedByPeer)
	}))
	ss.awaitIdle(ss.shared.cfg().UDPIdleTimeout)
	ss.socket.Close() // ends sendToClient unless the client does not read
	unread := time.AfterFunc(udpEndTimeout, str.Interrupt)
	connectip.Drain(ss.quic, sending.Wait)
	unread.Stop()
	str.Close()
	receiving.Wait()
	return context.Cause(ss.ctx)
}

// sendToClient sends packets from the target to the client until the socket or
// the stream fails.
func (ss *udpSession) sendToClient(str *connectip.UDPStream) error {
	count, rate := &ss.stats.Send, &ss.userState.down
	buf := make([]byte, connectip.MaxUDPPayload+1) // a packet that fills it is too long
	for {
		n, err := ss.socket.Read(buf)
		if errors.Is(err, unix.EMSGSIZE) {
			continue // ICMP error about an earlier packet to the target
		}
		if err != nil {
			return err
		}
		if n == len(buf) {
			count.Drop(connectip.DropTooBig)
			continue
		}
		rate.Wait(ss.ctx.Done())
		rate.Spend(n)
		if err := str.Send(buf[:n]); err != nil {
			return connectip.ErrClosedByPeer
		}
		count.Add(n)
	}
}

// receive sends a packet from the client to the target. If the user has a rate,
// the packet goes to the queue waiting instead, and is dropped if the queue is
// full.
func (ss *udpSession) receive(payload []byte, waiting chan<- []byte) {
	if ss.userState.up.Rate() == 0 {
		ss.sendToTarget(payload)
		return
	}
	select {
	case waiting <- bytes.Clone(payload):
	default:
		ss.stats.Receive.Drop(connectip.DropQueueFull)
	}
}

// sendWaiting sends the packets in waiting to the target, at the rate of the
// user, until ss.ctx ends.
func (ss *udpSession) sendWaiting(waiting <-chan []byte) {
	rate := &ss.userState.up
	for {
		select {
		case <-ss.ctx.Done():
			return
		case b := <-waiting:
			rate.Wait(ss.ctx.Done())
			rate.Spend(len(b))
			ss.sendToTarget(b)
		}
	}
}

// sendToTarget sends a packet to the target. It ends the session if the socket
// fails.
func (ss *udpSession) sendToTarget(payload []byte) {
	switch _, err := ss.socket.Write(payload); {
	case err == nil:
		ss.stats.Receive.Add(len(payload))
	case errors.Is(err, unix.EMSGSIZE):
		ss.stats.Receive.Drop(connectip.DropTooBig)
	default:
		ss.stop(err)
	}
}

var errIdle = errors.New("no packet passed within the idle timeout")

// awaitIdle returns when ss.ctx ends. It ends ss.ctx when no packet has passed
// for limit, or up to a quarter of limit later.
func (ss *udpSession) awaitIdle(limit time.Duration) {
	const checks = 4 // checks per limit
	tick := time.NewTicker(limit / checks)
	defer tick.Stop()
	seen, quiet := uint64(0), 0
	for quiet < checks {
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

// updateDenied ends the session if the client may not reach the target now.
func (ss *udpSession) updateDenied() error {
	if !ss.shared.access.reachesByUDP(ss.to.Addr(), ss.userState.allowed.Load()) {
		ss.stop(errProhibited)
	}
	return nil
}

// configChanged ends the session if the client may not reach the target now,
// which depends on the advertised routes too.
func (ss *udpSession) configChanged(bool) { _ = ss.updateDenied() }

// notify does nothing: the client is told nothing after the response.
func (ss *udpSession) notify() {}

func (ss *udpSession) status() SessionStatus {
	s := ss.baseStatus(KindUDP)
	s.Target = ss.target.String()
	s.SetRoutes(nil)
	s.SetDNS(nil, nil)
	return s
}

// addAges does nothing: packets that wait do so because of the user's rate.
func (ss *udpSession) addAges(*connectip.Ages) {}
