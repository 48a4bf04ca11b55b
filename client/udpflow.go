package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
)

const (
	// pooledPayload is what nearly all packets fit into, in bytes; the buffers
	// of longer ones are not used again.
	pooledPayload = 2048
	// flowQueue is how many packets of one local peer wait, as for the answer
	// to the request of its flow.
	flowQueue = 64
	// evictAfter is how long a flow has to be quiet to make room for another.
	evictAfter = time.Second
	// holdTime is how long no flow is asked for after the proxy refused one.
	holdTime = time.Second
	// limitRetryDelay, and twice as long each time up to limitRetryMax, passes
	// before a flow for which there was no room is tried again: the proxy takes
	// a moment to see that another has ended.
	limitRetryDelay = 50 * time.Millisecond
	limitRetryMax   = time.Second
)

// udpFlow carries the packets of one local peer.
type udpFlow struct {
	f      *UDPForwarder
	peer   netip.AddrPort
	link   *udpLink
	queue  chan udpPacket // packets that wait to be sent to the proxy
	ctx    context.Context
	stop   context.CancelFunc
	open   atomic.Bool
	active atomic.Int64 // when the last packet passed, in nanoseconds after the start of f
}

// udpPacket is a payload, in a buffer of the pool below unless that is nil.
type udpPacket struct {
	payload []byte
	buf     *[pooledPayload]byte
}

var udpBuffers = sync.Pool{New: func() any { return new([pooledPayload]byte) }}

// newUDPPacket copies a payload.
func newUDPPacket(payload []byte) udpPacket {
	if len(payload) > pooledPayload {
		return udpPacket{payload: bytes.Clone(payload)}
	}
	buf := udpBuffers.Get().(*[pooledPayload]byte)
	return udpPacket{payload: buf[:copy(buf[:], payload)], buf: buf}
}

func (p udpPacket) free() {
	if p.buf != nil {
		udpBuffers.Put(p.buf)
	}
}

// readSocket takes packets of local peers to their flows until the socket fails
// or is closed.
func (f *UDPForwarder) readSocket() error {
	peers := make(map[netip.AddrPort]*udpFlow)     // those that have ended may be among them
	buf := make([]byte, connectip.MaxUDPPayload+1) // what fills it is too long
	for {
		n, peer, err := f.socket.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if n == len(buf) {
			f.stats.Send.Drop(connectip.DropTooBig)
			continue
		}
		p := newUDPPacket(buf[:n])
		flow := peers[peer]
		if flow == nil || flow.ctx.Err() != nil {
			if flow = f.newFlow(peer); flow == nil {
				f.stats.Send.Drop(connectip.DropClosed)
				p.free()
				continue
			}
			for other, ended := range peers {
				if ended.ctx.Err() != nil {
					delete(peers, other)
				}
			}
			peers[peer] = flow
		}
		select {
		case flow.queue <- p:
		default:
			f.stats.Send.Drop(connectip.DropQueueFull)
			p.free()
		}
	}
}

// newFlow begins a flow for peer, nil if there can be none now.
func (f *UDPForwarder) newFlow(peer netip.AddrPort) *udpFlow {
	link := f.link.Load()
	if link == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Now().Before(f.hold) || len(f.flows) >= maxFlows && !f.evict() {
		return nil
	}
	flow := &udpFlow{f: f, peer: peer, link: link, queue: make(chan udpPacket, flowQueue)}
	flow.ctx, flow.stop = context.WithCancel(link.ctx)
	flow.touch()
	f.flows[flow] = struct{}{}
	f.running.Go(func() {
		defer rescue.Catch(f.panicked)
		flow.run()
	})
	return flow
}

