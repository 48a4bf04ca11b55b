package capsule

import (
	"encoding/hex"
	"errors"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// compare makes cmp compare addresses by value and treat nil slices as empty.
var compare = cmp.Options{
	cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
	cmpopts.EquateEmpty(),
}

func route(start, end string, protocol uint8) Route {
	return Route{Start: netip.MustParseAddr(start), End: netip.MustParseAddr(end),
		Protocol: protocol}
}

func address(id uint64, prefix string) Address {
	return Address{RequestID: id, Prefix: netip.MustParsePrefix(prefix)}
}

func TestEncoding(t *testing.T) {
	for _, tt := range []struct {
		name    string
		capsule Capsule
		hex     string
	}{
		{"no addresses", &AddressAssign{}, "0100"},
		{"both families", &AddressAssign{[]Address{address(1, "192.0.2.1/32"),
			address(2, "2001:db8::1/128")}},
			"011a0104c000020120020620010db800000000000000000000000180"},
		{"IPv4-mapped", &AddressAssign{[]Address{address(0, "::ffff:192.0.2.0/120")}},
			"0113000600000000000000000000ffffc000020078"},
		{"long request ID", &AddressRequest{[]Address{address(1<<62-1, "0.0.0.0/32")}},
			"020effffffffffffffff040000000020"},
		{"any address of both families",
			&AddressRequest{[]Address{address(64, "0.0.0.0/24"), address(2, "::/56")}},
			"021b4040040000000018" + "02060000000000000000000000000000000038"},
		{"no routes", &RouteAdvertisement{}, "0300"},
		{"default routes", &RouteAdvertisement{[]Route{route("0.0.0.0", "255.255.255.255", 0),
			route("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 0)}},
			"032c0400000000ffffffff000600000000000000000000000000000000ffffffffffffffffffffffffffffffff00"},
		{"protocols", &RouteAdvertisement{[]Route{route("192.0.2.0", "192.0.2.255", 6),
			route("192.0.2.0", "192.0.2.255", 17)}},
			"031404c0000200c00002ff0604c0000200c00002ff11"},
		{"empty datagram", &Datagram{}, "0000"},
		{"datagram", &Datagram{Payload: []byte{0, 0x45}}, "00020045"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.capsule.Validate(); err != nil {
				t.Fatal(err)
			}
			b := tt.capsule.Append([]byte("before"))
			encoded, ok := strings.CutPrefix(string(b), "before")
			if !ok {
				t.Fatalf("Append changed the bytes already in the slice: %q", b)
			}
			if got := hex.EncodeToString([]byte(encoded)); got != tt.hex {
				t.Fatalf("encoded %s, want %s", got, tt.hex)
			}
			got, err := NewReader(strings.NewReader(encoded), len(encoded)).Next()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.capsule, got, compare); diff != "" {
				t.Errorf("decoded (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	valid := address(1, "192.0.2.0/24")
	zoned := route("fe80::1", "fe80::1", 0)
	zoned.End = zoned.End.WithZone("eth0")
	for _, tt := range []struct {
		name    string
		capsule Capsule
		want    Error // Reason is not compared
	}{
		{"no prefix", &AddressAssign{[]Address{valid, {}}},
			Error{TypeAddressAssign, 1, fieldAddress, ""}},
		{"host bits", &AddressAssign{[]Address{address(0, "192.0.2.1/24")}},
			Error{TypeAddressAssign, 0, fieldAddress, ""}},
		{"host bits v6", &AddressRequest{[]Address{address(3, "::1/127")}},
			Error{TypeAddressRequest, 0, fieldAddress, ""}},
		{"request ID of 63 bits", &AddressAssign{[]Address{address(1<<62, "192.0.2.1/32")}},
			Error{TypeAddressAssign, 0, fieldRequestID, ""}},
		{"no requests", &AddressRequest{}, Error{TypeAddressRequest, -1, "", ""}},
		{"request ID 0", &AddressRequest{[]Address{valid, address(0, "::/128")}},
			Error{TypeAddressRequest, 1, fieldRequestID, ""}},
		{"request ID twice", &AddressRequest{[]Address{valid, address(2, "::/128"), valid}},
			Error{TypeAddressRequest, 2, fieldRequestID, ""}},
		{"no start", &RouteAdvertisement{[]Route{{}}},
			Error{TypeRouteAdvertisement, 0, fieldStart, ""}},
		{"no end", &RouteAdvertisement{[]Route{{Start: netip.IPv6Unspecified()}}},
			Error{TypeRouteAdvertisement, 0, fieldEnd, ""}},
		{"zone", &RouteAdvertisement{[]Route{zoned}},
			Error{TypeRouteAdvertisement, 0, fieldEnd, ""}},
		{"two versions", &RouteAdvertisement{[]Route{route("0.0.0.0", "::1", 0)}},
			Error{TypeRouteAdvertisement, 0, fieldEnd, ""}},
		{"end before start", &RouteAdvertisement{[]Route{route("::2", "::1", 0)}},
			Error{TypeRouteAdvertisement, 0, fieldEnd, ""}},
		{"version order", &RouteAdvertisement{[]Route{route("::", "::1", 0),
			route("0.0.0.0", "0.0.0.1", 0)}}, Error{TypeRouteAdvertisement, 1, fieldVersion, ""}},
		{"protocol order", &RouteAdvertisement{[]Route{route("::", "::1", 6),
			route("::2", "::3", 1)}}, Error{TypeRouteAdvertisement, 1, fieldProtocol, ""}},
		{"address order", &RouteAdvertisement{[]Route{route("::2", "::3", 6),
			route("::", "::1", 6)}}, Error{TypeRouteAdvertisement, 1, fieldStart, ""}},
		{"touching", &RouteAdvertisement{[]Route{route("::", "::1", 6), route("::1", "::2", 6)}},
			Error{TypeRouteAdvertisement, 1, fieldStart, ""}},
		{"all protocols below", &RouteAdvertisement{[]Route{route("::", "::1", 0),
			route("::4", "::6", 0), route("::2", "::4", 6)}},
			Error{TypeRouteAdvertisement, 2, fieldStart, ""}},
		{"all protocols above", &RouteAdvertisement{[]Route{route("::", "::1", 0),
			route("::4", "::6", 0), route("::7", "::7", 6), route("::6", "::8", 17)}},
			Error{TypeRouteAdvertisement, 3, fieldStart, ""}},
		{"all protocols around", &RouteAdvertisement{[]Route{route("::", "::8", 0),
			route("::4", "::6", 255)}}, Error{TypeRouteAdvertisement, 1, fieldStart, ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.capsule.Validate()
			e, ok := errors.AsType[*Error](err)
			if !ok || !errors.Is(err, ErrMalformed) {
				t.Fatalf("got %v, want an *Error that is ErrMalformed", err)
			}
			if diff := cmp.Diff(tt.want, *e, cmpopts.IgnoreFields(Error{}, "Reason")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if e.Reason == "" {
				t.Error("no reason")
			}
		})
	}
}

// TestValidateAccepts has ranges for one protocol in the gaps between ranges
// for all protocols, and numerically equal ranges of both IP versions.
func TestValidateAccepts(t *testing.T) {
	c := &RouteAdvertisement{[]Route{
		route("0.0.0.0", "0.0.0.1", 0), route("0.0.0.4", "0.0.0.5", 0),
		route("0.0.0.2", "0.0.0.3", 6), route("0.0.0.6", "255.255.255.255", 6),
		route("::", "::1", 6), route("::4", "::5", 6), route("::", "::9", 17),
	}}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestErrorText(t *testing.T) {
	err := error(&Error{Type: TypeAddressAssign, Entry: 2, Field: fieldPrefixLength,
		Reason: "33 is more than 32"})
	want := "malformed ADDRESS_ASSIGN capsule, entry 2, IP Prefix Length: 33 is more than 32"
	if got := err.Error(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	err = new(AddressRequest).Validate()
	want = "malformed ADDRESS_REQUEST capsule: it has no entries"
	if got := err.Error(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTypeString(t *testing.T) {
	for typ, want := range map[Type]string{
		TypeDatagram:           "DATAGRAM",
		TypeAddressAssign:      "ADDRESS_ASSIGN",
		TypeAddressRequest:     "ADDRESS_REQUEST",
		TypeRouteAdvertisement: "ROUTE_ADVERTISEMENT",
		TypeDNSAssign:          "DNS_ASSIGN",
		TypePREF64:             "PREF64",
		0x1ace79ed:             "0x1ace79ed",
	} {
		t.Run(want, func(t *testing.T) {
			if got := typ.String(); got != want {
				t.Errorf("Type(%d) is %q, want %q", uint64(typ), got, want)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for prefix, want := range map[string]bool{
		"0.0.0.0/32": true, "::/128": true,
		"0.0.0.0/0": false, "0.0.0.0/31": false, "::/127": false, "192.0.2.1/32": false,
		"::1/128": false,
	} {
		t.Run(prefix, func(t *testing.T) {
			if got := address(1, prefix).Refused(); got != want {
				t.Errorf("Refused() = %v, want %v", got, want)
			}
		})
	}
	if (Address{}).Refused() {
		t.Error("Refused() = true for the zero Address")
	}
}

func TestRoutes(t *testing.T) {
	var prefixes []netip.Prefix
	for _, s := range []string{"2001:db8::/32", "10.1.0.0/16", "10.0.0.1/16", "192.0.2.0/24",
		"192.0.2.128/25", "255.255.255.255/32", "::/128", "192.0.2.0/24"} {
		prefixes = append(prefixes, netip.MustParsePrefix(s))
	}
	want := []Route{
		route("10.0.0.0", "10.1.255.255", 6),
		route("192.0.2.0", "192.0.2.255", 6),
		route("255.255.255.255", "255.255.255.255", 6),
		route("::", "::", 6),
		route("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 6),
	}
	if diff := cmp.Diff(want, Routes(append(prefixes, netip.Prefix{}), 6), compare); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if r := Routes(nil, 0); len(r) != 0 {
		t.Errorf("Routes(nil, 0) = %v, want none", r)
	}
}

// genAddr draws addresses close to each other, so that ranges meet, and close
// to the ends of the address space.
func genAddr(is4 bool) *rapid.Generator[netip.Addr] {
	return rapid.Custom(func(t *rapid.T) netip.Addr {
		b := make([]byte, 16)
		for i := range b[:15] {
			b[i] = rapid.SampledFrom([]byte{0, 0xff}).Draw(t, "high")
		}
		b[15] = rapid.Byte().Draw(t, "low")
		if is4 {
			return netip.AddrFrom4([4]byte(b[12:]))
		}
		return netip.AddrFrom16([16]byte(b))
	})
}

var genPrefix = rapid.Custom(func(t *rapid.T) netip.Prefix {
	addr := genAddr(rapid.Bool().Draw(t, "is4")).Draw(t, "addr")
	return netip.PrefixFrom(addr, rapid.IntRange(0, addr.BitLen()).Draw(t, "bits")).Masked()
})

var genCapsule = rapid.OneOf(
	rapid.Custom(func(t *rapid.T) Capsule {
		c := new(AddressAssign)
		for range rapid.IntRange(0, 8).Draw(t, "n") {
			c.Addresses = append(c.Addresses,
				Address{rapid.Uint64Range(0, math.MaxUint64>>2).Draw(t, "id"),
					genPrefix.Draw(t, "prefix")})
		}
		return c
	}),
	rapid.Custom(func(t *rapid.T) Capsule {
		c := new(AddressRequest)
		for _, id := range rapid.SliceOfNDistinct(rapid.Uint64Range(1, math.MaxUint64>>2), 1, 8,
			rapid.ID).Draw(t, "ids") {
			c.Addresses = append(c.Addresses, Address{id, genPrefix.Draw(t, "prefix")})
		}
		return c
	}),
	rapid.Custom(func(t *rapid.T) Capsule {
		prefixes := rapid.SliceOfN(genPrefix, 0, 8).Draw(t, "prefixes")
		return &RouteAdvertisement{Routes(prefixes, rapid.Uint8().Draw(t, "protocol"))}
	}),
	rapid.Custom(func(t *rapid.T) Capsule {
		return &Datagram{rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "payload")}
	}),
	rapid.Custom(func(t *rapid.T) Capsule {
		return &DNSAssign{rapid.SliceOfN(genDNS, 0, 3).Draw(t, "configurations")}
	}),
	rapid.Custom(func(t *rapid.T) Capsule {
		return &PREF64{rapid.SliceOfN(genNAT64, 0, 8).Draw(t, "prefixes")}
	}),
)

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genCapsule.Draw(t, "capsule")
		if err := want.Validate(); err != nil {
			t.Fatal(err)
		}
		b := want.Append(nil)
		got, err := NewReader(strings.NewReader(string(b)), len(b)).Next()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, compare); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

// TestRoutesProperties checks that Routes covers exactly the addresses of the
// prefixes, in the smallest number of ranges and in a valid order.
func TestRoutesProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefixes := rapid.SliceOf(genPrefix).Draw(t, "prefixes")
		routes := Routes(prefixes, 17)
		if err := (&RouteAdvertisement{routes}).Validate(); err != nil {
			t.Fatal(err)
		}
		for i, r := range routes[min(1, len(routes)):] {
			if prev := routes[i]; prev.End.Next() == r.Start {
				t.Fatalf("%v and %v are not merged", prev, r)
			}
		}
		addr := genAddr(rapid.Bool().Draw(t, "is4")).Draw(t, "addr")
		want := slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
		got := slices.ContainsFunc(routes, func(r Route) bool {
			return r.overlaps(Route{Start: addr, End: addr})
		})
		if got != want {
			t.Fatalf("%s in %v: %v, want %v", addr, routes, got, want)
		}
	})
}

// TestOverlapWithAllProtocols compares the overlaps that Validate finds by
// binary search with the overlaps found by comparing all pairs of ranges.
func TestOverlapWithAllProtocols(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefixes := rapid.SliceOfN(genPrefix, 0, 6)
		all := Routes(prefixes.Draw(t, "all"), 0)
		one := Routes(prefixes.Draw(t, "one"), 6)
		want := false
		for _, a := range all {
			want = want || slices.ContainsFunc(one, a.overlaps)
		}
		routes := append(slices.Clone(all), one...)
		slices.SortStableFunc(routes, func(a, b Route) int {
			return a.Start.BitLen() - b.Start.BitLen()
		})
		if err := (&RouteAdvertisement{routes}).Validate(); (err != nil) != want {
			t.Fatalf("%v: Validate returned %[3]v, want an error: %[2]v", routes, want, err)
		}
	})
}
