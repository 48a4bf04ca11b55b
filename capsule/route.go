package capsule

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// Route is an IP Address Range (RFC 9484 section 4.7.3).
type Route struct {
	Start, End netip.Addr // both included, of one IP version, without zone
	Protocol   uint8      // the IP protocol the route is for; 0: all of them
}

// MaxRouteLen is the length of an IPv6 range in a capsule, in bytes. One of IPv4
// is shorter.
const MaxRouteLen = 1 + 16 + 16 + 1

// overlaps reports whether an address is in both ranges.
func (r Route) overlaps(o Route) bool {
	return r.Start.BitLen() == o.Start.BitLen() && !r.End.Less(o.Start) && !o.End.Less(r.Start)
}

// RouteAdvertisement tells the peer the full list of ranges it may send to. Each
// one replaces the one before; an empty one takes all routes away.
type RouteAdvertisement struct {
	Routes []Route
}

// Type returns [TypeRouteAdvertisement].
func (*RouteAdvertisement) Type() Type { return TypeRouteAdvertisement }

// Append appends the capsule to b.
func (c *RouteAdvertisement) Append(b []byte) []byte {
	n := 0
	for _, r := range c.Routes {
		n += 1 + r.Start.BitLen()/8 + r.End.BitLen()/8 + 1
	}
	b = appendHeader(b, TypeRouteAdvertisement, n)
	for _, r := range c.Routes {
		b = appendVersion(b, r.Start)
		b = append(b, r.Start.AsSlice()...)
		b = append(b, r.End.AsSlice()...)
		b = append(b, r.Protocol)
	}
	return b
}

// Validate checks that each range is one, that ranges are in order of version,
// protocol and address, and that none overlaps another of the same protocol or
// of protocol 0.
func (c *RouteAdvertisement) Validate() error {
	const t = TypeRouteAdvertisement
	for i, r := range c.Routes {
		switch {
		case !r.Start.IsValid() || r.Start.Zone() != "":
			return errorf(t, i, fieldStart, "it is not an address without zone")
		case !r.End.IsValid() || r.End.Zone() != "":
			return errorf(t, i, fieldEnd, "it is not an address without zone")
		case r.Start.BitLen() != r.End.BitLen():
			return errorf(t, i, fieldEnd, "%s is not of the IP version of %s", r.End, r.Start)
		case r.End.Less(r.Start):
			return errorf(t, i, fieldEnd, "%s is before the start, %s", r.End, r.Start)
		}
		if i > 0 {
			if err := r.validateAfter(c.Routes[i-1], i); err != nil {
				return err
			}
		}
	}
	return validateAllProtocols(c.Routes)
}

// validateAfter checks that r, the entry with index i, may follow prev.
func (r Route) validateAfter(prev Route, i int) error {
	const t = TypeRouteAdvertisement
	switch {
	case r.Start.BitLen() < prev.Start.BitLen():
		return errorf(t, i, fieldVersion, "4 after 6")
	case r.Start.BitLen() > prev.Start.BitLen():
		return nil
	case r.Protocol < prev.Protocol:
		return errorf(t, i, fieldProtocol, "%d after %d", r.Protocol, prev.Protocol)
	case r.Protocol == prev.Protocol && !prev.End.Less(r.Start):
		return errorf(t, i, fieldStart, "%s is not above the end of the range before, %s", r.Start, prev.End)
	}
	return nil
}

// validateAllProtocols checks that no range for one protocol overlaps one for
// all protocols. The routes are in order otherwise.
func validateAllProtocols(routes []Route) error {
	var all []Route // those of protocol 0, in order of address
	for _, r := range routes {
		if r.Protocol == 0 {
			all = append(all, r)
		}
	}
	for i, r := range routes {
		if r.Protocol == 0 {
			continue
		}
		// The first range for all protocols that does not end before r.
		j, _ := slices.BinarySearchFunc(all, r.Start, func(a Route, start netip.Addr) int {
			return a.End.Compare(start)
		})
		if j < len(all) && all[j].overlaps(r) {
			return errorf(TypeRouteAdvertisement, i, fieldStart,
				"%s-%s for protocol %d overlaps %s-%s for all protocols",
				r.Start, r.End, r.Protocol, all[j].Start, all[j].End)
		}
	}
	return nil
}

// decodeRoutes decodes the value of a ROUTE_ADVERTISEMENT. It checks no more than
// is needed to build the entries.
func decodeRoutes(value []byte) ([]Route, error) {
	var routes []Route
	d := decoder{typ: TypeRouteAdvertisement, b: value}
	for ; len(d.b) > 0; d.entry++ {
		n := d.version()
		r := Route{Start: d.address(fieldStart, n), End: d.address(fieldEnd, n), Protocol: d.uint8(fieldProtocol)}
		if d.err != nil {
			return nil, d.err
		}
		routes = append(routes, r)
	}
	return routes, nil
}

// Routes returns the ranges of prefixes for one protocol (0: all), sorted and
// merged, as a [RouteAdvertisement] must have them. Prefixes may overlap, be in
// any order and have host bits; those that are not valid are left out.
func Routes(prefixes []netip.Prefix, protocol uint8) []Route {
	var b netipx.IPSetBuilder
	for _, p := range prefixes {
		if p.IsValid() {
			b.AddPrefix(p)
		}
	}
	set, _ := b.IPSet() // the error is for invalid prefixes
	var routes []Route
	for _, r := range set.Ranges() {
		routes = append(routes, Route{Start: r.From(), End: r.To(), Protocol: protocol})
	}
	return routes
}
