package ackhandler

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/congestion"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/utils"
	"github.com/quic-go/quic-go/qlogwriter"
)

// congestionSwitch turns congestion control on when it becomes true. nil means
// that congestion control is always on.
type congestionSwitch = atomic.Bool

// newSender returns the congestion controller of a path.
func newSender(
	on *congestionSwitch,
	rttStats *utils.RTTStats,
	connStats *utils.ConnectionStats,
	initialMaxDatagramSize protocol.ByteCount,
	qlogger qlogwriter.Recorder,
) congestion.SendAlgorithmWithDebugInfos {
	reno := congestion.NewCubicSender(congestion.DefaultClock{}, rttStats, connStats,
		initialMaxDatagramSize, true, qlogger)
	if on == nil {
		return reno
	}
	return congestion.NewOptionalSender(reno, on)
}
