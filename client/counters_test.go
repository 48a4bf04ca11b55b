package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
)

func TestLosses(t *testing.T) {
	to := target{host: "vpn.example.org", port: "443"}
	for _, tc := range []struct {
		want string
		err  error
	}{
		{"refused", &Error{Kind: KindFailure,
			Reason: "the proxy takes no more sessions now, status 429"}},
		{"refused", &Error{Kind: KindRefused, Reason: "the proxy assigned no address"}},
		{"closed", connectip.ErrClosedByPeer},
		{"closed", &quic.ApplicationError{Remote: true,
			ErrorCode: quic.ApplicationErrorCode(http3.ErrCodeNoError)}},
		{"closed", &quic.ApplicationError{Remote: true}},
		{"closed", &quic.TransportError{Remote: true}},
		{"reset", &quic.TransportError{Remote: true, ErrorCode: quic.ProtocolViolation}},
		{"reset", &quic.ApplicationError{Remote: true,
			ErrorCode: quic.ApplicationErrorCode(http3.ErrCodeInternalError)}},
		{"reset", fmt.Errorf("reading a capsule: %w",
			&http3.Error{Remote: true, ErrorCode: http3.ErrCodeRequestCanceled})},
		{"reset", &quic.StreamError{Remote: true}},
		{"reset", &quic.StatelessResetError{}},
		{"timeout", &quic.IdleTimeoutError{}},
		{"timeout", &quic.HandshakeTimeoutError{}},
		{"timeout", context.DeadlineExceeded},
		{"timeout", &net.DNSError{IsTimeout: true}},
		{"network", &net.DNSError{IsNotFound: true}},
		{"network", &net.OpError{Op: "write", Err: errors.New("network is unreachable")}},
		{"error", capsule.ErrMalformed},
		{"error", errors.New("applying routes")},
	} {
		e, ok := tc.err.(*Error)
		if !ok {
			e = classify(tc.err, nil, to).(*Error)
		}
		if got := lossOf(e).String(); got != tc.want {
			t.Errorf("%v: counted as %s, want %s", tc.err, got, tc.want)
		}
	}
}

// Every reconnect has a reason.
func TestReconnectsAreCounted(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	for name, count := range n.Counters().Reconnects {
		if count != 0 {
			t.Errorf("%d %s at the start", count, name)
		}
	}
	for _, s := range f.Sessions() {
		f.Kick(s.ID)
	}
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	c, sum := n.Counters(), uint64(0)
	for _, count := range c.Reconnects {
		sum += count
	}
	if sum != n.Status().Reconnects || c.Reconnects["closed"]+c.Reconnects["reset"] == 0 ||
		len(c.Reconnects) != int(numLosses) {
		t.Errorf("reconnects %v, %d in the status", c.Reconnects, n.Status().Reconnects)
	}
	if c.Stats.Receive.Packets.Load() != n.Status().Packets.RX {
		t.Errorf("%d packets, %d in the status", c.Stats.Receive.Packets.Load(),
			n.Status().Packets.RX)
	}
}
