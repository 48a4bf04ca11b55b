package capsule

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/quic-go/quic-go/quicvarint"
	"pgregory.net/rapid"
)

func addrs(s ...string) (list []netip.Addr) {
	for _, a := range s {
		list = append(list, netip.MustParseAddr(a))
	}
	return list
}

// plain returns a nameserver for unencrypted DNS.
func plain(addresses ...string) Nameserver {
	return Nameserver{Priority: 1, Addresses: addrs(addresses...)}
}

// dns returns a capsule with one configuration.
func dns(c DNSConfiguration) *DNSAssign { return &DNSAssign{[]DNSConfiguration{c}} }

// vectorHex returns the vector with the given ID in hexadecimal.
func vectorHex(t *testing.T, id string) string {
	t.Helper()
	for _, v := range readVectors(t) {
		if v.ID == id {
			return v.Hex
		}
	}
	t.Fatalf("no vector %s", id)
	return ""
}

// TestDNSEncoding encodes and decodes the draft's examples, among others.
func TestDNSEncoding(t *testing.T) {
	for _, tt := range []struct {
		name    string
		capsule Capsule
		hex     string
	}{
		{"no configuration", &DNSAssign{}, "9ace79ec00"},
		{"split tunnel", dns(DNSConfiguration{
			Nameservers:     []Nameserver{plain("192.0.2.33", "2001:db8::1")},
			InternalDomains: []string{"internal.corp.example"},
			SearchDomains:   []string{"internal.corp.example", "corp.example"},
		}), vectorHex(t, "DN2")},
		{"DoH alone", dns(DNSConfiguration{
			Nameservers: []Nameserver{{
				Priority: 1, AuthName: "masque.example.org", ALPN: []string{"h2", "h3"},
				NoDefaultALPN: true, DoHPath: "/dns-query{?dns}",
			}},
			InternalDomains: []string{""},
		}), vectorHex(t, "DN3")},
		{"full tunnel", dns(DNSConfiguration{
			Nameservers: []Nameserver{{Priority: 1, AuthName: "masque.example.org",
				ALPN: []string{"h2", "h3"}, DoHPath: "/dns-query{?dns}"}},
			InternalDomains: []string{""},
		}), vectorHex(t, "DN4")},
		{"port and other parameters", dns(DNSConfiguration{
			Nameservers: []Nameserver{{
				Priority: 258, Addresses: addrs("192.0.2.1"), AuthName: "a", ALPN: []string{"dot"},
				Port:   853,
				Params: []SvcParam{{0, []byte{0, 1, 0, 3}}, {5, []byte("ech")}, {65280, nil}},
			}},
		}), "9ace79ec2f" + "01" + "0102" + "01c0000201" + "00" + "0161" + "21" +
			"0000" + "0004" + "00010003" + "0001" + "0004" + "03646f74" + "0003" + "0002" + "0355" +
			"0005" + "0003" + "656368" + "ff00" + "0000" + "00" + "00"},
		{"two configurations", &DNSAssign{[]DNSConfiguration{
			{Nameservers: []Nameserver{plain("192.0.2.1")}, InternalDomains: []string{"a"}},
			{Nameservers: []Nameserver{plain("192.0.2.2")}, InternalDomains: []string{"b"}},
		}}, "9ace79ec1e" + "01000101c000020100000001016100" + "01000101c000020200000001016200"},
		{"no prefixes", &PREF64{}, "a74c0fbc00"},
		{"well-known prefix", &PREF64{[]netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")}},
			vectorHex(t, "PF2")},
		{"all lengths", &PREF64{prefixes("2001:db8::/32", "2001:db8:100::/40", "2001:db8:122::/48",
			"2001:db8:122:300::/56", "2001:db8:122:344::/64", "2001:db8:122:344::/96")},
			"a74c0fbc404e" + "2020010db80000000000000000" + "2820010db80100000000000000" +
				"3020010db80122000000000000" +
				"3820010db80122030000000000" + "4020010db80122034400000000" +
				"6020010db80122034400000000"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.capsule.Validate(); err != nil {
				t.Fatal(err)
			}
			b := tt.capsule.Append([]byte("before"))
			encoded, ok := bytes.CutPrefix(b, []byte("before"))
			if got := hex.EncodeToString(encoded); !ok || got != tt.hex {
				t.Fatalf("encoded %s, want %s", got, tt.hex)
			}
			got, err := NewReader(bytes.NewReader(encoded), len(encoded)).Next()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.capsule, got, compare); diff != "" {
				t.Errorf("decoded (-want +got):\n%s", diff)
			}
		})
	}
}

