// Package flowqueue queues packets that wait to be sent into a tunnel. It
// implements FQ-CoDel (RFC 8290): each flow has its own queue, flows take
// turns, and CoDel drops packets of a flow that waits too long. So a bulk
// transfer is slowed down by a few drops, and other flows do not wait behind
// it.
//
// A program has one [Queue] for each tunnel. [ReadFrom] reads packets from a
// device, [Queue.Push] adds them to a Queue, and one goroutine takes them out
// with [Queue.Pop] and sends them. All queues of a process together hold a
// limited number of packets, however many queues there are.
package flowqueue

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

const (
	// Limit is the most packets in a Queue. It has room for the window of a
	// fast TCP connection, so that single drops of CoDel slow the connection
	// down and not a full queue.
	Limit = 4096

	// maxTotal is the most packets in all queues of this process. They take
	// some 117 MB.
	maxTotal = 1 << 16

	// reserve is the part of maxTotal for queues with at most minLimit packets.
	// They can use it when other queues have taken everything else.
	reserve  = maxTotal / 8
	minLimit = 16

	// buckets is the number of flows that a Queue distinguishes. Flows whose
	// hashes collide share one bucket and its turns.
	buckets = 128

	// quantum is the number of bytes that a flow may send in one turn.
	quantum = 1514
)

// total is the number of packets in all queues.
var total atomic.Int64

// Queue holds the packets that wait for one sender. It uses little memory until
// the first packet. Its methods may be called concurrently, except for Pop.
type Queue struct {
	// wake wakes Pop after a Push or Close. It has a capacity of 1.
	wake chan struct{}

	seed maphash.Seed
	now  func() time.Duration // time since New

	mu sync.Mutex // guards the fields below

	// flows is nil before the first Push and after Close.
	flows *[buckets]flow

	// newFlows are flows that had nothing to send until now. Their first turn
	// comes before all turns of oldFlows (RFC 8290 section 4.2).
	newFlows list
	oldFlows list

	packets  int
	waiting  bool // Pop waits for packets
	isClosed bool
}

// New returns an empty Queue. The caller closes it.
func New() *Queue {
	start := time.Now()
	return &Queue{wake: make(chan struct{}, 1), seed: maphash.MakeSeed(),
		now: func() time.Duration {
			return time.Since(start)
		}}
}

