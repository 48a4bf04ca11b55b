package config

import (
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"masquevpn/internal/congestion"
	"masquevpn/internal/discovery"
	"masquevpn/routing"

	"github.com/pelletier/go-toml/v2"
)

// prefixes returns a list of prefixes whose host bits are zero.
func (t *table) prefixes(key string, def ...string) []netip.Prefix {
	return t.addressList(key, def, true)
}

// addresses returns a list of addresses with prefix lengths: of their network,
// or of a requested prefix.
func (t *table) addresses(key string, def ...string) []netip.Prefix {
	return t.addressList(key, def, false)
}

func (t *table) addressList(key string, def []string, masked bool) []netip.Prefix {
	var list []netip.Prefix
	for i, s := range t.strings(key, def) {
		p, reason, remedy := parsePrefix(s, masked)
		if reason != "" {
			t.add(element(key, i), reason, remedy)
			continue
		}
		list = append(list, p)
	}
	return list
}

// hosts returns a list of distinct unicast addresses that other hosts can
// reach.
func (t *table) hosts(key string) []netip.Addr {
	var list []netip.Addr
	for i, s := range t.strings(key, nil) {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			t.add(element(key, i), "not an address", `write for example "10.77.0.1" or "fd77::1"`)
		case a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast():
			t.add(element(key, i), "not an address that others can reach",
				`write for example "10.77.0.1" or "fd77::1"`)
		case slices.Contains(list, a.Unmap()):
			t.add(element(key, i), "given twice", "remove one")
		default:
			list = append(list, a.Unmap())
		}
	}
	return list
}

// domains returns a list of distinct domain names, without their final dots.
func (t *table) domains(key string) []string { return t.domainList(key, false) }

// domainsOrAll returns a list like domains that may contain "." for all names.
func (t *table) domainsOrAll(key string) []string { return t.domainList(key, true) }

func (t *table) domainList(key string, root bool) []string {
	var list []string
	for i, s := range t.strings(key, nil) {
		name := strings.ToLower(strings.TrimSuffix(s, "."))
		all := root && s == "."
		if all {
			name = s
		}
		switch {
		case !all && (!IsHost(s) || isAddr(s)):
			t.add(element(key, i), "not a domain name",
				`write for example "corp.example"; of other scripts, the form that starts with xn--`)
		case slices.Contains(list, name):
			t.add(element(key, i), "given twice", "remove one")
		default:
			list = append(list, name)
		}
	}
	return list
}

// prefix returns one prefix of the family, or the zero Prefix for "".
func (t *table) prefix(key, def string, v4 bool) netip.Prefix {
	s := t.string(key, def)
	if s == "" {
		return netip.Prefix{}
	}
	p, reason, remedy := parsePrefix(s, true)
	if reason == "" && p.Addr().Is4() != v4 {
		reason, remedy = "an address of the other family", "put it under the other key"
	}
	if reason != "" {
		t.add(key, reason, remedy)
		return netip.Prefix{}
	}
	return p
}

// lengthWithin returns the length of prefixes that must lie within whole, or 0.
func (t *table) lengthWithin(key string, whole netip.Prefix) int {
	if whole.IsValid() {
		return t.int(key, 0, whole.Bits()+1, whole.Addr().BitLen())
	}
	if _, ok := t.get(key); ok {
		t.add(key, "there is no pool of this family", "set the pool too, or remove it")
	}
	return 0
}

func parsePrefix(s string, masked bool) (p netip.Prefix, reason, remedy string) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			a = a.Unmap()
			return p, "the prefix length is missing",
				fmt.Sprintf(`write "%s/%d" for this one address`, a, a.BitLen())
		}
		return p, "not an address prefix", `write for example "192.0.2.0/24" or "2001:db8::/32"`
	}
	if p.Addr().Is4In6() {
		return p, "an IPv4 address in IPv6 form", "write the IPv4 prefix"
	}
	if masked && p != p.Masked() {
		return p, "bits are set behind the prefix length", fmt.Sprintf("write %q", p.Masked())
	}
	return p, "", ""
}

// duration returns a time span of at least low.
func (t *table) duration(key string, def, low time.Duration) time.Duration {
	s := t.string(key, def.String())
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		t.add(key, "not a time span", `write for example "30s" or "5m"`)
		return def
	case d < low:
		t.add(key, "too short", "write at least "+strconv.Quote(low.String()))
		return def
	}
	return d
}

// time returns a point in time. A date means its beginning in UTC.
func (t *table) time(key string) time.Time {
	if v, ok := t.values[key].(toml.LocalDate); ok {
		t.get(key)
		return v.AsTime(time.UTC)
	}
	return scalar(t, key, time.Time{},
		"a time such as 2026-01-02T15:04:05Z, or a date such as 2026-01-02, without quotes")
}

