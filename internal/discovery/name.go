package discovery

import (
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
)

const (
	defaultPort   = 443
	maxNameLength = 253 // characters, without the final dot
	maxLabel      = 63  // characters
)

// A Name is a server name: an address or the name of a host, perhaps with a
// port.
//
//	server-name  = host [ ":" port ]
//	host         = IPv4address / "[" IPv6address "]" / dns-name
//	port         = %x31-39 *4DIGIT           ; 1 to 65535, no leading zeros
//	dns-name     = label *( "." label ) [ "." ]
//	label        = alnum [ *61( alnum / "-" ) alnum ]
//	alnum        = ALPHA / DIGIT / "_"
//
// The addresses are those of RFC 3986, without zones and without IPv4 addresses
// in IPv6 form. The last label of a name is no number, so that a mistyped
// address is no name.
type Name struct {
	host string     // lower case, without the final dot; "" for an address
	addr netip.Addr // not valid for the name of a host
	port uint16     // 0 for none
}

// ParseName parses a server name, as a delegation file has it. The error is an
// *Error with the code InvalidName.
func ParseName(s string) (Name, error) {
	if rest, ok := strings.CutPrefix(s, "["); ok {
		return parseBracketed(rest)
	}
	host, port, hasPort := strings.Cut(s, ":")
	n := Name{}
	if hasPort {
		var ok bool
		if n.port, ok = parsePort(port); !ok {
			return Name{}, notAName()
		}
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
		n.addr = a
		return n, nil
	}
	var err error
	n.host, err = parseHost(host)
	return n, err
}

// ParseInput parses what an operator writes for a proxy: a server name, or an
// IPv6 address without brackets. The error is as that of ParseName.
func ParseInput(s string) (Name, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Is6() {
		return addressName(a, 0)
	}
	return ParseName(s)
}

// parseBracketed parses a server name behind its opening bracket.
func parseBracketed(s string) (Name, error) {
	inside, rest, ok := strings.Cut(s, "]")
	a, err := netip.ParseAddr(inside)
	if !ok || err != nil || !a.Is6() {
		return Name{}, notAName()
	}
	var port uint16
	if rest != "" {
		digits, ok := strings.CutPrefix(rest, ":")
		if port, _ = parsePort(digits); !ok || port == 0 {
			return Name{}, notAName()
		}
	}
	return addressName(a, port)
}

// addressName returns the Name of an IPv6 address.
func addressName(a netip.Addr, port uint16) (Name, error) {
	switch {
	case a.Zone() != "":
		return Name{}, &Error{Code: InvalidName,
			Reason: "has a zone, which no certificate can have",
			Remedy: "write the address without it"}
	case a.Is4In6():
		return Name{}, &Error{Code: InvalidName, Reason: "an IPv4 address in IPv6 form",
			Remedy: "write " + strconv.Quote(a.Unmap().String())}
	}
	return Name{addr: a, port: port}, nil
}

// parsePort parses a port and reports whether it is one.
func parsePort(s string) (uint16, bool) {
	if s == "" || s[0] == '0' {
		return 0, false
	}
	p, err := strconv.ParseUint(s, 10, 16)
	return uint16(p), err == nil
}

// parseHost parses a dns-name and returns it in lower case, without the final
// dot.
func parseHost(s string) (string, error) {
	for _, r := range s {
		if r >= 0x80 {
			return "", notASCII(s)
		}
	}
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if len(s) > maxNameLength {
		return "", notAName()
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return "", notAName()
		}
		last = label
	}
	if isNumber(last) {
		return "", notAName()
	}
	for _, suffix := range []string{".invalid", ".onion"} {
		if strings.HasSuffix(s, suffix) {
			return "", &Error{Code: InvalidName,
				Reason: "a name below " + suffix + " is not in DNS",
				Remedy: `write for example "vpn.example.org"`}
		}
	}
	return s, nil
}

func isLabel(s string) bool {
	if s == "" || len(s) > maxLabel || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

// isNumber reports whether a label is a decimal or hexadecimal number, which
// some programs take for the end of an address.
func isNumber(label string) bool {
	digits, cutset := label, "0123456789"
	if hex, ok := strings.CutPrefix(label, "0x"); ok && hex != "" {
		digits, cutset = hex, "0123456789abcdef"
	}
	return strings.Trim(digits, cutset) == ""
}

// isLocal reports whether a host's name is not a matter of the public DNS: it
// has one label, or is below .local (RFC 6762) or .localhost (RFC 6761).
func isLocal(host string) bool {
	return !strings.Contains(host, ".") || strings.HasSuffix(host, ".local") ||
		strings.HasSuffix(host, ".localhost")
}

func notAName() *Error {
	return &Error{Code: InvalidName, Reason: "not a name, host:port or URI template",
		Remedy: `write for example "vpn.example.org"`}
}

// notASCII returns the error for a name in another script, with the form to
// write where there is one.
func notASCII(s string) *Error {
	ascii, err := idna.Lookup.ToASCII(s)
	if err != nil {
		return notAName()
	}
	return &Error{Code: InvalidName, Reason: "not ASCII", Remedy: "write " + strconv.Quote(ascii)}
}

// Host returns the name of the host in lower case, without the final dot, or ""
// for an address.
func (n Name) Host() string { return n.host }

// Addr returns the address, not valid for the name of a host.
func (n Name) Addr() netip.Addr { return n.addr }

// Port returns the port, or 0 if n has none.
func (n Name) Port() uint16 { return n.port }

// Discovers reports whether a resolution of n asks for anything but addresses.
func (n Name) Discovers() bool { return n.host != "" && n.port == 0 && !isLocal(n.host) }

// String returns n as an :authority has it, with the port if n has one.
func (n Name) String() string {
	host := n.host
	if n.addr.IsValid() {
		host = n.addr.String()
	}
	if n.addr.Is6() {
		host = "[" + host + "]"
	}
	if n.port == 0 {
		return host
	}
	return host + ":" + strconv.Itoa(int(n.port))
}
