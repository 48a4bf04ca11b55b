package client

import (
	"time"

	"github.com/quic-go/quic-go"
)

// answerWatch watches a new tunnel while the client's probes are unanswered: it
// finds out whether the proxy at least acknowledges them. C fires when check is
// due. The zero value never fires.
type answerWatch struct {
	C      <-chan time.Time
	tick   *time.Ticker
	checks int // calls of check

	// rtt is the round-trip time of the packet that was last acknowledged
	// before the last check.
	rtt time.Duration
}

func newAnswerWatch() answerWatch {
	tick := time.NewTicker(answerInterval)
	return answerWatch{C: tick.C, tick: tick}
}

func (w *answerWatch) stop() {
	if w.tick != nil {
		w.tick.Stop()
	}
	w.C = nil
}

// check is called when C fires. It reports whether the proxy has acknowledged
// probes and had enough time to answer them; if not, why describes the state.
//
// Between two checks the client sends nothing but probes, so an acknowledgement
// is one of probes. QUIC takes a sample of the round-trip time with each
// acknowledgement of new packets and at no other time (RFC 9002 section 5.1).
// Received packets prove nothing, because a peer that receives nothing
// retransmits its own.
func (w *answerWatch) check(stats quic.ConnectionStats) (acknowledged bool, why string) {
	acknowledged = w.checks > 0 && stats.LatestRTT != w.rtt
	w.checks, w.rtt = w.checks+1, stats.LatestRTT
	switch {
	case w.checks > 1 && !acknowledged:
		return false, "the proxy does not acknowledge packets sent into the tunnel"
	case w.checks < answerChecks:
		return false, "waiting for the first answer through the tunnel"
	}
	return true, ""
}
