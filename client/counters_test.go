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
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
)

func TestLosses(t *testing.T) {
	to := target{host: "vpn.example.org", port: "443"}
	for _, tc := range []struct {
		name, want string
		err        error
	}{
		{"status 429", "refused", &Error{Kind: KindFailure,
			Reason: "the proxy takes no more sessions now, status 429"}},
		{"no address", "refused", &Error{Kind: KindRefused,
			Reason: "the proxy assigned no address"}},
		{"end of the stream", "closed", connectip.ErrClosedByPeer},
		{"H3_NO_ERROR", "closed", &quic.ApplicationError{Remote: true,
			ErrorCode: quic.ApplicationErrorCode(http3.ErrCodeNoError)}},
		{"application error 0", "closed", &quic.ApplicationError{Remote: true}},
		{"NO_ERROR", "closed", &quic.TransportError{Remote: true}},
		{"PROTOCOL_VIOLATION", "reset", &quic.TransportError{Remote: true,
			ErrorCode: quic.ProtocolViolation}},
		{"H3_INTERNAL_ERROR", "reset", &quic.ApplicationError{Remote: true,
			ErrorCode: quic.ApplicationErrorCode(http3.ErrCodeInternalError)}},
		{"H3_REQUEST_CANCELLED", "reset", fmt.Errorf("reading a capsule: %w",
			&http3.Error{Remote: true, ErrorCode: http3.ErrCodeRequestCanceled})},
		{"stream error", "reset", &quic.StreamError{Remote: true}},
		{"stateless reset", "reset", &quic.StatelessResetError{}},
		{"idle timeout", "timeout", &quic.IdleTimeoutError{}},
		{"handshake timeout", "timeout", &quic.HandshakeTimeoutError{}},
		{"deadline", "timeout", context.DeadlineExceeded},
		{"DNS failure", "network", &discovery.Error{Code: discovery.DNSFailure}},
		{"unsent packets", "network", &dial.Error{Failure: dial.Unsent,
			Err: errors.New("network is unreachable")}},
		{"network unreachable", "network", &net.OpError{Op: "write",
			Err: errors.New("network is unreachable")}},
		{"malformed capsule", "error", capsule.ErrMalformed},
		{"other error", "error", errors.New("applying routes")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, ok := tc.err.(*Error)
			if !ok {
				e = classify(tc.err, nil, to).(*Error)
			}
			if got := lossOf(e).String(); got != tc.want {
				t.Errorf("%v: got %s, want %s", tc.err, got, tc.want)
			}
		})
	}
}

// Each reconnect is counted with a reason.
func TestReconnectsAreCounted(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	for name, count := range n.Counters().Reconnects {
		if count != 0 {
			t.Errorf("%d reconnects for the reason %s before the first", count, name)
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
