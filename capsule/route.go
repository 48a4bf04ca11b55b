package capsule

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// Route is an IP Address Range (RFC 9484 section 4.7.3).
type Route struct {
	// Start and End are the first and the last address of the range. They have
	// the same IP version and no zone.
	Start, End netip.Addr

	// Protocol is the IP protocol that may be sent to the range. 0 means all.
	Protocol uint8
}

// MaxRouteLen is the length in bytes of the longest Route in a capsule, an IPv6
// range.
const MaxRouteLen = 1 + 16 + 16 + 1

// overlaps reports whether any address is in both ranges.
func (r Route) overlaps(o Route) bool {
	return r.Start.BitLen() == o.Start.BitLen() && !r.End.Less(o.Start) && !o.End.Less(r.Start)
}

// RouteAdvertisement tells the peer the full list of ranges it may send to.
// Each capsule replaces the previous one; an empty list withdraws all routes.
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

// Validate checks that each range is valid, that ranges are sorted by IP
// version, protocol and start address, and that no range overlaps another with
// the same protocol or with protocol 0.
func (c *RouteAdvertisement) Validate() error {
	const t = TypeRouteAdvertisement
	for i, r := range c.Routes {
		switch {
		case !r.Start.IsValid() || r.Start.Zone() != "":
			return errorf(t, i, fieldStart, "it is not an address, or has a zone")
		case !r.End.IsValid() || r.End.Zone() != "":
			return errorf(t, i, fieldEnd, "it is not an address, or has a zone")
		case r.Start.BitLen() != r.End.BitLen():
			return errorf(t, i, fieldEnd, "%s and %s have different IP versions", r.End, r.Start)
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

// validateAfter checks that r, the entry with index i, may directly follow
// prev.
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
		return errorf(t, i, fieldStart, "%s is not above %s, the end of the previous range",
			r.Start, prev.End)
	}
	return nil
}

// validateAllProtocols checks that no range for one protocol overlaps a range
// for all protocols. The routes are sorted by IP version, protocol and start.
func validateAllProtocols(routes []Route) error {
	var all []Route // routes with protocol 0, sorted by address
	for _, r := range routes {
		if r.Protocol == 0 {
			all = append(all, r)
		}
	}
	for i, r := range routes {
		if r.Protocol == 0 {
			continue
		}
		// all[j] is the first range that does not end before r starts.
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

// decodeRoutes decodes the value of a ROUTE_ADVERTISEMENT. It checks only the
// form that it needs to build the entries; Validate checks the rest.
func decodeRoutes(value []byte) ([]Route, error) {
	var routes []Route
	d := decoder{typ: TypeRouteAdvertisement, b: value}
	for ; len(d.b) > 0; d.entry++ {
		n := d.version()
		r := Route{Start: d.address(fieldStart, n), End: d.address(fieldEnd, n),
			Protocol: d.uint8(fieldProtocol)}
		if d.err != nil {
			return nil, d.err
		}
		routes = append(routes, r)
	}
	return routes, nil
}

// Routes returns the addresses of prefixes as ranges for one protocol, sorted
// and merged as a [RouteAdvertisement] requires. Protocol 0 means all
// protocols. Prefixes may overlap, be in any order and have host bits; Routes
// ignores invalid prefixes.
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
