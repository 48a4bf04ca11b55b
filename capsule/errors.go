package capsule

import (
	"errors"
	"fmt"
)

var (
	// ErrMalformed matches every error about a capsule that breaks the rules of
	// its RFC, including a capsule cut off by the end of the stream. The
	// receiver resets the stream with H3_MESSAGE_ERROR (RFC 9297 section 3.3).
	ErrMalformed = errors.New("malformed capsule")

	// ErrTooLarge matches the error about a capsule whose value is longer than
	// the [Reader] accepts. The capsule may be well-formed.
	ErrTooLarge = errors.New("capsule too large")
)

// Error describes a capsule that breaks the rules of its RFC. It matches
// [ErrMalformed].
type Error struct {
	Type Type

	// Entry is the index, from 0, of the address, route, configuration or
	// prefix. -1 means the capsule itself.
	Entry int

	// Field is the field's name in the RFC, such as "IP Prefix Length". It is
	// empty if no single field is to blame.
	Field string

	Reason string
}

// Error returns the capsule type, the entry, the field and the reason as text.
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

// The names of fields in errors. The first group is from the figures of RFC
// 9484 and RFC 9297, the other two from draft-ietf-masque-connect-ip-dns-06.
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