// mtu returns a number of bytes, or 0 for "auto".
func (t *table) mtu(key string) int {
	const low, high = 576, 65535
	v, ok := t.get(key)
	if !ok || v == "auto" {
		return 0
	}
	if n, ok := v.(int64); ok && n >= low && n <= high {
		return int(n)
	}
	t.add(key, "not an MTU", fmt.Sprintf(`write "auto" or a number from %d to %d`, low, high))
	return 0
}

// hostRoutes returns the value for true, false or "all".
func (t *table) hostRoutes(key string) routing.HostRoutes {
	switch v, ok := t.get(key); {
	case !ok, v == true:
		return routing.HostPrivate
	case v == "all":
		return routing.HostAll
	case v == false:
		return routing.HostNone
	}
	t.add(key, `not true, false or "all"`,
		`write true for the private networks of this host, "all" for all of its routes, false for neither`)
	return routing.HostPrivate
}

// congestion returns a mode of congestion control.
func (t *table) congestion(key string) congestion.Mode {
	return congestion.Mode(t.oneOf(key, string(congestion.Inner), string(congestion.Outer)))
}

// mark returns a mask of two bits of packet and connection marks.
func (t *table) mark(key string) uint32 {
	v, ok := t.get(key)
	if !ok {
		return routing.DefaultMark
	}
	n, isNumber := v.(int64)
	if text, isText := v.(string); isText {
		u, err := strconv.ParseUint(text, 0, 32)
		n, isNumber = int64(u), err == nil
	}
	if !isNumber || n != int64(uint32(n)) || bits.OnesCount32(uint32(n)) != 2 {
		t.add(key, "not two bits of a mark",
			fmt.Sprintf(`write for example "%#x", two bits that no other program of this host uses in marks`, uint32(routing.DefaultMark)))
		return routing.DefaultMark
	}
	return uint32(n)
}

// device returns the name of a network interface. One %d in it stands for the
// lowest free number.
func (t *table) device(key, def string) string {
	const limit = 15 // IFNAMSIZ with its terminating zero
	s := t.string(key, def)
	name := strings.Replace(s, "%d", "0", 1)
	bad := name == "" || name == "." || name == ".." || len(s) > limit
	for i := range len(name) {
		bad = bad || name[i] <= ' ' || name[i] >= 0x7f ||
			strings.IndexByte("/:%\\\"'", name[i]) >= 0
	}
	if bad {
		t.add(key, "not a name of a network interface",
			fmt.Sprintf(`write for example "masque0", at most %d characters`, limit))
		return def
	}
	return s
}

// isHostPort reports whether s is HOST:PORT with a port from 1 to 65535. The
// host may be empty or an address in brackets.
func isHostPort(s string) bool {
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}

// tcpAddress returns an address of this host with a port, or "" for none.
func (t *table) tcpAddress(key, def string) string {
	s := t.string(key, def)
	if s != "" && (!isHostPort(s) || hostOf(s) != "" && !isAddr(hostOf(s))) {
		t.add(key, "not an address and port", `write for example "127.0.0.1:9484", or "" for none`)
		return ""
	}
	return s
}

// IsHost reports whether s is a domain name or an IP address without a zone.
func IsHost(s string) bool {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Zone() == ""
	}
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	digits := true // rejects invalid addresses such as 256.1.1.1
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		digits = true
		for i := range len(label) {
			c := label[i]
			isDigit := '0' <= c && c <= '9'
			if !isDigit && !('a' <= c && c <= 'z') && !('A' <= c && c <= 'Z') && c != '-' &&
				c != '_' {
				return false
			}
			digits = digits && isDigit
		}
	}
	return !digits
}

// IsName reports whether s can name a user or a tunnel, in file names,
// certificates and logs: 1 to 64 letters, digits and any of ".-_@", beginning
// with a letter or a digit.
func IsName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
		case i > 0 && strings.IndexByte(".-_@", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// dnssec returns a mode of DNSSEC.
func (t *table) dnssec(key string) discovery.DNSSEC {
	return map[string]discovery.DNSSEC{"off": discovery.DNSSECOff, "use": discovery.DNSSECUse,
		"require": discovery.DNSSECRequire}[t.oneOf(key, "off", "use", "require")]
}

// nameservers returns a list of distinct addresses of DNS servers, with their
// ports.
func (t *table) nameservers(key string) []netip.AddrPort {
	const dnsPort = 53
	var list []netip.AddrPort
	for i, s := range t.strings(key, nil) {
		server, err := netip.ParseAddrPort(s)
		if err != nil {
			var a netip.Addr
			a, err = netip.ParseAddr(s)
			server = netip.AddrPortFrom(a, dnsPort)
		}
		switch {
		case err != nil || server.Addr().IsUnspecified() || server.Port() == 0:
			t.add(element(key, i), "not the address of a server",
				`write for example "127.0.0.1" or "[::1]:5353"`)
		case slices.Contains(list, server):
			t.add(element(key, i), "given twice", "remove one")
		default:
			list = append(list, server)
		}
	}
	return list
}
