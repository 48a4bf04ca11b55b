package routing

import (
	"net/netip"

	"go4.org/netipx"
)

// Prefixes returns the fewest prefixes that cover exactly the addresses from
// start to end, both included, in ascending order. It returns nil if start and
// end have different families or a zone, or if start is after end. It converts
// an IP address range of a ROUTE_ADVERTISEMENT (RFC 9484 section 4.7.3) to
// Routes of a State.
func Prefixes(start, end netip.Addr) []netip.Prefix {
	if start.Zone() != "" || end.Zone() != "" {
		return nil
	}
	return netipx.IPRangeFrom(start, end).Prefixes()
}
