package congestion

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
)

// optional is a congestion controller that is disabled until on is true: it
// limits nothing and ignores events.
type optional struct {
	SendAlgorithmWithDebugInfos
	on *atomic.Bool
}

// NewOptionalSender returns s as a controller that is disabled until on is
// true.
func NewOptionalSender(s SendAlgorithmWithDebugInfos, on *atomic.Bool) SendAlgorithmWithDebugInfos {
	return optional{s, on}
}

func (o optional) TimeUntilSend(inFlight protocol.ByteCount) monotime.Time {
	if !o.on.Load() {
		return 0
	}
	return o.SendAlgorithmWithDebugInfos.TimeUntilSend(inFlight)
}

func (o optional) HasPacingBudget(now monotime.Time) bool {
	return !o.on.Load() || o.SendAlgorithmWithDebugInfos.HasPacingBudget(now)
}

func (o optional) CanSend(inFlight protocol.ByteCount) bool {
	return !o.on.Load() || o.SendAlgorithmWithDebugInfos.CanSend(inFlight)
}

func (o optional) GetCongestionWindow() protocol.ByteCount {
	if !o.on.Load() {
		return protocol.MaxByteCount
	}
	return o.SendAlgorithmWithDebugInfos.GetCongestionWindow()
}

func (o optional) OnPacketSent(t monotime.Time, inFlight protocol.ByteCount,
	pn protocol.PacketNumber, size protocol.ByteCount, retransmittable bool) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnPacketSent(t, inFlight, pn, size, retransmittable)
	}
}

func (o optional) OnPacketAcked(pn protocol.PacketNumber, size, priorInFlight protocol.ByteCount,
	t monotime.Time) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnPacketAcked(pn, size, priorInFlight, t)
	}
}

func (o optional) OnCongestionEvent(pn protocol.PacketNumber, lost,
	priorInFlight protocol.ByteCount) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnCongestionEvent(pn, lost, priorInFlight)
	}
}

func (o optional) OnSpuriousLoss(pn protocol.PacketNumber) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnSpuriousLoss(pn)
	}
}

func (o optional) MaybeExitSlowStart() {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.MaybeExitSlowStart()
	}
}
