package main

// files are added to the module.
var files = map[string]string{
	"internal/congestion/uncontrolled.go": `package congestion

import (
	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
)

// uncontrolled sends whatever there is to send.
type uncontrolled struct{}

// NewUncontrolledSender returns a SendAlgorithm that does not limit.
func NewUncontrolledSender() SendAlgorithmWithDebugInfos { return uncontrolled{} }

func (uncontrolled) TimeUntilSend(protocol.ByteCount) monotime.Time { return 0 }
func (uncontrolled) HasPacingBudget(monotime.Time) bool             { return true }
func (uncontrolled) OnPacketSent(monotime.Time, protocol.ByteCount, protocol.PacketNumber, protocol.ByteCount, bool) {
}
func (uncontrolled) CanSend(protocol.ByteCount) bool { return true }
func (uncontrolled) MaybeExitSlowStart()             {}
func (uncontrolled) OnPacketAcked(protocol.PacketNumber, protocol.ByteCount, protocol.ByteCount, monotime.Time) {
}
func (uncontrolled) OnCongestionEvent(protocol.PacketNumber, protocol.ByteCount, protocol.ByteCount) {}
func (uncontrolled) OnSpuriousLoss(protocol.PacketNumber)                                           {}
func (uncontrolled) OnRetransmissionTimeout(bool)                                                   {}
func (uncontrolled) SetMaxDatagramSize(protocol.ByteCount)                                          {}
func (uncontrolled) InSlowStart() bool                                                              { return false }
func (uncontrolled) InRecovery() bool                                                               { return false }
func (uncontrolled) GetCongestionWindow() protocol.ByteCount                                        { return protocol.MaxByteCount }
`,
	"internal/ackhandler/sender.go": `package ackhandler

import (
	"github.com/quic-go/quic-go/internal/congestion"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/utils"
	"github.com/quic-go/quic-go/qlogwriter"
)

// newSender chooses the congestion controller of a path.
func newSender(
	uncontrolled bool,
	rttStats *utils.RTTStats,
	connStats *utils.ConnectionStats,
	initialMaxDatagramSize protocol.ByteCount,
	qlogger qlogwriter.Recorder,
) congestion.SendAlgorithmWithDebugInfos {
	if uncontrolled {
		return congestion.NewUncontrolledSender()
	}
	return congestion.NewCubicSender(congestion.DefaultClock{}, rttStats, connStats, initialMaxDatagramSize, true, qlogger)
}
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
			"	// Uncontrolled turns congestion control and ECN off, for connections that carry little but datagrams with\n" +
			"	// packets that are controlled themselves.\n	Uncontrolled bool\n"},
	{"congestion", "config.go", "populateConfig",
		"		EnableDatagrams:                  config.EnableDatagrams,\n",
		"		EnableDatagrams:                  config.EnableDatagrams,\n		Uncontrolled: config.Uncontrolled,\n"},
	{"congestion", "connection.go", "newConnection", newHandlerServer, "ackhandler.NewSentPacketHandler(\n		s.config.Uncontrolled,\n		0,\n"},
	{"congestion", "connection.go", "newClientConnection", newHandlerClient, "ackhandler.NewSentPacketHandler(\n		s.config.Uncontrolled,\n		initialPacketNumber,\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	initialPN protocol.PacketNumber,\n", "	uncontrolled bool,\n	initialPN protocol.PacketNumber,\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	congestion := congestion.NewCubicSender(\n		congestion.DefaultClock{},\n		rttStats,\n		connStats,\n		initialMaxDatagramSize,\n		true, // use Reno\n		qlogger,\n	)\n",
		"	sender := newSender(uncontrolled, rttStats, connStats, initialMaxDatagramSize, qlogger)\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"		congestion:         congestion,\n", "		congestion:         sender,\n		uncontrolled: uncontrolled,\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "NewSentPacketHandler",
		"	if enableECN {\n", "	if enableECN && !uncontrolled { // RFC 9484 section 10: Not-ECT\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "sentPacketHandler",
		"	congestion congestion.SendAlgorithmWithDebugInfos\n", "	congestion congestion.SendAlgorithmWithDebugInfos\n	uncontrolled bool\n"},
	{"congestion", "internal/ackhandler/sent_packet_handler.go", "sentPacketHandler.MigratedPath",
		"congestion.NewCubicSender(\n		congestion.DefaultClock{},\n		h.rttStats,\n		h.connStats,\n		initialMaxDatagramSize,\n		true, // use Reno\n		h.qlogger,\n	)\n",
		"newSender(h.uncontrolled, h.rttStats, h.connStats, initialMaxDatagramSize, h.qlogger)\n"},

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
