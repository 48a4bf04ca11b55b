package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/net/ipv4"

	"masquevpn/internal/lab"
)

const (
	udpBatch      = 32                     // maximum number of packets per system call
	udpTick       = 500 * time.Microsecond // interval of sending
	udpDrain      = 100 * time.Millisecond // silence that ends the reception
	socketBuffer  = 4 << 20                // receiver's buffer in bytes
	probeTime     = 400 * time.Millisecond // duration of each rate in the search for the capacity
	firstRate     = 5000                   // lowest rate of the search, packets per second
	lastRate      = 3e6
	carried       = 0.95 // delivered fraction of a rate within the capacity
	farBeyond     = 0.75 // delivered fraction that ends the search
	generatorFair = 0.8  // sent fraction of a rate below which the generator is the limit
)

// udpLoad is the size of packets' data in bytes, and their direction.
type udpLoad struct {
	size int
	down bool // target to client; false: client to target
}

// udpResult counts packets.
type udpResult struct {
	sent, delivered int
	unread          int           // packets dropped at the receiver's socket
	time            time.Duration // time from the first to the last packet sent
}

func (r udpResult) rate() float64 { return float64(r.delivered) / r.time.Seconds() }

// udp sends packets for d, at a rate in packets per second. The packets of each
// half millisecond leave together, but without offload.
func (t *tunnel) udp(ctx context.Context, load udpLoad, rate float64, d time.Duration) (r udpResult,
	err error) {
	from, to, addr := t.Client, t.Target, lab.TargetIPv4
	if load.down {
		from, to = to, from
		if addr, err = t.clientInside(ctx); err != nil {
			return r, err
		}
	}
	sink, err := to.ListenPacket("udp4", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		return r, err
	}
	defer sink.Close()
	if err := sink.(*net.UDPConn).SetReadBuffer(socketBuffer); err != nil {
		return r, err
	}
	conn, err := from.DialContext(ctx, "udp4", sink.LocalAddr().String())
	if err != nil {
		return r, err
	}
	defer conn.Close()

	received := make(chan int)
	sent := make(chan struct{})
	go func() { received <- receiveAll(sink, sent) }()
	r.sent, r.time, err = sendAt(ctx, conn, load.size, rate, d)
	close(sent)
	r.delivered = <-received
	if err == nil && r.sent == 0 {
		err = fmt.Errorf("nothing was sent")
	}
	if err == nil {
		r.unread, err = unread(to, sink.LocalAddr().(*net.UDPAddr).Port)
	}
	return r, err
}

