// Package flowqueue holds the packets that wait to be sent into a tunnel: one queue for each flow, served in turns, each kept short
// by CoDel (FQ-CoDel, RFC 8290). A bulk transfer fills its own queue and is told to slow down by a drop now and then; what shares
// the tunnel with it does not wait behind it.
package flowqueue

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"masquevpn/internal/ippacket"
)

const (
	// Limit is how many packets a queue holds at most: as much as one TCP connection sends at once, so that it is CoDel that slows
	// it down, with a drop here and there.
	Limit = 4096
	// maxTotal is how many packets the queues of this process hold together, which is some 117 MB.
	maxTotal = 1 << 16
	// reserve is how many of these are for queues that have few, no more than minLimit each, while others have taken all the rest.
	reserve  = maxTotal / 8
	minLimit = 16
	// buckets is how many flows are told apart; those that share one are served as one.
	buckets = 128
	// quantum is how many bytes a flow may send in one turn.
	quantum = 1514
)

// total is how many packets wait in all queues.
var total atomic.Int64

// Queue is the packets that wait for one sender. It costs little while nothing waits.
type Queue struct {
	wake chan struct{} // of Pop, that there may be something
	seed maphash.Seed
	now  func() time.Duration

	mu       sync.Mutex
	flows    *[buckets]flow // nil until the first packet
	fresh    list           // flows that had nothing to send until now: they go first, once
	old      list
	packets  int
	popping  bool // Pop waits
	isClosed bool
}

// New returns an empty Queue.
func New() *Queue {
	start := time.Now()
	return &Queue{wake: make(chan struct{}, 1), seed: maphash.MakeSeed(), now: func() time.Duration { return time.Since(start) }}
}

// Push queues packets, which are the queue's from then on, and returns how many were dropped to make room; they need not be of these.
// It never waits. A closed Queue drops all.
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
	defer q.mu.Unlock() // also when this panics: those who push serve more than one peer
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
		f := &q.flows[ippacket.FlowHash(q.seed, p.Bytes()[Headroom:])%buckets]
		p.queued = now
		f.push(p)
		if !f.listed {
			f.listed, f.deficit = true, quantum
			q.fresh.append(f)
		}
	}
	q.packets += len(packets)
	if dropped = q.excess(int(total.Add(int64(len(packets))))); dropped > 0 {
		q.drop(dropped)
	}
	return dropped, false
}

// Oldest returns for how long the oldest packet has been waiting, 0 when none waits.
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

// excess returns how many packets q has too many while all queues together have so many. A queue may have as many as it leaves free
// for others (the dynamic thresholds of Choudhury and Hahne): those that are flooded so come to have equal parts.
func (q *Queue) excess(all int) int {
	others := all - q.packets
	limit := min(Limit, max(minLimit, (maxTotal-reserve-others)/2))
	return min(q.packets, max(0, q.packets-limit, all-maxTotal))
}

// drop drops n packets, the oldest of those flows that have most.
func (q *Queue) drop(n int) {
	for left := n; left > 0; {
		var longest *flow
		for i := range q.flows {
			if f := &q.flows[i]; f.first != nil && (longest == nil || f.bytes > longest.bytes) {
				longest = f
			}
		}
		// As many at once as is fair, because the search takes longer than a drop.
		for enough := longest.bytes / 2; left > 0 && longest.first != nil && longest.bytes >= enough; left-- {
			longest.pop().Free()
		}
	}
	q.took(n)
}

// took counts n packets that do not wait any more.
func (q *Queue) took(n int) {
	q.packets -= n
	total.Add(-int64(n))
}

// Pop waits for packets, fills into with those to send next, and returns their number; they are the caller's. It returns too how
// many were dropped because their flow has been waiting for too long. It returns 0 packets only when the Queue is
// closed. Only one goroutine may call it.
func (q *Queue) Pop(into []*Packet) (n, dropped int) {
	for {
		q.mu.Lock()
		q.popping = false
		if q.packets > 0 {
			now := q.now()
			for n < len(into) {
				p, d := q.next(now)
				dropped += d
				if p == nil {
					break
				}
				into[n] = p
				n++
			}
			q.took(n + dropped)
		}
		closed := q.isClosed
		q.popping = n == 0 && !closed
		q.mu.Unlock()
		if n > 0 || closed {
			return n, dropped
		}
		<-q.wake
	}
}

// Idle reports whether nothing waits, and what was taken before is sent: a packet that goes past the queue overtakes none. It holds
// until the next Push.
func (q *Queue) Idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.popping && q.packets == 0
}

// next takes the packet that is to go next, nil for none (RFC 8290 section 4.2).
func (q *Queue) next(now time.Duration) (p *Packet, dropped int) {
	for {
		l := &q.fresh
		if l.first == nil {
			l = &q.old
		}
		f := l.first
		if f == nil {
			return nil, dropped
		}
		if f.deficit <= 0 {
			f.deficit += quantum
			l.remove()
			q.old.append(f)
			continue
		}
		p, d := f.next(now)
		dropped += d
		if p == nil {
			l.remove()
			if l == &q.fresh && q.old.first != nil {
				q.old.append(f) // or it would go first again and again
			} else {
				f.listed = false
			}
			continue
		}
		f.deficit -= p.Size
		return p, dropped
	}
}

// Close drops what waits, and what comes, and ends Pop.
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
	q.took(q.packets)
	q.flows, q.fresh, q.old = nil, list{}, list{}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// list is flows in the order of their turns.
type list struct{ first, last *flow }

func (l *list) append(f *flow) {
	f.after = nil
	if l.first == nil {
		l.first = f
	} else {
		l.last.after = f
	}
	l.last = f
}

// remove takes the first flow off the list.
func (l *list) remove() { l.first = l.first.after }
