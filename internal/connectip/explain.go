package connectip

import (
	"errors"
	"fmt"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// IsNoError reports whether a code of a stream or a connection says that
// nothing went wrong: H3_NO_ERROR (RFC 9114 section 8.1), or 0, with which some
// implementations close although it is no code of HTTP/3.
func IsNoError(code uint64) bool { return code == uint64(http3.ErrCodeNoError) || code == 0 }

// closedWithoutError reports whether err, which a stream gave, says that the
// peer ended the stream or its connection and nothing went wrong.
func closedWithoutError(err error) bool {
	if e, ok := errors.AsType[*http3.Error](err); ok {
		return e.Remote && IsNoError(uint64(e.ErrorCode))
	}
	if e, ok := errors.AsType[*quic.StreamError](err); ok {
		return e.Remote && IsNoError(uint64(e.ErrorCode))
	}
	if e, ok := errors.AsType[*quic.ApplicationError](err); ok {
		return e.Remote && IsNoError(uint64(e.ErrorCode))
	}
	e, ok := errors.AsType[*quic.TransportError](err)
	return ok && e.Remote && e.ErrorCode == quic.NoError
}

// Explain returns the text of err for logs and users. Ends of a stream or a
// connection, which QUIC and HTTP/3 report by their codes, are put into words.
func Explain(err error) string {
	if closedWithoutError(err) {
		return "the peer closed the connection"
	}
	if _, ok := errors.AsType[*quic.IdleTimeoutError](err); ok {
		return "the connection timed out, because nothing came from the peer"
	}
	if _, ok := errors.AsType[*quic.StatelessResetError](err); ok {
		return "the peer does not know the connection any more, as after a restart"
	}
	if e, ok := errors.AsType[*quic.TransportError](err); ok && e.Remote {
		return withMessage(fmt.Sprintf("the peer closed the connection with the error %v",
			e.ErrorCode), e.ErrorMessage)
	}
	if e, ok := errors.AsType[*quic.ApplicationError](err); ok && !e.Remote {
		return "this end closed the connection"
	} else if ok {
		return withMessage(fmt.Sprintf("the peer closed the connection with the error %v",
			http3.ErrCode(e.ErrorCode)), e.ErrorMessage)
	}
	if e, ok := errors.AsType[*quic.StreamError](err); ok && e.Remote {
		return fmt.Sprintf("the peer reset the stream with the error %v",
			http3.ErrCode(e.ErrorCode))
	}
	return err.Error()
}

// withMessage adds what the peer said itself, which may be anything.
func withMessage(text, message string) string {
	if message == "" {
		return text
	}
	return fmt.Sprintf("%s: %q", text, message)
}
