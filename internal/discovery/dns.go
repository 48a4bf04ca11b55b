package discovery

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// A Type is the type of a DNS question.
type Type uint16

// The types that a resolution asks for.
const (
	TypeA     Type = 1
	TypeAAAA  Type = 28
	TypeSRV   Type = 33
	TypeHTTPS Type = 65
)

// String returns the type's mnemonic.
func (t Type) String() string {
	switch t {
	case TypeA:
		return "A"
	case TypeAAAA:
		return "AAAA"
	case TypeSRV:
		return "SRV"
	case TypeHTTPS:
		return "HTTPS"
	}
	return "TYPE" + strconv.Itoa(int(t))
}

// MarshalText returns the mnemonic.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// DNS answers questions. An error is a temporary failure whose text is its
// status, such as "SERVFAIL" or "TIMEOUT", or wraps ErrAliases. An Answer
// without records means that there are none, or that the name does not exist.
// Names are absolute, in lower case, without the final dot.
type DNS interface {
	Lookup(ctx context.Context, name string, t Type) (Answer, error)
}

// ErrAliases is the error for circular CNAMEs, and for more than 8.
var ErrAliases = errors.New("circular aliases")

// An Answer has the records of one question. Of the slices only the one for the
// question's type is used. The Resolver does not change them.
type Answer struct {
	Addrs []netip.Addr
	SRV   []SRV
	HTTPS []HTTPS
	// Aliases are the targets of the CNAMEs that led to the records, in order.
	Aliases []string
	TTL     time.Duration // the smallest of all records and CNAMEs
	Secure  bool          // a trusted resolver validated all of it (the AD bit)
}

// An SRV is an SRV record (RFC 2782).
type SRV struct {
	Priority, Weight, Port uint16
	Target                 string // as answered, with the final dot
}

// String returns the record's data as a zone file has it.
func (s SRV) String() string {
	return fmt.Sprintf("%d %d %d %s", s.Priority, s.Weight, s.Port, s.Target)
}

// An HTTPS is an HTTPS record (RFC 9460). Hints are left out: they are not
// used.
type HTTPS struct {
	Priority  uint16 // 0 for AliasMode
	Target    string // as answered, with the final dot
	ALPN      []string
	Port      uint16
	HasPort   bool
	Mandatory []uint16 // the keys that a client has to know
}

// String returns the record's data as a zone file has it.
func (h HTTPS) String() string {
	s := fmt.Sprintf("%d %s", h.Priority, h.Target)
	if len(h.ALPN) > 0 {
		s += " alpn=" + strings.Join(h.ALPN, ",")
	}
	if h.HasPort {
		s += " port=" + strconv.Itoa(int(h.Port))
	}
	return s
}

// lines returns the records of a.
func (a *Answer) lines() []string {
	var list []string
	for _, r := range a.Addrs {
		list = append(list, r.String())
	}
	for _, r := range a.SRV {
		list = append(list, clean(r.String()))
	}
	for _, r := range a.HTTPS {
		list = append(list, clean(r.String()))
	}
	return list
}

// clean returns s for a log or a terminal: printable ASCII, and not longer than
// a name can be.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), maxNameLength+len("65535 65535 65535 "))]
}
