package flowqueue

import (
	"math"
	"time"
)

const (
	// target is the acceptable standing delay of a flow (RFC 8289 section 4.3).
	target = 5 * time.Millisecond

	// interval is the time after which CoDel drops a packet if all packets of
	// a flow wait longer than target (RFC 8289 section 4.2).
	interval = 100 * time.Millisecond
)

// flow is the queue of one flow with its CoDel state (RFC 8289 section 5).
// Times are readings of the clock of its Queue, whose lock guards all fields.
type flow struct {
	first, last *Packet
	bytes       int

	// deficit is the number of bytes that the flow may still send in this turn.
	deficit int

	// listed reports whether the flow is in a list of its Queue, where after is
	// the next one.
	listed bool
	after  *flow

	// firstAbove is the time when packets will have waited longer than target
	// for an interval. It is 0 if the last packet waited for less.
	firstAbove time.Duration

	// dropping means that the flow is in CoDel's dropping state, where it drops
	// the next packet at dropNext.
	dropping bool
	dropNext time.Duration

	// count is the number of packets dropped since the flow entered the
	// dropping state. lastCount is the count with which it last entered.
	count     uint32
	lastCount uint32
}

// push appends p to the flow.
func (f *flow) push(p *Packet) {
	if f.first == nil {
		f.first = p
	} else {
		f.last.after = p
	}
	f.last = p
	f.bytes += p.Size
}

// pop removes and returns the oldest packet, or nil if there is none.
func (f *flow) pop() *Packet {
	p := f.first
	if p != nil {
		f.first, p.after = p.after, nil
		f.bytes -= p.Size
	}
	return p
}

// next removes and returns the packet to send next, or nil if there is none. It
// first drops the packets that CoDel selects, and returns their number.
func (f *flow) next(now time.Duration) (p *Packet, dropped int) {
	p, late := f.take(now)
	switch {
	case f.dropping && !late:
		f.dropping = false
	case f.dropping:
		for f.dropping && now >= f.dropNext {
			p.Free()
			dropped++
			f.count++
			if p, late = f.take(now); late {
				f.dropNext = dropAfter(f.dropNext, f.count)
			} else {
				f.dropping = false
			}
		}
	case late:
		p.Free()
		dropped++
		p, _ = f.take(now)
		f.dropping = true
		// If dropping ended only recently, its rate of drops is a good start.
		delta := f.count - f.lastCount
		f.count = 1
		if delta > 1 && now-f.dropNext < 16*interval {
			f.count = delta
		}
		f.dropNext = dropAfter(now, f.count)
		f.lastCount = f.count
	}
	return p, dropped
}

// take is like pop. It also reports whether all packets in the last interval
// waited longer than target.
func (f *flow) take(now time.Duration) (p *Packet, late bool) {
	p = f.pop()
	switch {
	case p == nil || now-p.queued < target || f.bytes <= quantum:
		f.firstAbove = 0
	case f.firstAbove == 0:
		f.firstAbove = now + interval
	default:
		late = now >= f.firstAbove
	}
	return p, late
}

// dropAfter returns the time of the drop after the one at time t. The time
// between drops decreases with the square root of count.
func dropAfter(t time.Duration, count uint32) time.Duration {
	return t + time.Duration(float64(interval)/math.Sqrt(float64(count)))
}
