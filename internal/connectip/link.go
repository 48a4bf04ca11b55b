package connectip

import (
	"time"

	"masquevpn/internal/ippacket"
	"masquevpn/internal/worker"
)

// QUIC finds out how large packets may be, but only ever upwards: when the
// path's MTU shrinks, large datagrams vanish while small ones keep the
// connection alive. So the link itself is asked whether it carries what it is
// used for, by echoes of that size (RFC 8899 section 4.3, RFC 9484 section
// 10.1). What does not pass becomes a cap on the MTU. Only on a new path QUIC
// begins anew, with small packets, and then what was found out about the old
// one counts no more.

const (
	mtuInterval    = time.Second      // between looks at QUIC's datagram size
	verifyInterval = 5 * time.Second  // between checks of a link that carries large packets
	raiseInterval  = 60 * time.Second // between attempts to lift a cap
	maxNudges      = 80               // echoes that keep QUIC's discovery going
	// echoes that have to get lost before a size counts as too large
	echoTries   = 3
	minEchoWait = 300 * time.Millisecond

	// MinIPv6MTU is the smallest MTU of a link that carries IPv6, in bytes (RFC
	// 8200 section 5).
	MinIPv6MTU = 1280
	// largePacket is the size above which packets may get lost for their size:
	// QUIC runs on every path that carries 1200 bytes.
	largePacket = 1100
	// mtuStep is how exactly the MTU of a narrow path is found out, in bytes.
	mtuStep = 16
)

// linkWatch keeps the MTU right. Its goroutine is there for a look at a time.
type linkWatch struct {
	conn   *Conn
	timer  *time.Timer
	worker *worker.Worker

	// What follows belongs to look.
	wait            time.Duration // before the next look
	checked, raised time.Time
	nudges          int
}

func newLinkWatch(c *Conn) *linkWatch {
	// QUIC's discovery begins with the connection and takes some round trips:
	// look often at first.
	w := &linkWatch{conn: c, wait: mtuInterval / 8, checked: time.Now(), raised: time.Now()}
	w.worker = worker.New(c.guarded(w.look))
	w.timer = time.AfterFunc(mtuInterval, w.worker.Wake)
	w.timer.Reset(w.wait) // now that look can see it
	return w
}

// close waits for the last look. c.life has ended then.
func (w *linkWatch) close() {
	w.worker.Close()
	w.timer.Stop()
}

func (w *linkWatch) look() {
	c := w.conn
	w.wait = min(2*w.wait, mtuInterval)
	defer func() { w.timer.Reset(w.wait) }()
	c.updateMTU()
	if c.newPath.Swap(false) {
		w.nudges, w.wait, w.checked = 0, mtuInterval/8, time.Now()
	}
	if w.nudges < maxNudges && int(c.quicMTU.Load()) < MinIPv6MTU {
		// QUIC discovers only while something is sent, and begins with small
		// packets on a path that may be narrow.
		w.nudges++
		w.wait = mtuInterval / 8
		c.sendEcho(c.echo.addr, allNodes, 255, true, 0, nil)
	}
	if !c.echo.answered.Load() {
		return // the peer does not answer echoes, so their loss means nothing
	}
	switch now := time.Now(); {
	case c.sentLarge.Load() && now.Sub(w.checked) >= verifyInterval:
		w.checked = now
		c.sentLarge.Store(false)
		if c.passes(c.MTU()) || !c.passes(largePacket/2) {
			return // all is well, or it is not for the size
		}
		c.capMTU(c.largestThatPasses(largePacket/2, c.MTU()))
		w.raised = time.Now()
	case c.mtuCap.Load() > 0 && now.Sub(w.raised) >= raiseInterval:
		w.raised = now
		if top := int(c.quicMTU.Load()); c.passes(top) {
			c.capMTU(0)
		} else if n := c.largestThatPasses(c.MTU(), top); n > c.MTU() {
			c.capMTU(n)
		}
	}
}

// largestThatPasses searches between low, which passes, and high, which does
// not, in bytes.
func (c *Conn) largestThatPasses(low, high int) int {
	// The sizes that matter most are tried first: those around which paths are
	// built.
	if low < MinIPv6MTU && MinIPv6MTU < high {
		if c.passes(MinIPv6MTU) {
			low = MinIPv6MTU
		} else {
			high = MinIPv6MTU
		}
	}
	for high-low > mtuStep && c.life.Err() == nil {
		if mid := (low + high) / 2; c.passes(mid) {
			low = mid
		} else {
			high = mid
		}
	}
	return low
}

// passes reports whether a packet of size bytes gets to the peer and back.
func (c *Conn) passes(size int) bool {
	wait := max(minEchoWait, 4*c.datagrams.conn.ConnectionStats().SmoothedRTT)
	data := make([]byte, max(0, size-48)) // the headers of IPv6 and ICMPv6 take 48 bytes
	for range echoTries {
		c.echo.seq++
		c.sendEcho(c.echo.addr, allNodes, 255, true, c.echo.seq, data)
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
			case <-c.life.Done():
				timeout.Stop()
				return false
			}
		}
	}
	return false
}

// capMTU limits the MTU to n bytes, 0 for what QUIC says.
func (c *Conn) capMTU(n int) {
	c.mtuCap.Store(int32(n))
	c.updateMTU()
}

// updateMTU works out the MTU from what QUIC says and the cap.
func (c *Conn) updateMTU() {
	n, err := c.datagrams.mtu()
	if err != nil {
		return
	}
	if was := c.quicMTU.Swap(int32(n)); int(was) > n {
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

// MTU is the largest IP packet that the link carries now, in bytes. Below
// MinIPv6MTU it carries no IPv6.
func (c *Conn) MTU() int { return int(c.maxPacket.Load()) }

// carriesIPv6 reports whether IPv6 packets may be sent (RFC 9484 section 10.1).
func carriesIPv6(p ippacket.Packet, mtu int) bool { return p.Version == 4 || mtu >= MinIPv6MTU }
