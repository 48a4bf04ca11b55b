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
	"datagram_send_limit.go": `package quic

import "github.com/quic-go/quic-go/internal/protocol"

// minDatagramSendQueueLen keeps packets at hand for what the pacer lets go at once.
const minDatagramSendQueueLen = 8

// datagramSendLimit is how many datagrams may wait to be packed. Under congestion control they wait for most of the time, so it is an
// eighth of what the window lets be under way, which costs an eighth of a round trip.
func (c *Conn) datagramSendLimit() int {
	if on := c.congestionSwitch(); on != nil && !on.Load() {
		return maxDatagramSendQueueLen
	}
	packets := c.connStats.CongestionWindow.Load() / protocol.InitialPacketSize
	return int(min(max(packets/8, minDatagramSendQueueLen), maxDatagramSendQueueLen))
}
`,
	"admission.go": `package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// What a connection with Config.AwaitAdmission takes from a peer until Admit is called.
const (
	maxPendingPackets   = 16 // that wait to be processed
	maxPendingDatagrams = 32 // in all that have no handler
)

// admission is whether a peer was admitted.
type admission struct {
	done      atomic.Bool
	datagrams int // without a handler so far; of the goroutine that runs the connection
}

// Admit lifts the limits on a connection with Config.AwaitAdmission, and lets the peer have that many bidirectional streams open.
func (c *Conn) Admit(streams int) {
	c.admission.done.Store(true)
	c.streamsMap.incomingBidiStreams.raise(uint64(streams))
}

// pending reports whether the peer has to be admitted still.
func (c *Conn) pending() bool { return c.config.AwaitAdmission && !c.admission.done.Load() }

// maxPackets is how many packets may wait to be processed.
func (c *Conn) maxPackets() int {
	if c.pending() {
		return maxPendingPackets
	}
	return protocol.MaxConnUnprocessedPackets
}

// mayQueueDatagram reports whether one more datagram without a handler is kept.
func (c *Conn) mayQueueDatagram() bool {
	if !c.pending() {
		return true
	}
	c.admission.datagrams++
	return c.admission.datagrams <= maxPendingDatagrams
}

// raise lets the peer have n streams open, if it may have fewer now.
func (m *incomingStreamsMap[T]) raise(n uint64) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if n <= m.maxNumStreams {
		return
	}
	m.maxNumStreams = n
	m.maxStream = m.nextStreamToOpen + 4*protocol.StreamID(n-uint64(len(m.streams))-1)
	m.queueMaxStreamID(&wire.MaxStreamsFrame{Type: m.streamType, MaxStreamNum: m.maxStream.StreamNum()})
}
`,
	"datagram_handlers.go": `package quic

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/wire"
	"github.com/quic-go/quic-go/quicvarint"
)

// DatagramHandler takes datagrams as they come in. Its methods are called by the goroutine that runs the connection: they must
// not wait for it, which SendDatagram does when its queue is full.
type DatagramHandler interface {
	// HandleDatagram takes one datagram, without the number that it begins with. The datagram must not be kept.
	HandleDatagram([]byte)
	// FlushDatagrams is called after one or more datagrams: before another handler gets one, and at the end of each run of packets
	// that were at hand.
	FlushDatagrams()
}

// datagramHandlers are the handlers of a connection by the number that their datagrams begin with.
type datagramHandlers struct {
	mu   sync.Mutex // of changes
	by   atomic.Pointer[map[uint64]DatagramHandler]
	busy DatagramHandler // to be flushed, nil for none
}

// HandleDatagrams gives h, from now on, the datagrams that begin with the number id, as HTTP Datagrams of one stream do (RFC 9297
// section 2.1). With nil they go to ReceiveDatagram again.
func (c *Conn) HandleDatagrams(id uint64, h DatagramHandler) {
	d := &c.datagramHandlers
	d.mu.Lock()
	defer d.mu.Unlock()
	next := make(map[uint64]DatagramHandler)
	if by := d.by.Load(); by != nil {
		maps.Copy(next, *by)
	}
	next[id] = h
	if h == nil {
		delete(next, id)
	}
	d.by.Store(&next)
}

// handle reports whether there is a handler for the datagram.
func (d *datagramHandlers) handle(datagram []byte) bool {
	by := d.by.Load()
	if by == nil {
		return false
	}
	id, n, err := quicvarint.Parse(datagram)
	if err != nil {
		return false
	}
	h := (*by)[id]
	if h == nil {
		return false
	}
	if d.busy != h {
		d.flush()
		d.busy = h
	}
	h.HandleDatagram(datagram[n:])
	return true
}

func (d *datagramHandlers) flush() {
	if d.busy != nil {
		d.busy.FlushDatagrams()
		d.busy = nil
	}
}

// datagramBuffer is what datagrams wait in until they are packed.
type datagramBuffer [1500]byte

var datagramBuffers = sync.Pool{New: func() any { return new(datagramBuffer) }}

func getDatagramBuffer(size int) []byte {
	if size > len(datagramBuffer{}) {
		return make([]byte, size)
	}
	return datagramBuffers.Get().(*datagramBuffer)[:size]
}

// releaseDatagrams takes the contents of datagrams back that were packed, which is once. What remains of them in the history of
// sent packets is not looked at: a datagram has no handler for its loss.
func releaseDatagrams(frames []ackhandler.Frame) {
	for _, f := range frames {
		if d, ok := f.Frame.(*wire.DatagramFrame); ok {
			if cap(d.Data) == len(datagramBuffer{}) {
				datagramBuffers.Put((*datagramBuffer)(d.Data[:cap(d.Data)]))
			}
			d.Data = nil
		}
	}
}
`,
	"send_now.go": `package quic

import (
	"sync/atomic"

	"github.com/quic-go/quic-go/internal/protocol"
)

// unwritten counts the entries of a sendQueue that are not written yet, the one that is being written among them.
type unwritten = atomic.Int32

// sendNow writes a short packet, unless others wait to be written before it, and reports whether it did. Only the goroutine that
// fills the queue calls it, so that nothing is written meanwhile.
func (h *sendQueue) sendNow(p *packetBuffer, gsoSize uint16, ecn protocol.ECN) bool {
	if p.Len() > protocol.MaxPacketBufferSize || h.unwritten.Load() > 0 || h.conn.Write(p.Data, gsoSize, ecn) != nil {
		return false
	}
	p.Release()
	return true
}
`,
	"datagrams_waiting.go": `package quic

import (
	"errors"
	"time"

	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// SendDatagramNow is SendDatagram that does not wait: it reports whether there was room in the queue.
func (c *Conn) SendDatagramNow(p []byte) (taken bool, _ error) {
	if !c.supportsDatagrams() {
		return false, errors.New("datagram support disabled")
	}
	f := &wire.DatagramFrame{DataLenPresent: true}
	limit := min(
		f.MaxDataLen(c.peerParams.MaxDatagramFrameSize, c.version),
		protocol.ByteCount(c.maxPayloadSizeEstimate.Load()),
	)
	if protocol.ByteCount(len(p)) > limit {
		return false, &DatagramTooLargeError{MaxDatagramPayloadSize: int64(limit)}
	}
	return c.datagramQueue.addNow(f, p)
}

// addNow queues f with a copy of p as its data, if there is room.
func (h *datagramQueue) addNow(f *wire.DatagramFrame, p []byte) (taken bool, _ error) {
	select {
	case <-h.closed:
		return false, h.closeErr
	default:
	}
	h.sendMx.Lock()
	if h.sendQueue.Len() >= h.limit() {
		h.sendMx.Unlock()
		return false, nil
	}
	f.Data = getDatagramBuffer(len(p))
	copy(f.Data, p)
	h.sendQueue.PushBack(f)
	h.sendMx.Unlock()
	h.hasData()
	return true, nil
}

// OldestReceived returns for how long the oldest packet that has come in waits to be handled, 0 when none does.
func (c *Conn) OldestReceived() time.Duration {
	c.receivedPacketMx.Lock()
	defer c.receivedPacketMx.Unlock()
	if c.receivedPackets.Empty() {
		return 0
	}
	return monotime.Since(c.receivedPackets.PeekFront().rcvTime)
}

// DatagramsWaiting reports whether datagrams wait to be packed. While none does, SendDatagram does not wait.
func (c *Conn) DatagramsWaiting() bool {
	h := c.datagramQueue
	h.sendMx.Lock()
	defer h.sendMx.Unlock()
	return !h.sendQueue.Empty()
}
`,
	"paths.go": `package quic

import (
	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// Abandon closes t, as Close does, but leaves connections alone that have moved to the path of another transport.
func (t *Transport) Abandon() error {
	if err := t.init(false); err != nil {
		return err
	}
	t.mutex.Lock()
	if t.closeErr == nil {
		t.closeErr = &errTransportClosed{}
	}
	clear(t.handlers)
	clear(t.resetTokens)
	t.mutex.Unlock()
	return t.Close()
}

// forgetClosed drops the transports that are closed, which nothing comes in by any more.
func (cr connRunners) forgetClosed() {
	for r := range cr {
		h, ok := r.(*packetHandlerMap)
		if !ok {
			continue
		}
		h.mutex.Lock()
		closed := h.closeErr != nil
		h.mutex.Unlock()
		if closed {
			delete(cr, r)
		}
	}
}

// sendPathProbe sends the next packet that probes a path, if there is one to send. It is no part of what congestion control or the
// number of unacknowledged packets limit, which a path that has died may hold at that limit for good.
func (c *Conn) sendPathProbe(now monotime.Time) (sent bool, _ error) {
	if c.perspective != protocol.PerspectiveClient || !c.handshakeConfirmed {
		return false, nil
	}
	pm := c.pathManagerOutgoing.Load()
	if pm == nil {
		return false, nil
	}
	connID, frame, tr, ok := pm.NextPathToProbe()
	if !ok {
		return false, nil
	}
	probe, buf, err := c.packer.PackPathProbePacket(connID, []ackhandler.Frame{frame}, c.version)
	if err != nil {
		return false, err
	}
	c.logShortHeaderPacket(probe, protocol.ECNNon, buf.Len())
	c.registerPackedShortHeaderPacket(probe, protocol.ECNNon, now)
	tr.WriteTo(buf.Data, c.conn.RemoteAddr())
	buf.Release()
	return true, nil
}

// switchToPath makes the connection ID that path id was probed with the active one, and retires the former (RFC 9000 section
// 9.5). moved, which may be nil, is called in between.
func (h *connIDManager) switchToPath(id pathID, moved func()) {
	h.pathMx.Lock()
	defer h.pathMx.Unlock()
	entry, ok := h.pathProbing[id]
	if ok {
		delete(h.pathProbing, id)
		h.removeStatelessResetToken(entry.StatelessResetToken)
		h.queueControlFrame(&wire.RetireConnectionIDFrame{SequenceNumber: h.activeSequenceNumber})
		h.highestRetired = max(h.highestRetired, h.activeSequenceNumber)
	}
	if h.activeStatelessResetToken != nil {
		h.removeStatelessResetToken(*h.activeStatelessResetToken)
	}
	if moved != nil {
		moved()
	}
	if ok {
		h.activeSequenceNumber = entry.SequenceNumber
		h.activeConnectionID = entry.ConnectionID
		h.activeStatelessResetToken = &entry.StatelessResetToken
		h.packetsSinceLastChange = 0
		h.packetsPerConnectionID = protocol.PacketsPerConnectionID/2 + h.rand.Uint32N(protocol.PacketsPerConnectionID)
	}
	if h.activeStatelessResetToken != nil {
		h.addStatelessResetToken(*h.activeStatelessResetToken)
	}
}

// active returns the path that the connection is on, or is about to be.
func (pm *pathManagerOutgoing) active() pathID {
	pm.mx.Lock()
	defer pm.mx.Unlock()
	return pm.activePath
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

	// Of a peer that has not said who it is little is kept, and its handshake can be ended.
	{"admission", "interface.go", "Config",
		"	// Allow0RTT allows the application",
		"	// AwaitAdmission keeps few packets and datagrams that the peer sends until Conn.Admit is called.\n	AwaitAdmission bool\n	// Allow0RTT allows the application"},
	{"admission", "config.go", "populateConfig",
		"		Allow0RTT:                        config.Allow0RTT,\n",
		"		Allow0RTT:                        config.Allow0RTT,\n		AwaitAdmission: config.AwaitAdmission,\n"},
	{"admission", "connection.go", "Conn", "	datagramQueue *datagramQueue\n", "	datagramQueue *datagramQueue\n	admission admission\n"},
	{"admission", "connection.go", "Conn.handlePacket",
		"c.receivedPackets.Len() >= protocol.MaxConnUnprocessedPackets", "c.receivedPackets.Len() >= c.maxPackets()"},
	{"admission", "http3/headers.go", "readHeaderBlock", "maxInitialBufferSize = 8 << 10", "maxInitialBufferSize = 1 << 10"},
	{"admission", "connection.go", "Conn.run",
		"			case <-c.timer.C:\n",
		"			case <-c.ctx.Done(): // canceled by who made it, see Transport.ConnContext\n" +
			"				c.setCloseError(&closeError{err: &qerr.TransportError{ErrorCode: ConnectionRefused}})\n				break runLoop\n			case <-c.timer.C:\n"},

	// Under congestion control datagrams wait before QUIC, where flows take turns, and not in it.
	{"waiting", "datagram_queue.go", "datagramQueue", "	hasData func()\n", "	hasData func()\n	limit func() int // of sendQueue\n"},
	{"waiting", "datagram_queue.go", "datagramQueue.Add", "h.sendQueue.Len() < maxDatagramSendQueueLen", "h.sendQueue.Len() < h.limit()"},
	{"waiting", "connection.go", "Conn.preSetup",
		"	c.connState.Version = c.version\n", "	c.datagramQueue.limit = c.datagramSendLimit\n	c.connState.Version = c.version\n"},

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

	// Received datagrams go straight to their handler, from the buffer of the packet they came in: the frame does not outlive the
	// call that handles it. What has no handler is copied once, into the queue. Packets that are at hand are handled together, as
	// many as the kernel merges, and are acknowledged together.
	{"datagrams", "internal/wire/datagram_frame.go", "parseDatagramFrame",
		"	f.Data = make([]byte, length)\n	copy(f.Data, b)\n", "	f.Data = b[:length:length]\n"},
	{"datagrams", "connection.go", "Conn", "	datagramQueue *datagramQueue\n", "	datagramQueue *datagramQueue\n	datagramHandlers datagramHandlers\n"},
	{"datagrams", "connection.go", "Conn.handleDatagramFrame",
		"	c.datagramQueue.HandleDatagramFrame(f)\n", "	if !c.datagramHandlers.handle(f.Data) && c.mayQueueDatagram() {\n		c.datagramQueue.HandleDatagramFrame(f)\n	}\n"},
	{"datagrams", "connection.go", "Conn.handlePackets",
		"	var hasMorePackets bool\n", "	defer c.datagramHandlers.flush()\n	var hasMorePackets bool\n"},
	{"datagrams", "connection.go", "maxPacketsToProcess", "32", "128"},

	// What is short goes out at once, when nothing waits before it: waking the goroutine that writes takes longer than writing. When it
	// fails, that goroutine tries again, and deals with the error.
	{"latency", "send_queue.go", "sendQueue", "	conn        sendConn\n", "	conn        sendConn\n	unwritten   unwritten\n"},
	{"latency", "send_queue.go", "sendQueue.Send",
		"	select {\n	case h.queue <-", "	if h.sendNow(p, gsoSize, ecn) {\n		return\n	}\n	h.unwritten.Add(1)\n	select {\n	case h.queue <-"},
	{"latency", "send_queue.go", "sendQueue.Run", "			e.buf.Release()\n", "			e.buf.Release()\n			h.unwritten.Add(-1)\n"},

	// A connection may move to another path as often as it likes. Stock quic-go keeps the connection ID that it had, never gives back
	// those that it probed with, so that none is left after a few moves, and cannot close the socket of a path that it has left.
	{"paths", "connection.go", "Conn", "	pathManagerOutgoing atomic.Pointer[pathManagerOutgoing]\n",
		"	pathManagerOutgoing atomic.Pointer[pathManagerOutgoing]\n	resetRunner connRunner // where a stateless reset may come in; guarded by connIDManager.pathMx\n"},
	{"paths", "connection.go", "newClientConnection", "		conn:                conn,\n", "		conn:                conn,\n		resetRunner: runner,\n"},
	{"paths", "connection.go", "newClientConnection",
		"{ runner.AddResetToken(token, s) },\n		runner.RemoveResetToken,\n",
		"{ s.resetRunner.AddResetToken(token, s) },\n		func(token protocol.StatelessResetToken) { s.resetRunner.RemoveResetToken(token) },\n"},
	{"paths", "connection.go", "Conn.switchToNewPath",
		"	c.sentPacketHandler.MigratedPath(now, initialPacketSize)\n",
		"	c.connIDManager.switchToPath(c.pathManagerOutgoing.Load().active(), func() { c.resetRunner = (*packetHandlerMap)(tr) })\n" +
			"	c.sentPacketHandler.MigratedPath(now, initialPacketSize)\n"},
	{"paths", "connection.go", "Conn.switchToNewPath",
		"	c.conn = newSendConn(tr.conn, c.conn.RemoteAddr(), packetInfo{}, utils.DefaultLogger) // TODO: find a better way\n",
		"	c.connStateMutex.Lock() // of those who ask for the state of the connection\n" +
			"	c.conn = newSendConn(tr.conn, c.conn.RemoteAddr(), packetInfo{}, utils.DefaultLogger)\n	c.connStateMutex.Unlock()\n"},
	{"paths", "path_manager.go", "pathManager", "	retireConnID func(pathID)\n", "	retireConnID func(pathID)\n	switchConnID func(pathID)\n"},
	{"paths", "path_manager.go", "pathManager.SwitchToPath",
		"switching to path %d (%s)\", path.id, addr)\n", "switching to path %d (%s)\", path.id, addr)\n			pm.switchConnID(path.id)\n"},
	{"paths", "connection.go", "Conn.handleShortHeaderPacket",
		"			c.logger,\n		)\n", "			c.logger,\n		)\n		c.pathManager.switchConnID = func(id pathID) { c.connIDManager.switchToPath(id, nil) }\n"},
	{"paths", "conn_id_generator.go", "connIDGenerator.AddConnRunner",
		"	m.connRunners[runner] = r\n", "	m.connRunners.forgetClosed()\n	m.connRunners[runner] = r\n"},
	{"paths", "connection.go", "Conn.sendPackets", sendPathProbe, ""},
	{"paths", "connection.go", "Conn.triggerSending",
		"	sendMode := c.sentPacketHandler.SendMode(now)\n",
		"	if sent, err := c.sendPathProbe(now); sent || err != nil {\n		c.scheduleSending()\n		return err\n	}\n	sendMode := c.sentPacketHandler.SendMode(now)\n"},

	// Buffers of datagrams to send are used again.
	{"copies", "connection.go", "Conn.SendDatagram", "make([]byte, len(p))", "getDatagramBuffer(len(p))"},
	{"copies", "connection.go", "Conn.registerPackedShortHeaderPacket",
		"	c.connIDManager.SentPacket()\n", "	releaseDatagrams(p.Frames)\n	c.connIDManager.SentPacket()\n"},

	// Streams get through a queue of datagrams that fill packets: while both have something to send, every other packet is theirs.
	{"control", "packet_packer.go", "packetPacker", "	numNonAckElicitingAcks int\n", "	numNonAckElicitingAcks int\n	streamsHadTurn bool\n"},
	{"control", "packet_packer.go", "packetPacker.composeNextPacket",
		"	if p.datagramQueue != nil {\n", "	p.streamsHadTurn = (hasData || hasRetransmission) && !p.streamsHadTurn\n	if p.datagramQueue != nil && !p.streamsHadTurn {\n"},
	{"control", "packet_packer.go", "packetPacker.composeNextPacket",
		"	}\n	return pl\n}", "	}\n	if pl.length == 0 && p.streamsHadTurn { // and had nothing to send\n		return p.composeNextPacket(maxPayloadSize, onlyAck, ackAllowed, now, v)\n	}\n	return pl\n}"},
}

const (
	sendPathProbe = `	if c.perspective == protocol.PerspectiveClient && c.handshakeConfirmed {
		if pm := c.pathManagerOutgoing.Load(); pm != nil {
			connID, frame, tr, ok := pm.NextPathToProbe()
			if ok {
				probe, buf, err := c.packer.PackPathProbePacket(connID, []ackhandler.Frame{frame}, c.version)
				if err != nil {
					return err
				}
				c.logger.Debugf("sending path probe packet from %s", c.LocalAddr())
				c.logShortHeaderPacket(probe, protocol.ECNNon, buf.Len())
				c.registerPackedShortHeaderPacket(probe, protocol.ECNNon, now)
				tr.WriteTo(buf.Data, c.conn.RemoteAddr())
				// There's (likely) more data to send. Loop around again.
				c.scheduleSending()
				return nil
			}
		}
	}

`
	newHandlerServer = "ackhandler.NewSentPacketHandler(\n		0,\n"
	newHandlerClient = "ackhandler.NewSentPacketHandler(\n		initialPacketNumber,\n"
)
