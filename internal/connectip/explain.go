package connectip

import (
	"errors"
	"fmt"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// IsNoError reports whether the error code of a stream or connection means that
// no error occurred: H3_NO_ERROR (RFC 9114 section 8.1), or 0, which some
// implementations use although HTTP/3 does not define it.
func IsNoError(code uint64) bool { return code == uint64(http3.ErrCodeNoError) || code == 0 }

// closedWithoutError reports whether err, an error of a stream, means that the
// peer ended the stream or its connection without an error.
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

// Explain returns a text for logs and users that describes err. It replaces the
// error codes of QUIC and HTTP/3 by sentences.
func Explain(err error) string {
	if closedWithoutError(err) {
		return "the peer closed the connection"
	}
	if _, ok := errors.AsType[*quic.IdleTimeoutError](err); ok {
		return "the connection timed out, because nothing was received from the peer"
	}
	if _, ok := errors.AsType[*quic.StatelessResetError](err); ok {
		return "the peer no longer knows the connection, as after a restart"
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

// withMessage appends the peer's error message, quoted because it may contain
// any bytes.
func withMessage(text, message string) string {
	if message == "" {
		return text
	}
	return fmt.Sprintf("%s: %q", text, message)
}
