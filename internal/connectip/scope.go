package connectip

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Scope limits a request to a destination and an upper-layer protocol (RFC 9484
// section 4.6). The zero value is no limit. At most one of Prefix and Name is
// set.
type Scope struct {
	Prefix   netip.Prefix // destination address or prefix; zero: none
	Name     string       // destination DNS name; empty: none
	Protocol uint8        // 0: any
}

// ParseScope parses the decoded values of the variables target and ipproto. "*"
// means no limit.
func ParseScope(target, ipproto string) (Scope, error) {
	var s Scope
	if target == "" || ipproto == "" {
		return s, errors.New("target and ipproto must not be empty; \"*\" stands for any")
	}
	if ipproto != "*" {
		n, err := strconv.ParseUint(ipproto, 10, 8)
		if err != nil || strconv.FormatUint(n, 10) != ipproto {
			return s, fmt.Errorf("ipproto %q is not a number from 0 to 255", ipproto)
		}
		s.Protocol = uint8(n)
	}
	switch {
	case target == "*":
		return s, nil
	case strings.Contains(target, "/"):
		p, err := netip.ParsePrefix(target)
		if err != nil {
			return s, fmt.Errorf("target %q is not an address prefix", target)
		}
		if p.Masked() != p {
			return s, fmt.Errorf("target %q has bits set beyond its prefix length; use %s",
				target, p.Masked())
		}
		if p.Addr().Is4In6() {
			return s, fmt.Errorf("target %q is an IPv4 address in IPv6 form", target)
		}
		s.Prefix = p
	default:
		if a, err := netip.ParseAddr(target); err == nil {
			if a.Zone() != "" || a.Is4In6() {
				return s, fmt.Errorf("target %q has a zone, or is an IPv4 address in IPv6 form",
					target)
			}
			s.Prefix = netip.PrefixFrom(a, a.BitLen())
			return s, nil
		}
		if !validName(target) {
			return s, fmt.Errorf("target %q is neither an address, nor a prefix, nor a DNS name",
				target)
		}
		s.Name = target
	}
	return s, nil
}

// validName reports whether s is a valid DNS host name: labels of letters,
// digits, hyphens and underscores. A name with a number as its last label is
// invalid, because it is probably a mistyped address.
func validName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for _, c := range []byte(l) {
			if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' ||
				c == '_') {
				return false
			}
		}
	}
	_, err := strconv.Atoi(labels[len(labels)-1])
	return err != nil
}

// IsZero reports whether s is no limit.
func (s Scope) IsZero() bool { return s == Scope{} }

// variables returns the values of target and ipproto for s.
func (s Scope) variables() (target, ipproto string) {
	target, ipproto = "*", "*"
	switch {
	case s.Name != "":
		target = s.Name
	case s.Prefix.IsValid() && s.Prefix.IsSingleIP():
		target = s.Prefix.Addr().String()
	case s.Prefix.IsValid():
		target = s.Prefix.String()
	}
	if s.Protocol != 0 {
		ipproto = strconv.Itoa(int(s.Protocol))
	}
	return target, ipproto
}

// String returns s as text for logs and users.
func (s Scope) String() string {
	target, proto := s.variables()
	return "target " + target + ", protocol " + proto
}
