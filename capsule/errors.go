package capsule

import (
	"errors"
	"fmt"
)

var (
	// ErrMalformed matches every error about a capsule that breaks the rules of
	// its RFC, one that the end of the stream cut off included. The stream is to
	// be reset with H3_MESSAGE_ERROR (RFC 9297 section 3.3).
	ErrMalformed = errors.New("malformed capsule")

	// ErrTooLarge matches the error about a capsule that may be well-formed but
	// is longer than the [Reader] accepts.
	ErrTooLarge = errors.New("capsule too large")
)

// Error is a capsule that breaks the rules of its RFC. It matches [ErrMalformed].
type Error struct {
	Type   Type
	Entry  int    // index of the address, route, configuration or prefix, from 0; -1: the capsule as a whole
	Field  string // as its RFC calls it, such as "IP Prefix Length"; may be empty
	Reason string
}

// Error names the capsule, the entry, the field and the reason.
func (e *Error) Error() string {
	s := "malformed " + e.Type.String() + " capsule"
	if e.Entry >= 0 {
		s += fmt.Sprintf(", entry %d", e.Entry)
	}
	if e.Field != "" {
		s += ", " + e.Field
	}
	return s + ": " + e.Reason
}

// Unwrap returns [ErrMalformed].
func (e *Error) Unwrap() error { return ErrMalformed }

// errorf returns an *Error with a formatted reason.
func errorf(t Type, entry int, field, format string, args ...any) error {
	return &Error{Type: t, Entry: entry, Field: field, Reason: fmt.Sprintf(format, args...)}
}

// The names of fields in errors, as in the figures of RFC 9484 and RFC 9297, and
// those of draft-ietf-masque-connect-ip-dns-06 in the last two groups.
const (
	fieldLength       = "Capsule Length"
	fieldValue        = "Capsule Value"
	fieldRequestID    = "Request ID"
	fieldVersion      = "IP Version"
	fieldAddress      = "IP Address"
	fieldPrefixLength = "IP Prefix Length"
	fieldStart        = "Start IP Address"
	fieldEnd          = "End IP Address"
	fieldProtocol     = "IP Protocol"

	fieldNameserverCount = "Nameserver Count"
	fieldPriority        = "Service Priority"
	fieldIPv4Count       = "IPv4 Address Count"
	fieldIPv6Count       = "IPv6 Address Count"
	fieldAuthName        = "Authentication Domain Name"
	fieldParams          = "Service Parameters"
	fieldInternalCount   = "Internal Domain Count"
	fieldInternalDomain  = "Internal Domain"
	fieldSearchCount     = "Search Domain Count"
	fieldSearchDomain    = "Search Domain"

	fieldNAT64Length = "Prefix Length"
	fieldNAT64Prefix = "Prefix"
)
