package client

import (
	"errors"
	"net"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/rescue"
)

// Counters are the counters of a Client since New. They never decrease, except
// for Oldest.
type Counters struct {
	Stats connectip.Stats

	// Reconnects counts reconnects by the reason for the end of the session or
	// of the attempt before.
	Reconnects map[string]uint64

	// Discovery counts the resolutions of the proxy's domain, and the requests
	// for its delegation file.
	Discovery discovery.Counts

	// Oldest has the ages of the oldest packets that wait in the client now.
	Oldest connectip.Ages

	// Panics counts panics in this program that ended a session.
	Panics uint64
}

// Counters returns the current counters.
func (c *Client) Counters() *Counters {
	out := &Counters{Reconnects: make(map[string]uint64)}
	c.countOverflow()
	out.Oldest, out.Panics = c.oldest(), rescue.Caught()
	c.stats.AddTo(&out.Stats)
	out.Discovery = c.dialer.resolver.Counts()
	c.mu.Lock()
	defer c.mu.Unlock()
	for l, n := range c.reconnects {
		out.Reconnects[lossReason(l).String()] = n
	}
	return out
}

// countOverflow counts the packets that the kernel dropped because the queue of
// the device was full.
func (c *Client) countOverflow() {
	if e := c.supervisor.Current(); e != nil {
		e.overflow.Count(e.device, func(n int) {
			c.stats.Send.DropMany(connectip.DropDeviceFull, n)
		})
	}
}

// oldest returns the ages of the oldest packets that wait in the client.
func (c *Client) oldest() (a connectip.Ages) {
	a.Note(connectip.StageDeviceRead, c.reading.Age())
	a.Note(connectip.StageFlowQueue, c.queue.Oldest())
	a.Note(connectip.StageSender, c.sender.Age())
	if conn := c.activeConn.Load(); conn != nil {
		conn.AddAges(&a)
	}
	return a
}

// Stuck returns an error if packets have waited in the client for so long that
// it must be at fault itself. The error names the stage.
func (c *Client) Stuck() error {
	a := c.oldest()
	return a.Stuck()
}

// lossReason classifies the failures that lead to a reconnect.
type lossReason uint8

// The reasons. lossNames has the words that count them.
const (
	lossError   lossReason = iota // failure of this host, or malformed capsule
	lossClosed                    // the proxy closed the session without an error
	lossReset                     // the proxy reported an error or was restarted
	lossTimeout                   // no packets arrived from the proxy
	lossRefused                   // the proxy refused the request
	lossNetwork                   // packets cannot leave, or no address of the proxy
	numLosses
)

var lossNames = [numLosses]string{"error", "closed", "reset", "timeout", "refused", "network"}

func (l lossReason) String() string { return lossNames[l] }

// lossOf returns the reason of e, the error that ended a session or an attempt.
func lossOf(e *Error) lossReason {
	var app *quic.ApplicationError
	var stateless *quic.StatelessResetError
	var stream *quic.StreamError
	var h3 *http3.Error
	var network net.Error
	var path *lostError
	var transport *quic.TransportError
	var dialing *dial.Error
	switch err := attemptOf(e).err; {
	case err == nil: // the proxy answered, or granted too little
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
	case errors.As(err, &path), errors.As(err, &dialing) && dialing.Failure == dial.Unsent:
		return lossNetwork
	case errors.As(err, new(*net.OpError)), errors.As(err, new(*discovery.Error)):
		return lossNetwork
	case errors.As(err, &transport):
		if transport.Remote && transport.ErrorCode == quic.NoError {
			return lossClosed
		}
		return lossReset
	}
	return lossError
}

// closedOrReset returns the reason for an error code of HTTP/3 from the proxy.
func closedOrReset(code uint64) lossReason {
	if connectip.IsNoError(code) {
		return lossClosed
	}
	return lossReset
}
