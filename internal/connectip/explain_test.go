package connectip

import (
	"errors"
	"fmt"
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
)

func TestExplain(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"transport closed without error", &quic.TransportError{Remote: true},
			"the peer closed the connection"},
		{"application closed with 0", &quic.ApplicationError{Remote: true},
			"the peer closed the connection"},
		{"HTTP/3 closed with 0", &http3.Error{Remote: true}, "the peer closed the connection"},
		{"H3_NO_ERROR", &http3.Error{Remote: true, ErrorCode: http3.ErrCodeNoError},
			"the peer closed the connection"},
		{"stream reset with 0", &quic.StreamError{Remote: true}, "the peer closed the connection"},
		{"stream reset", &quic.StreamError{Remote: true,
			ErrorCode: quic.StreamErrorCode(http3.ErrCodeRequestCanceled)},
			"the peer reset the stream with the error H3_REQUEST_CANCELLED"},
		{
			"application error with a text",
			&quic.ApplicationError{Remote: true,
				ErrorCode:    quic.ApplicationErrorCode(http3.ErrCodeInternalError),
				ErrorMessage: "no\nroom"},
			`the peer closed the connection with the error H3_INTERNAL_ERROR: "no\nroom"`,
		},
		{"transport error", &quic.TransportError{Remote: true, ErrorCode: quic.ProtocolViolation},
			"the peer closed the connection with the error PROTOCOL_VIOLATION"},
		{"closed here", &quic.ApplicationError{}, "this end closed the connection"},
		{"idle", &quic.IdleTimeoutError{},
			"the connection timed out, because nothing was received from the peer"},
		{"stateless reset", &quic.StatelessResetError{},
			"the peer no longer knows the connection, as after a restart"},
		{"finished", ErrClosedByPeer, "the peer closed the tunnel"},
		{"malformed", capsule.ErrMalformed, capsule.ErrMalformed.Error()},
		{"other error", errors.New("replaced"), "replaced"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Explain(tc.err); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			if got := Explain(fmt.Errorf("reading a capsule: %w", tc.err)); got != tc.want &&
				got != "reading a capsule: "+tc.want {
				t.Errorf("wrapped: got %q", got)
			}
		})
	}
}
