package quic

import (
	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// Abandon closes t like Close, but keeps connections that have migrated to
// another transport open.
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

// forgetClosed removes closed transports, which receive no more packets.
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

// sendPathProbe sends the next packet that probes a path, if there is one.
// Congestion control and the limit of unacknowledged packets do not apply to
// it: a dead path can keep both exhausted for good.
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

// switchToPath makes the connection ID with which path id was probed the active
// one, and retires the previous one (RFC 9000 section 9.5). It calls switched
// in between, unless switched is nil.
func (h *connIDManager) switchToPath(id pathID, switched func()) {
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
	if switched != nil {
		switched()
	}
	if ok {
		h.activeSequenceNumber = entry.SequenceNumber
		h.activeConnectionID = entry.ConnectionID
		h.activeStatelessResetToken = &entry.StatelessResetToken
		h.packetsSinceLastChange = 0
		h.packetsPerConnectionID = protocol.PacketsPerConnectionID/2 +
			h.rand.Uint32N(protocol.PacketsPerConnectionID)
	}
	if h.activeStatelessResetToken != nil {
		h.addStatelessResetToken(*h.activeStatelessResetToken)
	}
}

// active returns the active path, or the path that the connection is about to
// switch to.
func (pm *pathManagerOutgoing) active() pathID {
	pm.mx.Lock()
	defer pm.mx.Unlock()
	return pm.activePath
}
