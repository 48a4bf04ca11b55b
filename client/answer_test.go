package client

import (
	"strings"
	"testing"

	"github.com/quic-go/quic-go"
)

// Only what comes while nothing but probes is sent counts as an acknowledgement.
func TestAnswerWatch(t *testing.T) {
	for _, tc := range []struct {
		name         string
		received     []uint64 // packets at each look
		acknowledged bool     // at the last look
		why          string
	}{
		{"first look", []uint64{9}, false, "waiting for the first answer"},
		{"too early", []uint64{9, 12}, false, "waiting for the first answer"},
		{"acknowledged", []uint64{9, 12, 14}, true, ""},
		{"nothing comes", []uint64{9, 9, 9, 9}, false, "not even acknowledgements"},
		{"nothing comes any more", []uint64{9, 12, 12}, false, "not even acknowledgements"},
		{"comes late", []uint64{9, 9, 9, 9, 12}, true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var w answerWatch
			var acknowledged bool
			var why string
			for _, n := range tc.received {
				acknowledged, why = w.look(quic.ConnectionStats{PacketsReceived: n})
			}
			if acknowledged != tc.acknowledged || !strings.Contains(why, tc.why) {
				t.Errorf("got %t, %q, want %t, %q", acknowledged, why, tc.acknowledged, tc.why)
			}
		})
	}
}
