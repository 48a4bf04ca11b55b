package federation

// An Identity is the way in which a server proved a domain.
type Identity int

// The identities.
const (
	None        Identity = iota // nothing is proved
	DNSSEC                      // signed SRV record
	WellKnown                   // delegation file of the domain
	Pin                         // key that was exchanged beforehand
	Certificate                 // certificate for the domain
)

// String returns the name of i in the output of programs.
func (i Identity) String() string {
	switch i {
	case DNSSEC:
		return "dnssec"
	case WellKnown:
		return "well-known"
	case Pin:
		return "pin"
	case Certificate:
		return "certificate"
	}
	return "none"
}

// MarshalText returns the name of i.
func (i Identity) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// A Policy is the identity that an operator asks of a peer.
type Policy int

// The policies.
const (
	Trusted   Policy = iota // the peer proves its domain in any of the ways
	Encrypted               // the same; the operator names keys of the peer
)

// String returns the policy's name in a configuration.
func (p Policy) String() string {
	if p == Encrypted {
		return "encrypted"
	}
	return "trusted"
}

// Accepts reports whether the identity i satisfies p.
func (p Policy) Accepts(i Identity) bool {
	return i != None
}
