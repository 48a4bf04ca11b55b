package quic

import (
	"github.com/quic-go/quic-go/internal/ackhandler"
	"github.com/quic-go/quic-go/internal/monotime"
	"github.com/quic-go/quic-go/internal/protocol"
	"github.com/quic-go/quic-go/internal/wire"
)

// Abandon closes t, as Close does, but leaves connections alone that have moved
// to the path of another transport.
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

// forgetClosed drops the transports that are closed, which nothing comes in by
// any more.
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

// sendPathProbe sends the next packet that probes a path, if there is one to
// send. It is no part of what congestion control or the number of
// unacknowledged packets limit, which a path that has died may hold at that
// limit for good.
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

// switchToPath makes the connection ID that path id was probed with the active
// one, and retires the former (RFC 9000 section 9.5). moved, which may be nil,
// is called in between.
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
		h.packetsPerConnectionID = protocol.PacketsPerConnectionID/2 +
			h.rand.Uint32N(protocol.PacketsPerConnectionID)
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
