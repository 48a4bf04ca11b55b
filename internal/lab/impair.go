package lab

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"
)

// Impairment describes how one direction of a [Wire] treats IP packets. The
// zero value passes all packets unchanged. ARP and neighbour discovery pass too
// unless the wire is a black hole, so that only traffic is lost.
type Impairment struct {
	Delay     time.Duration // one way
	Jitter    time.Duration // maximum random extra delay, without reordering
	Loss      float64       // probability, 0 to 1
	Duplicate float64       // probability that a packet arrives twice
	// Reorder is the probability that a packet skips the delay and overtakes
	// earlier packets.
	Reorder float64
	// Rate limits whole frames, in bits per second. 0: no limit.
	Rate int64
	// Queue is the number of bytes that may wait for Rate before packets are
	// dropped. 0: the bytes of 50 ms at Rate, but at least 32 KiB.
	Queue int
	// MTU is the length in bytes above which IP packets vanish without an ICMP
	// error. 0: no limit.
	MTU       int
	Blackhole bool // drops every frame

	// Drop, if set, reports whether to drop an IP packet. It is called from one
	// goroutine per direction and must not retain the slice.
	Drop func(ip []byte) bool
}

// Stats counts frames of one direction of a [Wire].
type Stats struct {
	Received  uint64 // frames from the sending host
	Delivered uint64 // frames to the receiving host, with duplicates
	Lost      uint64 // frames lost by Loss
	QueueFull uint64 // frames dropped by Rate and Queue
	TooBig    uint64 // frames dropped by MTU
	Dropped   uint64 // frames dropped by Blackhole and Drop
}

// Lengths and types of Ethernet frames.
const (
	etherHeaderLen = 14
	etherTypeARP   = 0x0806
	etherTypeIPv4  = 0x0800
	etherTypeIPv6  = 0x86dd
)

// pipe is one direction of a wire. It decides when and whether each frame
// arrives.
type pipe struct {
	write func(frame []byte) // called from one goroutine

	mu    sync.Mutex // guards the fields up to last
	imp   Impairment
	rng   *rand.Rand
	stats Stats
	queue []frame // frames ordered by due time
	// sent is the time at which the last frame has passed the rate limit.
	sent time.Time
	// last is the due time of the last frame in order.
	last time.Time

	wake chan struct{} // the head of the queue changed
	quit chan struct{}
	done chan struct{} // closed at the end of deliver
}

// frame is an Ethernet frame and the time it arrives.
type frame struct {
	due  time.Time
	data []byte
}

func newPipe(imp Impairment, seed uint64, write func([]byte)) *pipe {
	p := &pipe{
		write: write, imp: imp, rng: rand.New(rand.NewPCG(seed, seed)),
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
	}
	go p.deliver()
	return p
}

func (p *pipe) set(imp Impairment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.imp = imp
}

func (p *pipe) snapshot() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// close stops delivery and waits for the last call of write.
func (p *pipe) close() {
	close(p.quit)
	<-p.done
}

// send accepts a frame from the sending host. It does not retain data.
func (p *pipe) send(data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats.Received++
	if p.imp.Blackhole {
		p.stats.Dropped++
		return
	}
	if resolvesAddresses(data) {
		p.push(frame{time.Now(), append([]byte(nil), data...)})
		return
	}
	ip := data[min(etherHeaderLen, len(data)):]
	switch {
	case p.imp.MTU > 0 && len(ip) > p.imp.MTU:
		p.stats.TooBig++
		return
	case p.imp.Drop != nil && p.imp.Drop(ip):
		p.stats.Dropped++
		return
	case p.imp.Loss > 0 && p.rng.Float64() < p.imp.Loss:
		p.stats.Lost++
		return
	}
	copies := 1
	if p.imp.Duplicate > 0 && p.rng.Float64() < p.imp.Duplicate {
		copies = 2
	}
	for range copies {
		p.schedule(data)
	}
}

// schedule queues one frame for its arrival time.
func (p *pipe) schedule(data []byte) {
	now := time.Now()
	due := now
	if p.imp.Rate > 0 {
		limit := p.imp.Queue
		if limit == 0 {
			limit = max(int(p.imp.Rate/8/20), 32<<10)
		}
		if p.sent.Before(now) {
			p.sent = now
		}
		waiting := p.sent.Sub(now).Seconds() * float64(p.imp.Rate) / 8
		if waiting+float64(len(data)) > float64(limit) {
			p.stats.QueueFull++
			return
		}
		p.sent = p.sent.Add(time.Duration(float64(len(data)) * 8 / float64(p.imp.Rate) * float64(time.Second)))
		due = p.sent
	}
	if p.imp.Reorder > 0 && p.rng.Float64() < p.imp.Reorder {
		p.push(frame{due, append([]byte(nil), data...)})
		return
	}
	due = due.Add(p.imp.Delay)
	if p.imp.Jitter > 0 {
		due = due.Add(time.Duration(p.rng.Int64N(int64(p.imp.Jitter))))
	}
	if due.Before(p.last) {
		due = p.last
	}
	p.last = due
	p.push(frame{due, append([]byte(nil), data...)})
}

// push inserts f after the frames that are due no later.
func (p *pipe) push(f frame) {
	i := len(p.queue)
	for i > 0 && p.queue[i-1].due.After(f.due) {
		i--
	}
	p.queue = append(p.queue, frame{})
	copy(p.queue[i+1:], p.queue[i:])
	p.queue[i] = f
	if i == 0 {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

// deliver writes frames when they are due.
func (p *pipe) deliver() {
	defer close(p.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next, wait := p.pop()
		if next != nil {
			p.write(next)
			continue
		}
		timer.Reset(wait)
		select {
		case <-p.quit:
			return
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// pop removes and returns the first frame if it is due, and otherwise returns
// the time until the next one.
func (p *pipe) pop() ([]byte, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return nil, time.Hour
	}
	if wait := time.Until(p.queue[0].due); wait > 0 {
		return nil, wait
	}
	data := p.queue[0].data
	p.queue[0] = frame{}
	p.queue = p.queue[1:]
	p.stats.Delivered++
	return data, 0
}

// resolvesAddresses reports whether an Ethernet frame is ARP or IPv6 neighbour
// or router discovery (ICMPv6 133 to 137).
func resolvesAddresses(f []byte) bool {
	if len(f) < etherHeaderLen {
		return false
	}
	switch binary.BigEndian.Uint16(f[12:]) {
	case etherTypeARP:
		return true
	case etherTypeIPv6:
		ip := f[etherHeaderLen:]
		return len(ip) > 40 && ip[6] == 58 && ip[40] >= 133 && ip[40] <= 137
	}
	return false
}
