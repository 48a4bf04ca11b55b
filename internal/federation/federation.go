// Package federation has the rules by which two owners of networks trust each
// other: the fields of a request for a pair of domains, and the proofs by which
// a server shows that it stands for a domain.
//
// A pair is a domain of one owner and a domain of another. The dialer asks for
// a pair by a CONNECT-IP request with the fields Masque-From, its own domain,
// and Masque-To, the domain of the acceptor. Each end then finds the identity
// of the other on their connection, by [Trust.Identify], and judges it by its
// own policy.
package federation

import (
	"errors"
	"fmt"
	"net/http"

	"masquevpn/internal/discovery"
)

// The header fields of a request for a pair.
const (
	FieldFrom     = "Masque-From"
	FieldTo       = "Masque-To"
	FieldDialback = "Masque-Dialback"
)

// IsRequest reports whether a request with the header h is for a pair.
func IsRequest(h http.Header) bool { return len(h.Values(FieldFrom)) > 0 }

// ParseFields returns the domains in the header of a request for a pair. Each
// field has to be there once, and to be the name of a domain.
func ParseFields(h http.Header) (from, to string, err error) {
	if from, err = parseField(h, FieldFrom); err != nil {
		return "", "", err
	}
	if to, err = parseField(h, FieldTo); err != nil {
		return "", "", err
	}
	return from, to, nil
}

// parseField returns the domain in a field.
func parseField(h http.Header, field string) (string, error) {
	values := h.Values(field)
	if len(values) != 1 {
		return "", fmt.Errorf("the request has %d fields %s, not one", len(values), field)
	}
	d, err := ParseDomain(values[0])
	if err != nil {
		return "", fmt.Errorf("the field %s is not the name of a domain", field)
	}
	return d, nil
}

var errNotADomain = errors.New("not the name of a domain")

// ParseDomain parses the name of a domain and returns it in lower case, without
// the final dot.
func ParseDomain(s string) (string, error) {
	n, err := discovery.ParseName(s)
	if err != nil || n.Host() == "" || n.Port() != 0 {
		return "", errNotADomain
	}
	return n.Host(), nil
}

// An Identity is the way in which a server proved to stand for a domain. The
// zero value is none. The later ones are stronger.
type Identity int

// The identities. Those from DNSSEC on are strong.
const (
	None        Identity = iota
	Dialback             // weak: a server that the domain's DNS leads to confirmed the connection
	DNSSEC               // a signed SRV record of the domain leads to the certificate's name
	WellKnown            // the domain's delegation file names the certificate's name
	Pin                  // the key was exchanged beforehand
	Certificate          // the certificate is for the domain
)

var identityNames = [...]string{"none", "dialback", "dnssec", "well-known", "pin", "certificate"}

// String returns the name of i in output and metrics.
func (i Identity) String() string { return identityNames[i] }

// Strong reports whether i is a proof and not just a sign.
func (i Identity) Strong() bool { return i >= DNSSEC }

// A Policy is the strength that an owner asks of the other's identity.
type Policy int

// The policies.
const (
	Trusted   Policy = iota // strong
	Encrypted               // weak is enough
)

// Accepts reports whether i is strong enough for p.
func (p Policy) Accepts(i Identity) bool {
	return i.Strong() || p == Encrypted && i != None
}
