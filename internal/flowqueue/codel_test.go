package flowqueue

import (
	"fmt"
	"testing"
	"time"
)

// fakeClock returns a clock that does not advance.
func fakeClock() func() time.Duration { return func() time.Duration { return 0 } }

// later returns a clock that does not advance, d nanoseconds later than the
// clock of q.
func later(q *Queue, d int64) func() time.Duration {
	now := q.now() + time.Duration(d)
	return func() time.Duration { return now }
}

// link is a Queue in front of a link that sends one packet per millisecond. All
// packets belong to one flow.
type link struct {
	*testing.T
	q     *Queue
	clock time.Duration
	drops []time.Duration // times of CoDel's drops
}

func newLink(t *testing.T) *link {
	l := &link{T: t, q: New()}
	l.q.now = func() time.Duration { return l.clock }
	return l
}

// burst pushes n packets at once.
func (l *link) burst(n int) {
	if l.q.Push(run(1, n, MaxSize)) != 0 {
		l.Fatal("Push dropped packets")
	}
}

// send sends packets for a time of d. If arriving is set, packets arrive as
// fast as they are sent. send returns how long the last packet waited.
func (l *link) send(d time.Duration, arriving bool) (waited time.Duration) {
	for end := l.clock + d; l.clock < end && waiting(l.q) > 0; l.clock += time.Millisecond {
		p, dropped := popOne(l, l.q)
		waited = l.clock - p.queued
		p.Free()
		for range dropped {
			l.drops = append(l.drops, l.clock)
		}
		if arriving {
			l.burst(1)
		}
	}
	return waited
}

// TestStandingQueue checks that CoDel shortens a standing queue. It drops the
// first packet after an interval and the next ones at intervals that decrease
// with the square root of their number. It stops when the queue is short.
func TestStandingQueue(t *testing.T) {
	l := newLink(t)
	l.burst(60)
	waited := l.send(5*time.Second, true)
	if len(l.drops) < 50 || waited > target {
		t.Fatalf("%d packets dropped, and the last packet waited %v", len(l.drops), waited)
	}
	// Before the first interval, a packet has to wait for target.
	want := target + interval
	for i, gap := range []time.Duration{0, 100, 71, 58, 50, 45, 41} {
		want += gap * time.Millisecond
		if d := l.drops[i] - want; d < -2*time.Millisecond || d > 4*time.Millisecond {
			t.Errorf("drop %d came at %v, want about %v; all: %v", i, l.drops[i], want, l.drops)
		}
	}
	before := len(l.drops)
	if l.send(5*time.Second, true); len(l.drops) != before {
		t.Errorf("%d packets of a short queue dropped", len(l.drops)-before)
	}
}

// TestBurst checks that CoDel drops nothing from a queue that is empty again
// within an interval, however long it was.
func TestBurst(t *testing.T) {
	for n, dropped := range map[int]bool{90: false, 300: true} {
		t.Run(fmt.Sprint(n, " packets"), func(t *testing.T) {
			l := newLink(t)
			for range 20 {
				l.burst(n)
				l.send(time.Second, false)
				l.clock += interval
			}
			if got := len(l.drops) > 0; got != dropped {
				t.Errorf("dropped at %v, want drops: %v", l.drops, dropped)
			}
		})
	}
}

// TestDroppingResumes checks that CoDel continues with the previous rate of
// drops if the standing queue returns soon, and with the first one otherwise.
func TestDroppingResumes(t *testing.T) {
	for pause, resumed := range map[time.Duration]bool{interval: true, 20 * interval: false} {
		t.Run(pause.String(), func(t *testing.T) {
			l := newLink(t)
			l.burst(60)
			l.send(2*time.Second, true)
			l.send(time.Second, false)
			l.clock += pause
			l.drops = nil
			l.burst(60)
			l.send(time.Second, true)
			if len(l.drops) < 2 {
				t.Fatalf("dropped at %v", l.drops)
			}
			if gap := l.drops[1] - l.drops[0]; (gap < interval/2) != resumed {
				t.Errorf("%v between the first drops, want the previous rate: %v", gap, resumed)
			}
		})
	}
}

// TestOnlyTheStandingFlowDrops checks that CoDel does not drop packets of a
// thin flow that shares the Queue with a standing one.
func TestOnlyTheStandingFlowDrops(t *testing.T) {
	q := New()
	var clock time.Duration
	q.now = func() time.Duration { return clock }
	flows := ports(q, 2)
	q.Push(run(flows[0], 200, MaxSize))
	thinPackets, late := 0, 0
	for i := range 500 {
		if i%10 == 0 {
			q.Push([]*Packet{packet(flows[1], i/10, minSize)})
		}
		p, dropped := popOne(t, q)
		late += dropped
		if portOf(p) == flows[1] {
			if serialOf(p) != thinPackets {
				t.Fatalf("packet %d of the thin flow came after %d", serialOf(p), thinPackets-1)
			}
			thinPackets++
		} else {
			q.Push([]*Packet{packet(flows[0], i, MaxSize)})
		}
		clock += time.Millisecond
	}
	if thinPackets != 50 || late == 0 {
		t.Errorf("%d packets of the thin flow arrived, and %d of the other were dropped",
			thinPackets, late)
	}
}
