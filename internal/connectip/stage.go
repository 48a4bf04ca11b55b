package connectip

import (
	"fmt"
	"iter"
	"sync/atomic"
	"time"
)

// Stage is a place where packets wait in this process.
type Stage uint8

// The stages of packets into a tunnel and out of a tunnel, each in the order in
// which packets pass them.
const (
	StageDeviceRead Stage = iota // read from the device, not yet queued for a tunnel
	StageFlowQueue               // in the queue of a tunnel
	StageSender                  // taken from the queue, not yet accepted by QUIC

	StageQUICReceive // received, not yet processed by QUIC
	StageInbox       // processed by QUIC, not yet passed to the device's writer
	StageDeviceWrite // being written to the device

	numStages
)

var stageNames = [numStages]string{"device_read", "flow_queue", "sender", "quic_receive", "inbox",
	"device_write"}

// String returns the label of s in status output, metrics and logs.
func (s Stage) String() string { return stageNames[s] }

// StuckAfter is the age of a packet above which its stage is stuck.
const StuckAfter = 5 * time.Second

// localStages contains the stages that wait only for this process and its
// kernel. A stage for which others wait comes before them. StageFlowQueue and
// StageSender are missing, because they wait for the peer, and no peer may make
// the program report itself as unhealthy.
var localStages = []Stage{StageDeviceWrite, StageInbox, StageQUICReceive, StageDeviceRead}

// Ages contains the age of the oldest packet in each stage, 0 if none waits.
type Ages [numStages]time.Duration

// Note records that a packet of the given age is in stage s.
func (a *Ages) Note(s Stage, age time.Duration) { a[s] = max(a[s], age) }

// Each iterates over the labels and ages of all stages.
func (a *Ages) Each() iter.Seq2[string, time.Duration] {
	return func(yield func(string, time.Duration) bool) {
		for s, age := range a {
			if !yield(stageNames[s], age) {
				return
			}
		}
	}
}

// Milliseconds returns the ages by the labels of their stages.
func (a *Ages) Milliseconds() map[string]int64 {
	m := make(map[string]int64, len(a))
	for stage, age := range a.Each() {
		m[stage] = age.Milliseconds()
	}
	return m
}

// Stuck returns an error that names the stage that is stuck for a reason other
// than a peer, or nil if there is none.
func (a *Ages) Stuck() error {
	for _, s := range localStages {
		if a[s] > StuckAfter {
			return fmt.Errorf("packets are stuck: the oldest one in stage %s has waited for %v", s,
				a[s].Round(time.Second))
		}
	}
	return nil
}

// processStart is the reference of Busy.since.
var processStart = time.Now()

// Busy measures for how long a goroutine has been processing packets. That
// goroutine calls Begin and End; Age may be called concurrently. The zero value
// is idle.
type Busy struct {
	// since is the time of Begin in nanoseconds after processStart, plus 1. 0
	// means idle.
	since atomic.Int64
}

// Begin marks b as busy from now on.
func (b *Busy) Begin() { b.since.Store(int64(time.Since(processStart)) + 1) }

// End marks b as idle.
func (b *Busy) End() { b.since.Store(0) }

// Age returns the time since Begin, or 0 if b is idle.
func (b *Busy) Age() time.Duration {
	since := b.since.Load()
	if since == 0 {
		return 0
	}
	return max(1, time.Since(processStart)-time.Duration(since))
}

// writers contains one Busy for each goroutine of a Conn that writes to the
// device.
type writers struct {
	quic     Busy // goroutine that runs the QUIC connection
	inbox    Busy // inbox.deliver
	capsules Busy // Conn.readCapsules
	stream   Busy // Conn.receive
}

// AddAges records in a the packets that wait in the stages of c, from
// StageQUICReceive on.
func (c *Conn) AddAges(a *Ages) {
	a.Note(StageQUICReceive, c.datagrams.oldestReceived())
	a.Note(StageInbox, c.inboxBusy.Age())
	for _, b := range []*Busy{&c.writers.quic, &c.writers.inbox, &c.writers.capsules,
		&c.writers.stream} {
		a.Note(StageDeviceWrite, b.Age())
	}
}
