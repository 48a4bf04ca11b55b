package main

// files are added to the module.
var files = map[string]string{
	"internal/congestion/optional.go": `package congestion

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
)

// optional is a controller that lets everything be sent, and hears of nothing, until on is set.
type optional struct {
	SendAlgorithmWithDebugInfos
	on *atomic.Bool
}

// NewOptionalSender returns a controller that does what s does once on is set.
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

func (o optional) OnPacketSent(t monotime.Time, inFlight protocol.ByteCount, pn protocol.PacketNumber, size protocol.ByteCount, retransmittable bool) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnPacketSent(t, inFlight, pn, size, retransmittable)
	}
}

func (o optional) OnPacketAcked(pn protocol.PacketNumber, size, priorInFlight protocol.ByteCount, t monotime.Time) {
	if o.on.Load() {
		o.SendAlgorithmWithDebugInfos.OnPacketAcked(pn, size, priorInFlight, t)
	}
}

func (o optional) OnCongestionEvent(pn protocol.PacketNumber, lost, priorInFlight protocol.ByteCount) {
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
`,
	"internal/ackhandler/sender.go": `package ackhandler

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
	reno := congestion.NewCubicSender(congestion.DefaultClock{}, rttStats, connStats, initialMaxDatagramSize, true, qlogger)
	if on == nil {
		return reno
	}
	return congestion.NewOptionalSender(reno, on)
}
`,
	"control_congestion.go": `package quic

import "sync/atomic"

// congestionSwitch turns congestion control on; nil where it always is.
func (c *Conn) congestionSwitch() *atomic.Bool {
	if !c.config.Uncontrolled {
		return nil
	}
	return &c.controlled
}

// ControlCongestion turns congestion control on, for good, on a connection with Config.Uncontrolled.
func (c *Conn) ControlCongestion() { c.controlled.Store(true) }
`,
	"gso_segments.go": `package quic

// maxGSOSegments is how many segments every kernel with UDP GSO takes in one message.
const maxGSOSegments = 64
`,
}

