package federation

import (
	"fmt"
	"net/http"
	"strings"

	"masquevpn/internal/discovery"
)

// The request fields of a pair of domains.
const (
	FromHeader = "Masque-From" // the domain of the sender
	ToHeader   = "Masque-To"   // the domain of the receiver
)

// maxField limits the part of a field that appears in errors, in characters.
const maxField = 253

// A Pair is two domains whose networks are linked, as a request has them.
type Pair struct {
	From string // the domain of the sender
	To   string // the domain of the receiver
}

// SetFields sets the request fields of p.
func (p Pair) SetFields(h http.Header) {
	h.Set(FromHeader, p.From)
	h.Set(ToHeader, p.To)
}

// IsPair reports whether a request with the header h asks for a pair.
func IsPair(h http.Header) bool { return len(h.Values(FromHeader)) > 0 }

// ParseFields returns the pair that a request with the header h asks for. Both
// fields are there once, each with the name of a host, which is returned in
// lower case without a final dot.
func ParseFields(h http.Header) (p Pair, err error) {
	if p.From, err = domain(h, FromHeader); err != nil {
		return Pair{}, err
	}
	if p.To, err = domain(h, ToHeader); err != nil {
		return Pair{}, err
	}
	return p, nil
}

// domain returns the name in a field.
func domain(h http.Header, field string) (string, error) {
	values := h.Values(field)
	if len(values) != 1 {
		return "", fmt.Errorf("%s is there %d times instead of once", field, len(values))
	}
	name, ok := ParseDomain(values[0])
	if !ok {
		return "", fmt.Errorf("%s %q is not a domain name", field, Printable(values[0]))
	}
	return name, nil
}

// ParseDomain returns a domain name in lower case without its final dot, and
// reports whether s is one.
func ParseDomain(s string) (string, bool) {
	n, err := discovery.ParseName(s)
	if err != nil || n.Host() == "" || n.Port() != 0 {
		return "", false
	}
	return n.Host(), true
}

// Printable returns the beginning of s, which a peer sent, with everything but
// printable ASCII replaced.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s[:min(len(s), maxField)])
}