func prefixes(s ...string) (list []netip.Prefix) {
	for _, p := range s {
		list = append(list, netip.MustParsePrefix(p))
	}
	return list
}

func TestDNSValidateRefuses(t *testing.T) {
	good := plain("192.0.2.1")
	with := func(change func(*Nameserver)) Capsule {
		bad := plain("192.0.2.1")
		change(&bad)
		return &DNSAssign{[]DNSConfiguration{
			{Nameservers: []Nameserver{good}},
			{Nameservers: []Nameserver{good, bad}},
		}}
	}
	param := func(p ...SvcParam) Capsule { return with(func(n *Nameserver) { n.Params = p }) }
	internal := func(name string) Capsule {
		return dns(DNSConfiguration{Nameservers: []Nameserver{good},
			InternalDomains: []string{"", name}})
	}
	search := func(name string) Capsule {
		return dns(DNSConfiguration{Nameservers: []Nameserver{good},
			SearchDomains: []string{"ok.example", name}})
	}
	nat64 := func(p ...netip.Prefix) Capsule {
		return &PREF64{append(prefixes("64:ff9b::/96"), p...)}
	}
	for _, tt := range []struct {
		name    string
		capsule Capsule
		entry   int
		field   string
	}{
		{"no nameserver", dns(DNSConfiguration{SearchDomains: []string{"a"}}), 0,
			fieldNameserverCount},
		{"priority 0", with(func(n *Nameserver) { n.Priority = 0 }), 1, fieldPriority},
		{"no address", with(func(n *Nameserver) {
			n.Addresses = []netip.Addr{{}}
		}), 1, fieldAddress},
		{"zone", with(func(n *Nameserver) {
			n.Addresses = addrs("fe80::1%eth0")
		}), 1, fieldAddress},
		{"alpn without name", with(func(n *Nameserver) {
			n.ALPN = []string{"dot"}
		}), 1, fieldAuthName},
		{"no-default-alpn without name", with(func(n *Nameserver) {
			n.NoDefaultALPN = true
		}), 1, fieldAuthName},
		{"bad name", with(func(n *Nameserver) { n.AuthName = "a b" }), 1, fieldAuthName},
		{"empty protocol", with(func(n *Nameserver) {
			n.AuthName, n.ALPN = "a", []string{"h2", ""}
		}), 1, fieldParams},
		{"long protocol", with(func(n *Nameserver) {
			n.AuthName, n.ALPN = "a", []string{strings.Repeat("x", 256)}
		}), 1, fieldParams},
		{"too many protocols", with(func(n *Nameserver) {
			n.AuthName, n.ALPN = "a", slices.Repeat([]string{"x"}, 1<<15)
		}), 1, fieldParams},
		{"absolute dohpath", with(func(n *Nameserver) {
			n.DoHPath = "https://a/{?dns}"
		}), 1, fieldParams},
		{"dohpath not in UTF-8", with(func(n *Nameserver) { n.DoHPath = "/\xff" }), 1, fieldParams},
		{"ipv4hint", param(SvcParam{4, []byte{192, 0, 2, 1}}), 1, fieldParams},
		{"ipv6hint", param(SvcParam{6, make([]byte, 16)}), 1, fieldParams},
		{"port in Params", param(SvcParam{3, []byte{0, 53}}), 1, fieldParams},
		{"keys not in order", param(SvcParam{9, nil}, SvcParam{8, nil}), 1, fieldParams},
		{"key twice", param(SvcParam{9, nil}, SvcParam{9, nil}), 1, fieldParams},
		{"long value", param(SvcParam{9, make([]byte, 1<<16)}), 1, fieldParams},
		{"mandatory empty", param(SvcParam{0, nil}), 1, fieldParams},
		{"mandatory in its own list", param(SvcParam{0, []byte{0, 0}}), 1, fieldParams},
		{"mandatory not in order", param(SvcParam{0, []byte{0, 3, 0, 1}}), 1, fieldParams},
		{"mandatory truncated", param(SvcParam{0, []byte{0, 3, 0}}), 1, fieldParams},
		{"internal domain with a dot", internal("corp.example."), 0, fieldInternalDomain},
		{"internal domain with a star", internal("*.corp.example"), 0, fieldInternalDomain},
		{"search domain root", search(""), 0, fieldSearchDomain},
		{"search domain with a line break", search("corp.example\nnameserver"), 0,
			fieldSearchDomain},
		{"search domain in Unicode", search("bücher.example"), 0, fieldSearchDomain},
		{"search domain with an empty label", search("corp..example"), 0, fieldSearchDomain},
		{"search domain with a long label", search(strings.Repeat("a", 64)), 0, fieldSearchDomain},
		{"long search domain", search(strings.Repeat("a.", 126) + "aa"), 0, fieldSearchDomain},
		{"IPv4 prefix", nat64(netip.MustParsePrefix("192.0.2.0/24")), 1, fieldNAT64Prefix},
		{"no prefix", nat64(netip.Prefix{}), 1, fieldNAT64Prefix},
		{"length 95", nat64(netip.MustParsePrefix("64:ff9b::/95")), 1, fieldNAT64Length},
		{"length 128", nat64(netip.MustParsePrefix("64:ff9b::/128")), 1, fieldNAT64Length},
		{"host bits", nat64(netip.MustParsePrefix("64:ff9b::/96"),
			netip.MustParsePrefix("64:ff9b:1::/32")), 2, fieldNAT64Prefix},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.capsule.Validate()
			e, ok := errors.AsType[*Error](err)
			if !ok || !errors.Is(err, ErrMalformed) {
				t.Fatalf("got %v, want an *Error that is ErrMalformed", err)
			}
			if e.Type != tt.capsule.Type() || e.Entry != tt.entry || e.Field != tt.field ||
				e.Reason == "" {
				t.Errorf("%v: want type %s, entry %d, field %s", e, tt.capsule.Type(), tt.entry,
					tt.field)
			}
			if strings.Contains(e.Error(), "\n") {
				t.Errorf("the error has more than one line: %q", e)
			}
		})
	}
}

