package client

import (
	"time"

	"github.com/quic-go/quic-go"
)

// answerWatch waits for the answer to what the client sends into a tunnel that
// has its addresses and routes, and finds out whether the far end acknowledges
// it meanwhile. The zero value waits for nothing.
type answerWatch struct {
	C        <-chan time.Time
	tick     *time.Ticker
	looks    int
	received uint64 // packets from the proxy at the last look
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
// probes are all that is sent, so whatever comes acknowledges them.
func (w *answerWatch) look(stats quic.ConnectionStats) (acknowledged bool, why string) {
	comes := w.looks > 0 && stats.PacketsReceived > w.received
	w.looks, w.received = w.looks+1, stats.PacketsReceived
	switch {
	case w.looks > 1 && !comes:
		return false, "nothing comes from the proxy, not even acknowledgements of what is sent into the tunnel"
	case w.looks < answerLooks:
		return false, "waiting for the first answer through the tunnel"
	}
	return true, ""
}
