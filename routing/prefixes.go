package routing

import (
	"net/netip"

	"go4.org/netipx"
)

// Prefixes returns the fewest prefixes that cover exactly the addresses from
// start to end, both included, in ascending order. It returns nil unless both
// are of the same family, without zone, and start is not after end. An IP
// address range of a ROUTE_ADVERTISEMENT (RFC 9484, section 4.7.3) becomes the
// Routes of a State in this way.
func Prefixes(start, end netip.Addr) []netip.Prefix {
	if start.Zone() != "" || end.Zone() != "" {
		return nil
	}
	return netipx.IPRangeFrom(start, end).Prefixes()
}