func TestDNSReaderErrors(t *testing.T) {
	// good is a configuration. server is followed by the start of another, up
	// to the service parameters.
	const good = "\x01\x00\x01\x01\xc0\x00\x02\x01\x00\x00\x00\x00\x00"
	const server = good + "\x01\x00\x01\x01\xc0\x00\x02\x01\x00\x01a"
	huge := string(quicvarint.Append(nil, quicvarint.Max))
	for _, tt := range []struct {
		name  string
		typ   Type
		value string
		field string
	}{
		{"no nameservers", TypeDNSAssign, good + "\x00\x00\x00", fieldNameserverCount},
		{"count truncated", TypeDNSAssign, good + "\x40", fieldNameserverCount},
		{"many nameservers", TypeDNSAssign, good + huge, fieldNameserverCount},
		{"one nameserver too many", TypeDNSAssign, good + "\x02" + good[1:11],
			fieldNameserverCount},
		{"many IPv4 addresses", TypeDNSAssign, good + "\x01\x00\x01" + huge + "\x00\x00\x00",
			fieldIPv4Count},
		{"IPv6 address truncated", TypeDNSAssign, good + "\x01\x00\x01\x00\x01\x20\x01\x0d\xb8",
			fieldIPv6Count},
		{"no name", TypeDNSAssign, good + "\x01\x00\x01\x01\xc0\x00\x02\x01\x00", fieldAuthName},
		{"name truncated", TypeDNSAssign, good + "\x01\x00\x01\x01\xc0\x00\x02\x01\x00\x02a",
			fieldAuthName},
		{"parameters truncated", TypeDNSAssign, server + "\x04\x00\x01", fieldParams},
		{"parameter key truncated", TypeDNSAssign, server + "\x01\x00\x00\x00", fieldParams},
		{"parameter value truncated", TypeDNSAssign, server + "\x05\x00\x09\x00\x02x\x00\x00",
			fieldParams},
		{"parameters not in order", TypeDNSAssign,
			server + "\x08\x00\x09\x00\x00\x00\x08\x00\x00\x00\x00", fieldParams},
		{"parameter twice", TypeDNSAssign, server + "\x08\x00\x02\x00\x00\x00\x02\x00\x00\x00\x00",
			fieldParams},
		{"empty alpn", TypeDNSAssign, server + "\x04\x00\x01\x00\x00\x00\x00", fieldParams},
		{"alpn truncated", TypeDNSAssign, server + "\x07\x00\x01\x00\x03\x03do\x00\x00",
			fieldParams},
		{"empty protocol", TypeDNSAssign, server + "\x05\x00\x01\x00\x01\x00\x00\x00", fieldParams},
		{"no-default-alpn with a value", TypeDNSAssign, server + "\x05\x00\x02\x00\x01x\x00\x00",
			fieldParams},
		{"port of a byte", TypeDNSAssign, server + "\x05\x00\x03\x00\x01\x35\x00\x00", fieldParams},
		{"port 0", TypeDNSAssign, server + "\x06\x00\x03\x00\x02\x00\x00\x00\x00", fieldParams},
		{"ipv4hint", TypeDNSAssign, server + "\x08\x00\x04\x00\x04\xc0\x00\x02\x01\x00\x00",
			fieldParams},
		{"empty dohpath", TypeDNSAssign, server + "\x04\x00\x07\x00\x00\x00\x00", fieldParams},
		{"many internal domains", TypeDNSAssign, server + "\x00" + huge, fieldInternalCount},
		{"bad internal domain", TypeDNSAssign, server + "\x00\x01\x01 \x00", fieldInternalDomain},
		{"internal domain of two dots", TypeDNSAssign, server + "\x00\x01\x02..\x00",
			fieldInternalDomain},
		{"no search domains", TypeDNSAssign, server + "\x00\x00", fieldSearchCount},
		{"empty search domain", TypeDNSAssign, server + "\x00\x00\x01\x00", fieldSearchDomain},
		{"search domain truncated", TypeDNSAssign, server + "\x00\x00\x01\x05corp",
			fieldSearchDomain},
		{"prefix truncated", TypePREF64, "\x60" + strings.Repeat("\x00", 12) + "\x60",
			fieldNAT64Prefix},
		{"prefix length 33", TypePREF64,
			"\x60" + strings.Repeat("\x00", 12) + "\x21" + strings.Repeat("\x00", 12),
			fieldNAT64Length},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := append(appendHeader(nil, tt.typ, len(tt.value)), tt.value...)
			c, err := NewReader(bytes.NewReader(b), 1<<10).Next()
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("got %v, %v, want an *Error", c, err)
			}
			if e.Type != tt.typ || e.Entry != 1 || e.Field != tt.field {
				t.Errorf("%v: want type %s, entry 1, field %s", e, tt.typ, tt.field)
			}
		})
	}
}

