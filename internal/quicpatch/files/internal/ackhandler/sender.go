package ackhandler

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/congestion"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/utils"
	"github.com/quic-go/quic-go/qlogwriter"
)

// congestionSwitch turns congestion control on; nil where it always is.
type congestionSwitch = atomic.Bool

// newSender makes the congestion controller of a path.
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
