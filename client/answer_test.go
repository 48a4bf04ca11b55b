package client

import (
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// A new sample of the round-trip time shows an acknowledgement. Packets that
// the proxy retransmits, because it receives nothing, bring no sample.
func TestAnswerWatch(t *testing.T) {
	for _, tc := range []struct {
		name         string
		rtts         []time.Duration // sample that each check sees
		acknowledged bool            // wanted from the last check
		why          string
	}{
		{"first check", []time.Duration{9}, false, "waiting for the first answer"},
		{"too early", []time.Duration{9, 12}, false, "waiting for the first answer"},
		{"acknowledged", []time.Duration{9, 12, 14}, true, ""},
		{"nothing is acknowledged", []time.Duration{9, 9, 9, 9}, false, "does not acknowledge"},
		{"nothing is acknowledged any more", []time.Duration{9, 12, 12}, false,
			"does not acknowledge"},
		{"acknowledged late", []time.Duration{9, 9, 9, 9, 12}, true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var w answerWatch
			var acknowledged bool
			var why string
			for _, rtt := range tc.rtts {
				acknowledged, why = w.check(quic.ConnectionStats{LatestRTT: rtt})
			}
			if acknowledged != tc.acknowledged || !strings.Contains(why, tc.why) {
				t.Errorf("got %t, %q, want %t, %q", acknowledged, why, tc.acknowledged, tc.why)
			}
		})
	}
}