// clientInside returns the client's address in the tunnel.
func (t *tunnel) clientInside(ctx context.Context) (netip.Addr, error) {
	// This sends nothing.
	conn, err := t.Client.DialContext(ctx, "udp4", netip.AddrPortFrom(lab.TargetIPv4, 9).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr(), nil
}

// sendAt sends the packets that are due, every udpTick, and returns their
// number and the time taken.
func sendAt(ctx context.Context, conn net.Conn, size int, rate float64, d time.Duration) (int,
	time.Duration, error) {
	messages := make([]ipv4.Message, udpBatch)
	data := make([]byte, size)
	for i := range messages {
		messages[i].Buffers = [][]byte{data}
	}
	out := ipv4.NewPacketConn(conn.(*net.UDPConn))
	sent, start := 0, time.Now()
	for {
		passed := min(time.Since(start), d)
		due := int(rate*passed.Seconds()) - sent
		// A generator that is late by more than a few ticks is the limit.
		// Catching up in bursts would distort the result.
		for due = min(due, int(rate*4*udpTick.Seconds())+1); due > 0; {
			n, err := out.WriteBatch(messages[:min(due, udpBatch)], 0)
			if err != nil {
				return sent, time.Since(start), err
			}
			due -= n
			sent += n
		}
		if passed == d {
			return sent, time.Since(start), nil
		}
		if err := sleep(ctx, udpTick); err != nil {
			return sent, time.Since(start), err
		}
	}
}

// receiveAll counts packets until sent is closed and udpDrain has passed in
// silence.
func receiveAll(conn net.PacketConn, sent <-chan struct{}) int {
	in := ipv4.NewPacketConn(conn)
	messages := make([]ipv4.Message, 2*udpBatch)
	for i := range messages {
		messages[i].Buffers = [][]byte{make([]byte, 1500)}
	}
	total := 0
	for {
		conn.SetReadDeadline(time.Now().Add(udpDrain))
		if n, err := in.ReadBatch(messages, 0); err == nil {
			total += n
			continue
		}
		select {
		case <-sent:
			return total
		default:
		}
	}
}

// udpCapacity returns the packets per second that the tunnel delivers with few
// losses. The first call searches with increasing rates.
func (t *tunnel) udpCapacity(ctx context.Context, load udpLoad) (float64, error) {
	if t.capacity[load] > 0 {
		return t.capacity[load], nil
	}
	best := 0.0
	for rate := float64(firstRate); rate < lastRate; rate *= 1.25 {
		r, err := t.udp(ctx, load, rate, probeTime)
		if err != nil {
			return 0, err
		}
		share := float64(r.delivered) / float64(r.sent)
		if best == 0 || share > carried {
			best = max(best, r.rate())
		}
		if share < farBeyond || float64(r.sent) < generatorFair*rate*probeTime.Seconds() {
			break
		}
	}
	t.capacity[load] = best
	return best, nil
}

// udpLevels measures at 50, 100 and 200 % of the capacity.
func (t *tunnel) udpLevels(ctx context.Context, load udpLoad, d time.Duration) ([]value, error) {
	capacity, err := t.udpCapacity(ctx, load)
	if err != nil {
		return nil, err
	}
	var values []value
	delivered := make(map[int]float64)
	for _, percent := range []int{50, 100, 200} {
		v, r, err := t.udpAt(ctx, fmt.Sprintf("%d %%: ", percent), load,
			capacity*float64(percent)/100, d)
		values = append(values, v...)
		if err != nil {
			return values, err
		}
		delivered[percent] = r.rate()
	}
	return append(values, value{"delivered at 200 %, of that at 100 %", "%",
		100 * delivered[200] / delivered[100]}), nil
}

// udpAt measures at one rate. prefix precedes the names of the results.
func (t *tunnel) udpAt(ctx context.Context, prefix string, load udpLoad, rate float64,
	d time.Duration) ([]value, udpResult, error) {
	before, err := t.look(ctx)
	if err != nil {
		return nil, udpResult{}, err
	}
	r, err := t.udp(ctx, load, rate, d)
	if err != nil {
		return nil, r, err
	}
	after, err := t.look(ctx)
	if err != nil {
		return nil, r, err
	}
	share := func(n float64) float64 { return 100 * n / float64(r.sent) }
	values := []value{
		{prefix + "offered", "packets/s", float64(r.sent) / r.time.Seconds()},
		{prefix + "delivered", "packets/s", r.rate()},
		{prefix + "lost", "%", share(float64(r.sent - r.delivered))},
	}
	// The places are in a packet's order.
	for i := range after.drops {
		p := &after.drops[i]
		p.n -= before.drops[i].n
		if load.down && p.where == "client's socket" {
			// all sockets of the host, also the receiver's
			p.n -= min(p.n, uint64(r.unread))
		}
	}
	if load.down {
		slices.Reverse(after.drops)
	}
	elsewhere := float64(r.sent - r.delivered)
	for _, c := range append(after.drops, drop{"receiver's socket", uint64(r.unread)}) {
		elsewhere -= float64(c.n)
		values = append(values, value{prefix + lostAt + c.where, "%", share(float64(c.n))})
	}
	// The remainder may be negative: packets of the tunnel itself are lost as
	// well.
	values = append(values, value{prefix + lostAt + "elsewhere", "%", share(max(elsewhere, 0))})
	if r.delivered > 0 {
		values = append(values, value{prefix + "CPU", "s/GB",
			(after.cpu - before.cpu).Seconds() / float64(r.delivered*load.size) * 1e9})
	}
	return values, r, nil
}
