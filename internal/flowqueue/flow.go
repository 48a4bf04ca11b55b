package flowqueue

import (
	"math"
	"time"
)

const (
	// target is how long packets of a flow may wait at all times, interval how long they may wait longer than that before one
	// is dropped (RFC 8289 section 4.2 and 4.3).
	target   = 5 * time.Millisecond
	interval = 100 * time.Millisecond
)

// flow is the packets of one flow, and the state of CoDel for it (RFC 8289 section 5).
type flow struct {
	first, last *Packet
	bytes       int
	deficit     int // bytes that it may still send in this turn
	listed      bool
	after       *flow // of the list that it is in

	above    time.Duration // when it will have waited too long for an interval; 0 when it does not
	dropping bool
	dropNext time.Duration // when the next packet is dropped, while dropping
	count    uint32        // of packets dropped since dropping began
	previous uint32        // count when it last began
}

func (f *flow) push(p *Packet) {
	if f.first == nil {
		f.first = p
	} else {
		f.last.after = p
	}
	f.last = p
	f.bytes += p.Size
}

// pop takes the oldest packet, nil for none.
func (f *flow) pop() *Packet {
	p := f.first
	if p != nil {
		f.first, p.after = p.after, nil
		f.bytes -= p.Size
	}
	return p
}

// next takes the packet to send next, nil for none, and drops those before it whose time has come.
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
		// What was the right rate a moment ago is close to what it is now.
		delta := f.count - f.previous
		f.count = 1
		if delta > 1 && now-f.dropNext < 16*interval {
			f.count = delta
		}
		f.dropNext = dropAfter(now, f.count)
		f.previous = f.count
	}
	return p, dropped
}

// take is pop that reports whether packets have been waiting too long all through the last interval.
func (f *flow) take(now time.Duration) (p *Packet, late bool) {
	p = f.pop()
	switch {
	case p == nil || now-p.queued < target || f.bytes <= quantum:
		f.above = 0
	case f.above == 0:
		f.above = now + interval
	default:
		late = now >= f.above
	}
	return p, late
}

// dropAfter is when the packet after the one of time t is dropped: the more there were, the sooner.
func dropAfter(t time.Duration, count uint32) time.Duration {
	return t + time.Duration(float64(interval)/math.Sqrt(float64(count)))
}