// edits in the order in which they are made.
var edits = []edit{
	// Congestion control can be left to what is inside the tunnel (RFC 9484 section 10).
	{"congestion", "interface.go", "Config",
		"	// Enable QUIC datagram support (RFC 9221).\n	EnableDatagrams bool\n",
		"	// Enable QUIC datagram support (RFC 9221).\n	EnableDatagrams bool\n" +
			"	// Uncontrolled turns ECN off, and congestion control until Conn.ControlCongestion is called, for connections\n" +
			"	// that carry little but datagrams with packets that are controlled themselves.\n	Uncontrolled bool\n"},
	{"congestion", "config.go", "populateConfig",
		"		EnableDatagrams:                  config.EnableDatagrams,\n",
		"		EnableDatagrams:                  config.EnableDatagrams,\n		Uncontrolled: config.Uncontrolled,\n"},
	{"congestion", "connection.go", "newConnection", newHandlerServer, "ackhandler.NewSentPacketHandler(\n		s.congestionSwitch(),\n		0,\n"},
	{"congestion", "connection.go", "newClientConnection", newHandlerClient, "ackhandler.NewSentPacketHandler(\n		s.congestionSwitch(),\n		initialPacketNumber,\n"},
	{"congestion", "connection.go", "Conn", "	config      *Config\n", "	config      *Config\n	controlled  atomic.Bool\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	initialPN protocol.PacketNumber,\n", "	on *congestionSwitch,\n	initialPN protocol.PacketNumber,\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	congestion := congestion.NewCubicSender(\n		congestion.DefaultClock{},\n		rttStats,\n		connStats,\n		initialMaxDatagramSize,\n		true, // use Reno\n		qlogger,\n	)\n",
		"	sender := newSender(on, rttStats, connStats, initialMaxDatagramSize, qlogger)\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"		congestion:         congestion,\n", "		congestion:         sender,\n		on: on,\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	if enableECN {\n", "	if enableECN && on == nil { // RFC 9484 section 10: Not-ECT\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "sentPacketHandler",
		"	congestion congestion.SendAlgorithmWithDebugInfos\n", "	congestion congestion.SendAlgorithmWithDebugInfos\n	on *congestionSwitch\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "sentPacketHandler.MigratedPath",
		"congestion.NewCubicSender(\n		congestion.DefaultClock{},\n		h.rttStats,\n		h.connStats,\n		initialMaxDatagramSize,\n		true, // use Reno\n		h.qlogger,\n	)\n",
		"newSender(h.on, h.rttStats, h.connStats, initialMaxDatagramSize, h.qlogger)\n"},

	// Queues that cover a scheduling delay at tunnel speed: what they drop was acknowledged already.
	{"queues", "datagram_queue.go", "maxDatagramRcvQueueLen", "128", "4096"},
	{"queues", "datagram_queue.go", "maxDatagramSendQueueLen", "32", "256"},
	{"queues", "http3/state_tracking_stream.go", "streamDatagramQueueLen", "32", "4096"},
	{"queues", "internal/protocol/params.go", "MaxConnUnprocessedPackets", "256", "4096"},

	// GSO for any run of packets of equal size, the last one possibly shorter. Stock quic-go wants each packet to be of exactly
	// the maximum size, which packets with datagrams never are. A packet that turns out larger than those before it
	// begins the next batch; the send queue has one place to spare for it.
	{"gso", "connection.go", "Conn.sendPacketsWithGSO",
		"	ecn := c.sentPacketHandler.ECNMode(true)\n	for {\n",
		"	ecn := c.sentPacketHandler.ECNMode(true)\n	var segmentSize protocol.ByteCount // of the packets in buf\n	var segments int\n	for {\n"},
	{"gso", "connection.go", "Conn.sendPacketsWithGSO",
		"			dontSendMore = true\n		}\n\n		if !dontSendMore {\n",
		"			dontSendMore = true\n		}\n		if size > segmentSize && segments > 0 {\n" +
			"			next := getLargePacketBuffer()\n			next.Data = append(next.Data, buf.Data[buf.Len()-size:]...)\n" +
			"			buf.Data = buf.Data[:buf.Len()-size]\n			c.sendQueue.Send(buf, uint16(segmentSize), ecn)\n" +
			"			buf, segments = next, 0\n			if c.sendQueue.WouldBlock() {\n				c.sendQueue.Send(buf, uint16(size), ecn)\n				return nil\n			}\n		}\n" +
			"		if segments == 0 {\n			segmentSize = size\n		}\n		segments++\n\n		if !dontSendMore {\n"},
	{"gso", "connection.go", "Conn.sendPacketsWithGSO",
		"size == maxSize && nextECN == ecn && buf.Len()+maxSize <= buf.Cap()",
		"size == segmentSize && nextECN == ecn && segments < maxGSOSegments && buf.Len()+maxSize <= buf.Cap()"},
	{"gso", "connection.go", "Conn.sendPacketsWithGSO",
		"		c.sendQueue.Send(buf, uint16(maxSize), ecn)\n", "		c.sendQueue.Send(buf, uint16(segmentSize), ecn)\n"},
	{"gso", "connection.go", "Conn.sendPacketsWithGSO",
		"		ecn = nextECN\n		buf = getLargePacketBuffer()\n", "		ecn = nextECN\n		buf, segments = getLargePacketBuffer(), 0\n"},
	{"gso", "send_queue.go", "newSendQueue",
		"make(chan queueEntry, sendQueueCapacity)", "make(chan queueEntry, sendQueueCapacity+1)"},
	{"gso", "send_queue.go", "sendQueue.Send",
		"len(h.queue) == sendQueueCapacity", "len(h.queue) >= sendQueueCapacity"},
	{"gso", "send_queue.go", "sendQueue.WouldBlock",
		"len(h.queue) == sendQueueCapacity", "len(h.queue) >= sendQueueCapacity"},

	// The frame parser has made a copy already, which nothing else keeps.
	{"copies", "datagram_queue.go", "datagramQueue.HandleDatagramFrame",
		"	data := make([]byte, len(f.Data))\n	copy(data, f.Data)\n", "	data := f.Data\n"},
}

const (
	newHandlerServer = "ackhandler.NewSentPacketHandler(\n		0,\n"
	newHandlerClient = "ackhandler.NewSentPacketHandler(\n		initialPacketNumber,\n"
)
