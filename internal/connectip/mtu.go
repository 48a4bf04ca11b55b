package connectip

import (
	"time"

	"masquevpn/internal/ippacket"
	"masquevpn/internal/worker"
)

// QUIC discovers how large packets may be, but only upwards: if the path MTU
// shrinks, large datagrams are lost while small ones keep the connection alive.
// So mtuWatcher tests the link with echo requests of the size in use (RFC 8899
// section 4.3, RFC 9484 section 10.1). If they are lost, it caps the MTU. On a
// new path, QUIC starts again with small packets, and the cap is removed.

const (
	// MinIPv6MTU is the minimum MTU in bytes of a link that carries IPv6 (RFC
	// 8200 section 5).
	MinIPv6MTU = 1280

	mtuInterval    = time.Second      // between checks of QUIC's datagram size
	verifyInterval = 5 * time.Second  // between tests of a link that carries large packets
	raiseInterval  = 60 * time.Second // between attempts to raise a cap

	// maxDiscoveryEchoes limits the number of echo requests that keep QUIC's
	// discovery going on one path.
	maxDiscoveryEchoes = 80

	// echoTries is the number of echo requests of one size that must be lost
	// before the size counts as too large.
	echoTries = 3

	// minEchoWait is the minimum time to wait for an echo reply.
	minEchoWait = 300 * time.Millisecond

	// largePacket is the length in bytes above which packets may be lost
	// because of their size. QUIC requires a path that carries 1200 bytes.
	largePacket = 1100

	// mtuStep is the precision in bytes of the search for the MTU of a narrow
	// path.
	mtuStep = 16
)

// mtuWatcher keeps the MTU of a Conn up to date. Its goroutine exists only
// while check runs.
type mtuWatcher struct {
	conn   *Conn
	timer  *time.Timer
	worker *worker.Worker

	// Only check accesses the following fields.
	interval        time.Duration // until the next check
	verified        time.Time     // last test of the MTU in use
	raised          time.Time     // last change of the cap, or attempt to raise it
	discoveryEchoes int           // sent on this path
}

func newMTUWatcher(c *Conn) *mtuWatcher {
	// QUIC's discovery starts with the connection and takes a few round trips,
	// so the first checks are frequent.
	w := &mtuWatcher{conn: c, interval: mtuInterval / 8, verified: time.Now(), raised: time.Now()}
	w.worker = worker.New(c.guarded(w.check))
	w.timer = time.AfterFunc(mtuInterval, w.worker.Wake)
	w.timer.Reset(w.interval) // only now, because check uses w.timer
	return w
}

// close waits for a running check. The Conn has ended.
func (w *mtuWatcher) close() {
	w.worker.Close()
	w.timer.Stop()
}

func (w *mtuWatcher) check() {
	c := w.conn
	w.interval = min(2*w.interval, mtuInterval)
	defer func() { w.timer.Reset(w.interval) }()
	c.updateMTU()
	if c.newPath.Swap(false) {
		w.discoveryEchoes, w.interval, w.verified = 0, mtuInterval/8, time.Now()
	}
	if w.discoveryEchoes < maxDiscoveryEchoes && int(c.quicMTU.Load()) < MinIPv6MTU {
		// QUIC's discovery advances only while packets are sent, and it starts
		// with small packets on a path that may be narrow.
		w.discoveryEchoes++
		w.interval = mtuInterval / 8
		c.sendLinkEcho(keepAliveSeq, nil)
	}
	if !c.echo.answered.Load() {
		return // the peer answers no echo requests, so their loss means nothing
	}
	switch now := time.Now(); {
	case c.sentLarge.Load() && now.Sub(w.verified) >= verifyInterval:
		w.verified = now
		c.sentLarge.Store(false)
		if c.passes(c.MTU()) || !c.passes(largePacket/2) {
			return // no packets are lost, or not because of their size
		}
		c.setMTUCap(c.largestPassing(largePacket/2, c.MTU()))
		w.raised = time.Now()
	case c.mtuCap.Load() > 0 && now.Sub(w.raised) >= raiseInterval:
		w.raised = now
		if top := int(c.quicMTU.Load()); c.passes(top) {
			c.setMTUCap(0)
		} else if n := c.largestPassing(c.MTU(), top); n > c.MTU() {
			c.setMTUCap(n)
		}
	}
}

// largestPassing returns the largest packet length in bytes that passes, up to
// mtuStep less. Packets of low bytes pass, packets of high bytes do not.
func (c *Conn) largestPassing(low, high int) int {
	// Try the minimum MTU of IPv6 first: many paths have it, and it decides
	// whether the link carries IPv6.
	if low < MinIPv6MTU && MinIPv6MTU < high {
		if c.passes(MinIPv6MTU) {
			low = MinIPv6MTU
		} else {
			high = MinIPv6MTU
		}
	}
	for high-low > mtuStep && c.ctx.Err() == nil {
		if mid := (low + high) / 2; c.passes(mid) {
			low = mid
		} else {
			high = mid
		}
	}
	return low
}

// passes reports whether a packet of size bytes reaches the peer and a reply of
// the same size comes back.
func (c *Conn) passes(size int) bool {
	wait := max(minEchoWait, 4*c.datagrams.conn.ConnectionStats().SmoothedRTT)
	data := make([]byte, max(0, size-echoHeaders))
	for range echoTries {
		c.echo.seq++
		c.sendLinkEcho(c.echo.seq, data)
		timeout := time.NewTimer(wait)
		for waiting := true; waiting; {
			select {
			case seq := <-c.echo.replies:
				if seq == c.echo.seq {
					timeout.Stop()
					return true
				}
			case <-timeout.C:
				waiting = false
			case <-c.ctx.Done():
				timeout.Stop()
				return false
			}
		}
	}
	return false
}

// setMTUCap limits the MTU to n bytes. 0 removes the limit.
func (c *Conn) setMTUCap(n int) {
	c.mtuCap.Store(int32(n))
	c.updateMTU()
}

// updateMTU computes the MTU from QUIC's datagram size and the cap.
func (c *Conn) updateMTU() {
	n, err := c.datagrams.mtu()
	if err != nil {
		return
	}
	// A smaller datagram size means that QUIC restarted its discovery.
	if old := c.quicMTU.Swap(int32(n)); int(old) > n {
		c.mtuCap.Store(0)
		c.newPath.Store(true)
	}
	if limit := int(c.mtuCap.Load()); limit > 0 {
		n = min(n, limit)
	}
	if old := c.maxPacket.Swap(int32(n)); int(old) != n && c.cfg.Handler.MTU != nil {
		c.cfg.Handler.MTU(n)
	}
}

// MTU returns the maximum length in bytes of an IP packet that the link
// currently carries. If it is less than MinIPv6MTU, the link carries no IPv6.
func (c *Conn) MTU() int { return int(c.maxPacket.Load()) }

// carriesVersion reports whether a link with the given MTU carries p's version
// of IP (RFC 9484 section 10.1).
func carriesVersion(p ippacket.Packet, mtu int) bool { return p.Version == 4 || mtu >= MinIPv6MTU }
