package client

import (
	"errors"
	"net"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
)

// Counters are what a Client has counted since it was made. Counts never get less.
type Counters struct {
	Stats      connectip.Stats
	Reconnects map[string]uint64 // by what was wrong with the session, or the attempt at one, before
}

// Counters may be called at any time.
func (c *Client) Counters() *Counters {
	out := &Counters{Reconnects: make(map[string]uint64)}
	c.stats.AddTo(&out.Stats)
	c.mu.Lock()
	defer c.mu.Unlock()
	for l, n := range c.reconnects {
		out.Reconnects[loss(l).String()] = n
	}
	return out
}

// loss is why there is no session.
type loss uint8

// The reasons, each with the word under which it is counted.
const (
	lossError   loss = iota // on this host, or in what the proxy said
	lossClosed              // the proxy ended it in good order
	lossReset               // the proxy ended it because something was wrong, or has been restarted and knows it no more
	lossTimeout             // nothing came from the proxy
	lossRefused             // the proxy said no
	lossNetwork             // packets cannot be sent, or the proxy's name not be resolved
	numLosses
)

var lossNames = [numLosses]string{"error", "closed", "reset", "timeout", "refused", "network"}

func (l loss) String() string { return lossNames[l] }

// lossOf classifies what a session ended with.
func lossOf(e *Error) loss {
	var app *quic.ApplicationError
	var stateless *quic.StatelessResetError
	var stream *quic.StreamError
	var h3 *http3.Error
	var network net.Error
	var path *lostError
	var transport *quic.TransportError
	switch err := e.Err; {
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

func closedOrReset(code uint64) loss {
	if connectip.InGoodOrder(code) {
		return lossClosed
	}
	return lossReset
}