// TestDNSReaderNormalizes receives final dots of names and bits below the
// length of a prefix, which have no meaning and are not sent again.
func TestDNSReaderNormalizes(t *testing.T) {
	for _, tt := range []struct {
		name        string
		typ         Type
		value, want string
	}{
		{"final dots", TypeDNSAssign,
			"\x01\x00\x01\x01\xc0\x00\x02\x01\x00\x02a.\x00\x02\x01.\x03b.c\x01\x02c.",
			"\x01\x00\x01\x01\xc0\x00\x02\x01\x00\x01a\x00\x02\x00\x03b.c\x01\x01c"},
		{"bits below the prefix", TypePREF64,
			"\x28" + strings.Repeat("\xff", 12),
			"\x28" + strings.Repeat("\xff", 5) + strings.Repeat("\x00", 7)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := append(appendHeader(nil, tt.typ, len(tt.value)), tt.value...)
			c, err := NewReader(bytes.NewReader(b), 1<<10).Next()
			if err != nil {
				t.Fatal(err)
			}
			want := append(appendHeader(nil, tt.typ, len(tt.want)), tt.want...)
			if got := c.Append(nil); !bytes.Equal(got, want) {
				t.Errorf("%q became %q, want %q", b, got, want)
			}
		})
	}
}

