package client

import (
	"errors"
	"net"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
)

// Counters are what a Client has counted since it was made. Counts never get
// less.
type Counters struct {
	Stats connectip.Stats
	// by what was wrong with the session, or the attempt at one, before
	Reconnects map[string]uint64
	Oldest     connectip.Ages // packets that wait in the client now
	Panics     uint64         // that ended a session
}

// Counters may be called at any time.
func (c *Client) Counters() *Counters {
	out := &Counters{Reconnects: make(map[string]uint64)}
	c.countOverflow()
	out.Oldest, out.Panics = c.oldest(), rescue.Caught()
	c.stats.AddTo(&out.Stats)
	c.mu.Lock()
	defer c.mu.Unlock()
	for l, n := range c.reconnects {
		out.Reconnects[lossReason(l).String()] = n
	}
	return out
}

// countOverflow counts what the kernel dropped in front of the device.
func (c *Client) countOverflow() {
	if e := c.supervisor.Current(); e != nil {
		e.overflow.Count(e.device, func(n int) {
			c.stats.Send.DropMany(connectip.DropDeviceFull, n)
		})
	}
}

// oldest returns the ages of the oldest packets that wait.
func (c *Client) oldest() (a connectip.Ages) {
	a.Note(connectip.StageDeviceRead, c.reading.Age())
	a.Note(connectip.StageFlowQueue, c.queue.Oldest())
	a.Note(connectip.StageSender, c.sender.Age())
	if conn := c.activeConn.Load(); conn != nil {
		conn.AddAges(&a)
	}
	return a
}

// Stuck says where packets are stuck for a reason that is this client's own,
// nil for nowhere.
func (c *Client) Stuck() error {
	a := c.oldest()
	return a.Stuck()
}

// loss is why there is no session.
type lossReason uint8

// The reasons, each with the word under which it is counted.
const (
	lossError  lossReason = iota // this host, or a capsule of the proxy
	lossClosed                   // the proxy ended it in good order
	// the proxy ended it because something was wrong, or has been restarted and
	// knows it no more
	lossReset
	lossTimeout // nothing came from the proxy
	lossRefused // the proxy said no
	lossNetwork // packets cannot be sent, or the proxy's name not be resolved
	numLosses
)

var lossNames = [numLosses]string{"error", "closed", "reset", "timeout", "refused", "network"}

func (l lossReason) String() string { return lossNames[l] }

// lossOf classifies what a session ended with.
func lossOf(e *Error) lossReason {
	var app *quic.ApplicationError
	var stateless *quic.StatelessResetError
	var stream *quic.StreamError
	var h3 *http3.Error
	var network net.Error
	var path *lostError
	var transport *quic.TransportError
	switch err := attemptOf(e).err; {
	case err == nil: // what the proxy answered, or did not grant
		return lossRefused
	case errors.Is(err, connectip.ErrClosedByPeer):
		return lossClosed
	case errors.As(err, &app) && app.Remote:
		return closedOrReset(uint64(app.ErrorCode))
	case errors.As(err, &h3) && h3.Remote:
		return closedOrReset(uint64(h3.ErrorCode))
	case errors.As(err, &stateless), errors.As(err, &stream) && stream.Remote:
		return lossReset
	case errors.As(err, &path) && !path.local, errors.As(err, &network) && network.Timeout():
		return lossTimeout
	case errors.As(err, &path), errors.As(err, new(*unsentError)):
		return lossNetwork
	case errors.As(err, new(*net.OpError)), errors.As(err, new(*net.DNSError)):
		return lossNetwork
	case errors.As(err, &transport):
		if transport.Remote && transport.ErrorCode == quic.NoError {
			return lossClosed
		}
		return lossReset
	}
	return lossError
}

func closedOrReset(code uint64) lossReason {
	if connectip.IsNoError(code) {
		return lossClosed
	}
	return lossReset
}