// panicked logs a panic of a goroutine that serves one flow, which ends with
// it.
func (f *UDPForwarder) panicked(e *rescue.Error) {
	f.cfg.Logger.Error("a fault of this program ended a flow of UDP; please report it with this line",
		"panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
}

// evict ends the flow that was quiet for longest, if there is one that was for
// evictAfter. f.mu is held.
func (f *UDPForwarder) evict() bool {
	var oldest *udpFlow
	for flow := range f.flows {
		if flow.open.Load() && (oldest == nil || flow.active.Load() < oldest.active.Load()) {
			oldest = flow
		}
	}
	if oldest == nil || oldest.quiet() < evictAfter {
		return false
	}
	oldest.stop()
	delete(f.flows, oldest)
	return true
}

// touch notes that a packet passed.
func (flow *udpFlow) touch() { flow.active.Store(int64(time.Since(flow.f.started))) }

// quiet is for how long no packet passed.
func (flow *udpFlow) quiet() time.Duration {
	return time.Since(flow.f.started) - time.Duration(flow.active.Load())
}

// run opens the flow and carries its packets until it, its connection, or the
// need for it ends.
func (flow *udpFlow) run() {
	f := flow.f
	defer func() {
		flow.stop()
		f.mu.Lock()
		delete(f.flows, flow)
		f.mu.Unlock()
		flow.drain()
	}()
	raw, err := flow.request()
	if err != nil {
		flow.refused(err)
		return
	}
	flow.open.Store(true)
	str := connectip.NewUDPStream(raw)
	var down sync.WaitGroup
	down.Go(func() {
		defer flow.stop()
		defer rescue.Catch(f.panicked)
		str.ReceiveCapsules(flow.down, func() { f.stats.Receive.Drop(connectip.DropTooBig) })
	})
	down.Go(func() {
		defer flow.stop()
		defer rescue.Catch(f.panicked)
		str.ReceiveDatagrams(flow.ctx, flow.down)
	})
	ended := context.AfterFunc(flow.ctx, str.Interrupt) // for a packet that the proxy does not read
	defer func() {
		ended()
		flow.stop()
		str.Close()
		down.Wait()
	}()
	flow.up(str)
}

// drain gives back what was not sent.
func (flow *udpFlow) drain() {
	for {
		select {
		case p := <-flow.queue:
			flow.f.stats.Send.Drop(connectip.DropClosed)
			p.free()
		default:
			return
		}
	}
}

// request asks for the flow. When the proxy has a limit that forbids it, it
// goes in place of one that is quiet.
func (flow *udpFlow) request() (*http3.RequestStream, error) {
	f := flow.f
	// The answer is waited for without end, so one that does not come in time
	// ends the connection.
	late := time.AfterFunc(f.answer, func() {
		flow.link.fail(classify(context.DeadlineExceeded, nil, f.dialer.to))
	})
	defer late.Stop()
	evicted := false
	for delay := limitRetryDelay; ; delay *= 2 {
		c, err := f.request(flow.ctx, flow.link)
		var limit *limitError
		if !errors.As(err, &limit) || delay > limitRetryMax {
			return c, err
		}
		if !evicted {
			f.mu.Lock()
			evicted = f.evict()
			f.mu.Unlock()
		}
		select {
		case <-flow.ctx.Done():
			return nil, err
		case <-time.After(delay):
		}
	}
}

// refused says why there is no flow. What no later flow can mend ends the
// connection.
func (flow *udpFlow) refused(err error) {
	f := flow.f
	if flow.ctx.Err() != nil {
		return
	}
	var e *Error
	if errors.As(err, &e) && (e.Kind == KindUsage || e.Kind == KindCredentials) {
		flow.link.fail(e)
		return
	}
	f.mu.Lock()
	f.hold = time.Now().Add(holdTime)
	f.mu.Unlock()
	if f.complain.Allow() {
		f.cfg.Logger.Warn("no flow for a local peer", "peer", flow.peer.String(), "reason", err)
	}
}

// up carries packets to the proxy until the flow ends or nothing passes in
// either direction for long.
func (flow *udpFlow) up(str *connectip.UDPStream) {
	const looks = 4
	count := &flow.f.stats.Send
	idle := time.NewTicker(flow.f.cfg.IdleTimeout / looks)
	defer idle.Stop()
	for {
		select {
		case <-flow.ctx.Done():
			return
		case <-idle.C:
			if flow.quiet() >= flow.f.cfg.IdleTimeout {
				return
			}
		case p := <-flow.queue:
			size := len(p.payload)
			err := str.Send(p.payload)
			p.free()
			if err != nil {
				return
			}
			count.Add(size)
			flow.touch()
		}
	}
}

// down carries a packet to the local peer.
func (flow *udpFlow) down(payload []byte) {
	count := &flow.f.stats.Receive
	flow.touch()
	if _, err := flow.f.socket.WriteToUDPAddrPort(payload, flow.peer); err != nil {
		count.Drop(connectip.DropClosed)
		return
	}
	count.Add(len(payload))
}
