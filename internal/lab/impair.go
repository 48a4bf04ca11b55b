package lab

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"
)

// Impairment is what one direction of a [Wire] does to IP packets. The zero
// value does nothing. ARP and neighbour discovery pass unharmed unless the wire
// is a black hole, so that a loss is a loss of traffic.
type Impairment struct {
	Delay     time.Duration // one way
	Jitter    time.Duration // up to this much more, without reordering
	Loss      float64       // probability, 0 to 1
	Duplicate float64       // probability that a packet arrives twice
	// probability that a packet skips the delay and overtakes those before it
	Reorder float64
	Rate    int64 // bits per second of whole frames; 0: no limit
	// bytes that may wait for the rate, the rest is dropped; 0: 50 ms of it,
	// but at least 32 KiB
	Queue     int
	MTU       int  // longer IP packets vanish, without an ICMP error; 0: no limit
	Blackhole bool // nothing passes

	// Drop, if set, says which IP packets vanish. It is called from one
	// goroutine per direction and must not keep the slice.
	Drop func(ip []byte) bool
}

// Stats counts frames of one direction of a [Wire].
type Stats struct {
	Received  uint64 // from the sending host
	Delivered uint64 // to the receiving host, duplicates included
	Lost      uint64 // to Loss
	QueueFull uint64 // to Rate and Queue
	TooBig    uint64 // to MTU
	Dropped   uint64 // to Blackhole and Drop
}

// Lengths and types of Ethernet frames.
const (
	etherHeaderLen = 14
	etherTypeARP   = 0x0806
	etherTypeIPv4  = 0x0800
	etherTypeIPv6  = 0x86dd
)

// pipe is one direction of a wire: it decides when, and whether, each frame
// arrives.
type pipe struct {
	write func(frame []byte) // called from one goroutine

	mu    sync.Mutex
	imp   Impairment
	rng   *rand.Rand
	stats Stats
	queue []frame   // by due time
	sent  time.Time // when the last frame is through the rate limit
	last  time.Time // when the last frame that was not reordered is due

	wake chan struct{} // the head of the queue changed
	quit chan struct{}
	done chan struct{} // deliver has ended
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

// close stops delivery and waits until write is not called any more.
func (p *pipe) close() {
	close(p.quit)
	<-p.done
}

// send takes a frame from the sending host. It does not keep data.
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

// schedule queues one frame for the time it arrives.
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

// push inserts f behind the frames that are due no later.
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

// pop takes the first frame off the queue if it is due, and otherwise returns
// how long to wait for one.
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