// Push adds packets to the Queue, which then owns them. It returns the number
// of packets, old or new, that it dropped because there were too many. Push
// never blocks. A closed Queue drops all packets.
func (q *Queue) Push(packets []*Packet) (dropped int) {
	dropped, closed := q.push(packets)
	if closed {
		return dropped
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return dropped
}

func (q *Queue) push(packets []*Packet) (dropped int, closed bool) {
	now := q.now()
	q.mu.Lock()
	// Unlock after a panic too, because callers serve other peers as well.
	defer q.mu.Unlock()
	if q.isClosed {
		for _, p := range packets {
			p.Free()
		}
		return len(packets), true
	}
	if q.flows == nil {
		q.flows = new([buckets]flow)
	}
	for _, p := range packets {
		f := &q.flows[ippacket.FlowHash(q.seed, p.Bytes()[tun.Headroom:])%buckets]
		p.queued = now
		f.push(p)
		if !f.listed {
			f.listed, f.deficit = true, quantum
			q.newFlows.append(f)
		}
	}
	q.packets += len(packets)
	if dropped = q.excess(int(total.Add(int64(len(packets))))); dropped > 0 {
		q.drop(dropped)
	}
	return dropped, false
}

// Oldest returns how long the oldest packet has been waiting. It is 0 if the
// Queue is empty.
func (q *Queue) Oldest() (age time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.packets == 0 {
		return 0
	}
	now := q.now()
	for i := range q.flows {
		if f := &q.flows[i]; f.first != nil {
			age = max(age, now-f.first.queued)
		}
	}
	return age
}

// excess returns the number of packets that q must drop when all queues
// together hold sum packets. A queue may hold as many packets as it leaves free
// for others (the dynamic thresholds of Choudhury and Hahne), so all flooded
// queues converge to equal shares.
func (q *Queue) excess(sum int) int {
	others := sum - q.packets
	limit := min(Limit, max(minLimit, (maxTotal-reserve-others)/2))
	return min(q.packets, max(0, q.packets-limit, sum-maxTotal))
}

// drop drops n packets. It takes the oldest packets of the longest flows.
func (q *Queue) drop(n int) {
	for remaining := n; remaining > 0; {
		var longest *flow
		for i := range q.flows {
			if f := &q.flows[i]; f.first != nil && (longest == nil || f.bytes > longest.bytes) {
				longest = f
			}
		}
		// Drop half of the flow at once, because the search takes longer than a
		// drop (RFC 8290 section 4.1).
		for enough := longest.bytes / 2; remaining > 0 && longest.first != nil &&
			longest.bytes >= enough; remaining-- {
			longest.pop().Free()
		}
	}
	q.subtract(n)
}

// subtract updates the counts after n packets left the Queue.
func (q *Queue) subtract(n int) {
	q.packets -= n
	total.Add(-int64(n))
}

// Pop waits for packets, stores those to send next in packets and returns their
// number n. The caller owns them. dropped is the number of packets that CoDel
// dropped because their flow waited too long. n is 0 only if the Queue is
// closed. Pop must not be called concurrently.
func (q *Queue) Pop(packets []*Packet) (n, dropped int) {
	for {
		q.mu.Lock()
		q.waiting = false
		if q.packets > 0 {
			now := q.now()
			for n < len(packets) {
				p, d := q.next(now)
				dropped += d
				if p == nil {
					break
				}
				packets[n] = p
				n++
			}
			q.subtract(n + dropped)
		}
		closed := q.isClosed
		q.waiting = n == 0 && !closed
		q.mu.Unlock()
		if n > 0 || closed {
			return n, dropped
		}
		<-q.wake
	}
}

// Idle reports whether the Queue is empty and Pop waits for packets, which
// means that the sender has sent all earlier ones. A packet that bypasses an
// idle Queue overtakes no other. The result is valid until the next Push.
func (q *Queue) Idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.waiting && q.packets == 0
}

// next removes and returns the packet to send next, or nil if there is none
// (RFC 8290 section 4.2). q.mu is held.
func (q *Queue) next(now time.Duration) (p *Packet, dropped int) {
	for {
		l := &q.newFlows
		if l.first == nil {
			l = &q.oldFlows
		}
		f := l.first
		if f == nil {
			return nil, dropped
		}
		if f.deficit <= 0 {
			f.deficit += quantum
			l.remove()
			q.oldFlows.append(f)
			continue
		}
		p, d := f.next(now)
		dropped += d
		if p == nil {
			l.remove()
			if l == &q.newFlows && q.oldFlows.first != nil {
				// Otherwise a flow with one packet at a time would always
				// have the first turn.
				q.oldFlows.append(f)
			} else {
				f.listed = false
			}
			continue
		}
		f.deficit -= p.Size
		return p, dropped
	}
}

// Close drops all packets and makes Pop return. Later calls of Push drop their
// packets.
func (q *Queue) Close() {
	q.mu.Lock()
	q.isClosed = true
	if q.flows != nil {
		for i := range q.flows {
			for f := &q.flows[i]; f.first != nil; {
				f.pop().Free()
			}
		}
	}
	q.subtract(q.packets)
	q.flows, q.newFlows, q.oldFlows = nil, list{}, list{}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// list is a linked list of flows in the order of their turns.
type list struct{ first, last *flow }

// append adds f at the end of the list.
func (l *list) append(f *flow) {
	f.after = nil
	if l.first == nil {
		l.first = f
	} else {
		l.last.after = f
	}
	l.last = f
}

// remove removes the first flow from the list.
func (l *list) remove() { l.first = l.first.after }