// TestDNSMemory checks that a capsule of 64 KiB makes the Reader allocate
// memory in proportion, whatever it contains.
func TestDNSMemory(t *testing.T) {
	const limit = 64 << 10
	for name, entry := range map[string]string{
		"configurations":   "\x01\x00\x01\x00\x00\x00\x00\x00\x00",
		"internal domains": "",
	} {
		value := strings.Repeat(entry, limit/max(1, len(entry)))
		if entry == "" {
			value = "\x01\x00\x01\x00\x00\x00\x00" + string(quicvarint.Append(nil, limit-12)) +
				strings.Repeat("\x00", limit-12) + "\x00"
		}
		b := append(appendHeader(nil, TypeDNSAssign, len(value)), value...)
		t.Run(name, func(t *testing.T) {
			used := allocated(func() {
				if _, err := NewReader(bytes.NewReader(b), limit).Next(); err != nil {
					t.Error(err)
				}
			})
			// The factor is large because slices are reallocated as they
			// grow.
			if used > 100*limit {
				t.Errorf("%d bytes allocated", used)
			}
		})
	}
}

func TestUnencrypted(t *testing.T) {
	for _, tt := range []struct {
		name string
		n    Nameserver
		want bool
	}{
		{"address", plain("192.0.2.1"), true},
		{"name alone", Nameserver{Priority: 1, AuthName: "a", ALPN: []string{"h2"}}, false},
		{"encrypted as well", Nameserver{Addresses: addrs("192.0.2.1"), AuthName: "a",
			ALPN: []string{"dot"}}, true},
		{"encrypted only", Nameserver{Addresses: addrs("192.0.2.1"), AuthName: "a",
			ALPN: []string{"dot"}, NoDefaultALPN: true}, false},
		{"known key is mandatory", Nameserver{Addresses: addrs("192.0.2.1"), Port: 5353,
			Params: []SvcParam{{0, []byte{0, 3}}}}, true},
		{"unknown key is mandatory", Nameserver{Addresses: addrs("192.0.2.1"),
			Params: []SvcParam{{0, []byte{0, 3, 0, 9}}, {9, nil}}}, false},
		{"unknown key is optional", Nameserver{Addresses: addrs("192.0.2.1"),
			Params: []SvcParam{{9, nil}}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.n.Unencrypted(); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

var (
	genDomain = rapid.StringMatching(`[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63}){0,2}`)

	genNAT64 = rapid.Custom(func(t *rapid.T) netip.Prefix {
		bits := rapid.SampledFrom([]int{32, 40, 48, 56, 64, 96}).Draw(t, "bits")
		return netip.PrefixFrom(genAddr(false).Draw(t, "addr"), bits).Masked()
	})

	genNameserver = rapid.Custom(func(t *rapid.T) Nameserver {
		n := Nameserver{
			Priority: rapid.Uint16Range(1, math.MaxUint16).Draw(t, "priority"),
			Addresses: append(rapid.SliceOfN(genAddr(true), 0, 3).Draw(t, "v4"),
				rapid.SliceOfN(genAddr(false), 0, 3).Draw(t, "v6")...),
			Port:    rapid.Uint16().Draw(t, "port"),
			DoHPath: rapid.SampledFrom([]string{"", "/", "/dns-query{?dns}"}).Draw(t, "dohpath"),
		}
		if rapid.Bool().Draw(t, "encrypted") {
			n.AuthName = genDomain.Draw(t, "name")
			n.ALPN = rapid.SliceOfN(rapid.StringN(1, 10, 255), 0, 3).Draw(t, "alpn")
			n.NoDefaultALPN = rapid.Bool().Draw(t, "no-default-alpn")
		}
		keys := rapid.SliceOfNDistinct(rapid.SampledFrom([]uint16{5, 8, 9, 65535}), 0, 3,
			rapid.ID).Draw(t, "keys")
		slices.Sort(keys)
		for _, key := range keys {
			n.Params = append(n.Params,
				SvcParam{key, rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value")})
		}
		return n
	})

	genDNS = rapid.Custom(func(t *rapid.T) DNSConfiguration {
		return DNSConfiguration{
			Nameservers: rapid.SliceOfN(genNameserver, 1, 3).Draw(t, "nameservers"),
			InternalDomains: rapid.SliceOfN(rapid.OneOf(rapid.Just(""), genDomain), 0, 3).Draw(t,
				"internal"),
			SearchDomains: rapid.SliceOfN(genDomain, 0, 3).Draw(t, "search"),
		}
	})
)
