package connectip

import (
	"fmt"
	"iter"
	"sync/atomic"
	"time"
)

// Stage is a place where packets wait on their way through this process.
type Stage uint8

// The stages, each way in the order in which packets pass them.
const (
	StageDeviceRead  Stage = iota // taken from the device, and not given to a tunnel's queue yet
	StageFlowQueue                // in the queue of a tunnel
	StageSender                   // taken from that, and not taken by QUIC yet
	StageQUICReceive              // come in, and not looked at by QUIC yet
	StageInbox                    // taken from QUIC, and not given to the device's writer yet
	StageDeviceWrite              // being written to the device
	numStages
)

var stageNames = [numStages]string{"device_read", "flow_queue", "sender", "quic_receive", "inbox",
	"device_write"}

func (s Stage) String() string { return stageNames[s] }

// StuckAfter is the age of a packet from which on its stage is stuck.
const StuckAfter = 5 * time.Second

// own are the stages that wait for nothing but this process and its kernel,
// those first that others wait for. The stages on the way into a tunnel wait
// for its peer, who must not be able to have the program counted as ill.
var own = []Stage{StageDeviceWrite, StageInbox, StageQUICReceive, StageDeviceRead}

// Ages are the ages of the oldest packet in each stage, 0 where none waits.
type Ages [numStages]time.Duration

// Note takes into account that a packet of so great an age is in stage s.
func (a *Ages) Note(s Stage, age time.Duration) { a[s] = max(a[s], age) }

// Each goes over all stages.
func (a *Ages) Each() iter.Seq2[string, time.Duration] {
	return func(yield func(string, time.Duration) bool) {
		for s, age := range a {
			if !yield(stageNames[s], age) {
				return
			}
		}
	}
}

// Milliseconds returns the ages by the names of their stages.
func (a *Ages) Milliseconds() map[string]int64 {
	m := make(map[string]int64, len(a))
	for stage, age := range a.Each() {
		m[stage] = age.Milliseconds()
	}
	return m
}

// Stuck says which stage is stuck for a reason that is not a peer's, nil for
// none.
func (a *Ages) Stuck() error {
	for _, s := range own {
		if a[s] > StuckAfter {
			return fmt.Errorf("packets are stuck: the oldest in the stage %s waits for %v", s,
				a[s].Round(time.Second))
		}
	}
	return nil
}

var began = time.Now()

// Busy tells for how long something has been at work on packets. One goroutine
// begins and ends it; any may ask. The zero value is at rest.
type Busy struct{ since atomic.Int64 } // nanoseconds after began, 0 at rest

// Begin notes that packets came, if none were there.
func (b *Busy) Begin() { b.since.Store(int64(time.Since(began)) + 1) }

// End notes that none is there any more.
func (b *Busy) End() { b.since.Store(0) }

// Age returns how long ago Begin was called, 0 after End.
func (b *Busy) Age() time.Duration {
	since := b.since.Load()
	if since == 0 {
		return 0
	}
	return max(1, time.Since(began)-time.Duration(since))
}

// writers are the goroutines of a Conn that write to the device: QUIC's, that
// of the inbox, that which reads the stream, and that which takes datagrams by
// way of it.
type writers struct{ quic, inbox, capsules, stream Busy }

// AddAges takes into account in a what waits in the stages of c, but not what
// waits to be sent.
func (c *Conn) AddAges(a *Ages) {
	a.Note(StageQUICReceive, c.datagrams.oldestReceived())
	a.Note(StageInbox, c.filling.Age())
	for _, b := range []*Busy{&c.writers.quic, &c.writers.inbox, &c.writers.capsules,
		&c.writers.stream} {
		a.Note(StageDeviceWrite, b.Age())
	}
}
