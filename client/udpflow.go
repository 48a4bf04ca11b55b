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
	// pooledPayload is the size of pooled buffers in bytes. Nearly all payloads
	// fit; longer ones get a buffer that is not reused.
	pooledPayload = 2048

	// flowQueue limits the packets of a flow that wait to be sent, for example
	// while the request is unanswered.
	flowQueue = 64

	// evictAfter is the time without packets after which a flow may be ended to
	// make room for another.
	evictAfter = time.Second

	// holdTime is the time without new flows after the proxy refused one.
	holdTime = time.Second

	// limitRetryDelay is the delay before a second request for a flow that
	// exceeded a limit, because the proxy needs a moment to notice that another
	// flow has ended. It doubles up to limitRetryMax.
	limitRetryDelay = 50 * time.Millisecond
	limitRetryMax   = time.Second
)

// udpFlow forwards the packets of one local peer.
type udpFlow struct {
	f     *UDPForwarder
	peer  netip.AddrPort
	link  *udpLink
	queue chan udpPacket // packets to the proxy
	ctx   context.Context
	stop  context.CancelFunc
	open  atomic.Bool // the proxy accepted the request

	// active is the time of the last packet, in nanoseconds after f.started.
	active atomic.Int64
}

// udpPacket is the payload of a UDP packet.
type udpPacket struct {
	payload []byte

	// buf is the buffer from udpBuffers that holds payload, nil for a payload
	// that does not fit.
	buf *[pooledPayload]byte
}

// udpBuffers holds buffers of type *[pooledPayload]byte.
var udpBuffers = sync.Pool{New: func() any { return new([pooledPayload]byte) }}

// newUDPPacket returns a packet with a copy of payload. The caller must call
// free.
func newUDPPacket(payload []byte) udpPacket {
	if len(payload) > pooledPayload {
		return udpPacket{payload: bytes.Clone(payload)}
	}
	buf := udpBuffers.Get().(*[pooledPayload]byte)
	return udpPacket{payload: buf[:copy(buf[:], payload)], buf: buf}
}

// free returns the buffer to the pool. The packet must not be used afterwards.
func (p udpPacket) free() {
	if p.buf != nil {
		udpBuffers.Put(p.buf)
	}
}

// readSocket puts packets of local peers into the queues of their flows until
// the socket fails or is closed.
func (f *UDPForwarder) readSocket() error {
	peers := make(map[netip.AddrPort]*udpFlow)     // may contain ended flows
	buf := make([]byte, connectip.MaxUDPPayload+1) // a payload that fills it is too long
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

// newFlow starts a flow for peer. It returns nil if no flow can be started now.
func (f *UDPForwarder) newFlow(peer netip.AddrPort) *udpFlow {
	link := f.link.Load()
	if link == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Now().Before(f.holdUntil) || len(f.flows) >= maxFlows && !f.evict() {
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

// panicked logs a panic in a goroutine of a flow. The panic ends the flow.
func (f *UDPForwarder) panicked(e *rescue.Error) {
	f.cfg.Logger.Error("a fault of this program ended a UDP flow; please report it with this line",
		"panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
}

// evict ends the flow that has been quiet for longest, and reports whether
// there was one that had been quiet for evictAfter. f.mu is held.
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

// touch records the time of a packet.
func (flow *udpFlow) touch() { flow.active.Store(int64(time.Since(flow.f.started))) }

// quiet returns the time since the last packet.
func (flow *udpFlow) quiet() time.Duration {
	return time.Since(flow.f.started) - time.Duration(flow.active.Load())
}

// run opens the flow and forwards its packets until the proxy or the connection
// ends it, or it is idle for too long.
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
	var receivers sync.WaitGroup
	receivers.Go(func() {
		defer flow.stop()
		defer rescue.Catch(f.panicked)
		str.ReceiveCapsules(flow.deliver, func() { f.stats.Receive.Drop(connectip.DropTooBig) })
	})
	receivers.Go(func() {
		defer flow.stop()
		defer rescue.Catch(f.panicked)
		str.ReceiveDatagrams(flow.ctx, flow.deliver)
	})
	// Interrupt ends a write that the proxy does not read.
	cancelInterrupt := context.AfterFunc(flow.ctx, str.Interrupt)
	defer func() {
		cancelInterrupt()
		flow.stop()
		str.Close()
		receivers.Wait()
	}()
	flow.send(str)
}

// drain frees the queued packets and counts them as dropped.
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

// request opens the flow. If it exceeds a limit of the proxy, request ends a
// quiet flow and tries again.
func (flow *udpFlow) request() (*http3.RequestStream, error) {
	f := flow.f
	// Nothing but the end of the connection interrupts f.request, so a late
	// answer has to end the connection.
	timeout := time.AfterFunc(f.answerTimeout, func() {
		flow.link.fail(classify(context.DeadlineExceeded, nil, f.dialer.target))
	})
	defer timeout.Stop()
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

// refused handles an error of request. An error that every other flow would
// have too ends the connection; any other is logged and delays new flows.
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
	f.holdUntil = time.Now().Add(holdTime)
	f.mu.Unlock()
	if f.flowWarnings.Allow() {
		f.cfg.Logger.Warn("cannot open a UDP flow for a local peer",
			"peer", flow.peer.String(), "reason", err)
	}
}

// send sends the queued packets to the proxy until the flow ends or has been
// idle in both directions for IdleTimeout.
func (flow *udpFlow) send(str *connectip.UDPStream) {
	const checks = 4 // checks per IdleTimeout
	count := &flow.f.stats.Send
	idle := time.NewTicker(flow.f.cfg.IdleTimeout / checks)
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

// deliver sends a payload to the local peer.
func (flow *udpFlow) deliver(payload []byte) {
	count := &flow.f.stats.Receive
	flow.touch()
	if _, err := flow.f.socket.WriteToUDPAddrPort(payload, flow.peer); err != nil {
		count.Drop(connectip.DropClosed)
		return
	}
	count.Add(len(payload))
}
