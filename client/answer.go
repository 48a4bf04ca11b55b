package client

import (
	"time"

	"github.com/quic-go/quic-go"
)

// answerWatch waits for the answer to what the client sends into a tunnel that
// has its addresses and routes, and finds out whether the far end acknowledges
// it meanwhile. The zero value waits for nothing.
type answerWatch struct {
	C      <-chan time.Time
	tick   *time.Ticker
	checks int
	rtt    time.Duration // round trip of the last acknowledged packet, at the last look
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

// look is called when C fires. It reports whether the far end has acknowledged
// datagrams and had the time to answer them, and why not. Between two looks
// probes are all that is sent, so what is acknowledged are probes. QUIC takes a
// sample of the round trip time with each acknowledgement of new packets, and
// only then; packets that come are not enough, because a far end that receives
// nothing repeats its own.
func (w *answerWatch) check(stats quic.ConnectionStats) (acknowledged bool, why string) {
	acknowledged = w.checks > 0 && stats.LatestRTT != w.rtt
	w.checks, w.rtt = w.checks+1, stats.LatestRTT
	switch {
	case w.checks > 1 && !acknowledged:
		return false, "the proxy does not acknowledge what is sent into the tunnel"
	case w.checks < answerChecks:
		return false, "waiting for the first answer through the tunnel"
	}
	return true, ""
}
