package addrpool

import (
	"math"
	"net/netip"
	"time"

	"github.com/gaissmai/bart"
	"go4.org/netipx"
)

// maxQuarantined is the number of leases of one family in quarantine. If there
// are more, the oldest leave it early.
const maxQuarantined = 4096

// family is the state of one space. Pool.mu guards its variable fields.
type family struct {
	prefix   netip.Prefix
	delegate int        // as in Space
	gateway  netip.Addr // the proxy's own address
	last     netip.Addr // last address of prefix

	leased bart.Lite
	next   netip.Addr // where the next search for a single address starts

	// quarantined maps disjoint prefixes to the quarantine they belong to.
	quarantined bart.Table[*quarantine]

	queue []*quarantine // oldest first
}

// quarantine is a released lease that is held back from other owners.
type quarantine struct {
	lease netip.Prefix
	owner string
	until time.Time

	// parts are the prefixes of lease in family.quarantined, and former ones
	// that belong to a later quarantine by now.
	parts []netip.Prefix
}

// releasedBy reports whether owner released the lease. It is false for "".
func (q *quarantine) releasedBy(owner string) bool { return owner != "" && q.owner == owner }

func newFamily(s Space) *family {
	gateway := s.Prefix.Addr().Next()
	return &family{prefix: s.Prefix, delegate: s.Delegate, gateway: gateway,
		last: netipx.PrefixLastIP(s.Prefix), next: gateway.Next()}
}

// grants returns the prefix length that a request for the given length gets.
func (f *family) grants(bits int) int {
	single := f.prefix.Addr().BitLen()
	if f.delegate == 0 || bits >= single {
		return single
	}
	return max(bits, f.delegate)
}

// free reports whether x overlaps no lease and no special address: the first
// address of the space, the gateway and the IPv4 broadcast address. It ignores
// quarantine.
func (f *family) free(x netip.Prefix) bool {
	return x.Bits() > f.prefix.Bits() && f.prefix.Contains(x.Addr()) &&
		!x.Contains(f.prefix.Addr()) && !x.Contains(f.gateway) &&
		!(x.Addr().Is4() && x.Contains(f.last)) &&
		!f.leased.OverlapsPrefix(x)
}

// use returns the number of leased and free addresses. Addresses in quarantine
// and reserved addresses count as free.
func (f *family) use() Use {
	size := func(p netip.Prefix) float64 { return math.Ldexp(1, p.Addr().BitLen()-p.Bits()) }
	u := Use{Family: "ipv6", Free: size(f.prefix) - 2} // the first address and the gateway
	if f.prefix.Addr().Is4() {
		u.Family, u.Free = "ipv4", u.Free-1 // the broadcast address
	}
	for p := range f.leased.All() {
		u.Leased += size(p)
	}
	u.Free -= u.Leased
	return u
}

// heldBack reports whether a part of x is in quarantine and was released
// by another owner.
func (f *family) heldBack(x netip.Prefix, owner string) bool {
	if !f.quarantined.OverlapsPrefix(x) {
		return false
	}
	if _, q, ok := f.quarantined.LookupPrefixLPM(x); ok && !q.releasedBy(owner) {
		return true
	}
	for _, q := range f.quarantined.Subnets(x) {
		if !q.releasedBy(owner) {
			return true
		}
	}
	return false
}

// quarantine holds prefix x, released by owner, back from others until the
// given time. It replaces earlier quarantines of parts of x.
func (f *family) quarantine(x netip.Prefix, owner string, until time.Time) {
	if len(f.queue) == maxQuarantined {
		f.endOldestQuarantine()
	}
	if around, q, ok := f.quarantined.LookupPrefixLPM(x); ok {
		f.quarantined.Delete(around)
		var b netipx.IPSetBuilder
		b.AddPrefix(around)
		b.RemovePrefix(x)
		others, _ := b.IPSet() // the prefixes are valid
		f.insertQuarantined(q, others.Prefixes()...)
	}
	var within []netip.Prefix
	for p := range f.quarantined.Subnets(x) {
		within = append(within, p)
	}
	for _, p := range within {
		f.quarantined.Delete(p)
	}
	q := &quarantine{lease: x, owner: owner, until: until}
	f.insertQuarantined(q, x)
	f.queue = append(f.queue, q)
}

// insertQuarantined assigns parts to the quarantine q.
func (f *family) insertQuarantined(q *quarantine, parts ...netip.Prefix) {
	for _, p := range parts {
		f.quarantined.Insert(p, q)
	}
	q.parts = append(q.parts, parts...)
}

// endQuarantines ends the quarantines whose time has passed.
func (f *family) endQuarantines(now time.Time) {
	for len(f.queue) > 0 && !now.Before(f.queue[0].until) {
		f.endOldestQuarantine()
	}
}

func (f *family) endOldestQuarantine() {
	q := f.queue[0]
	f.queue = f.queue[1:]
	for _, p := range q.parts {
		if latest, _ := f.quarantined.Get(p); latest == q {
			f.quarantined.Delete(p)
		}
	}
}

// lastReleased returns the last lease that owner released, has the given length
// and satisfies ok.
func (f *family) lastReleased(owner string, bits int,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	for i := len(f.queue) - 1; i >= 0; i-- {
		if q := f.queue[i]; q.releasedBy(owner) && q.lease.Bits() == bits && ok(q.lease) {
			return q.lease, true
		}
	}
	return netip.Prefix{}, false
}

// search returns a prefix of the given length that satisfies ok. It skips each
// lease, and each quarantined prefix for which skip returns true, in one step,
// so that it is fast in a large space too.
func (f *family) search(bits int, skip func(*quarantine) bool,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	// covering returns the prefix to skip if x does not satisfy ok: x itself or
	// a larger one that contains it.
	covering := func(x netip.Prefix) netip.Prefix {
		if lease, ok := f.leased.LookupPrefixLPM(x); ok {
			return lease
		}
		if quarantined, q, ok := f.quarantined.LookupPrefixLPM(x); ok && skip(q) {
			return quarantined
		}
		return x
	}
	if bits < f.last.BitLen() {
		return f.searchDown(bits, covering, ok)
	}
	return f.searchUp(covering, ok)
}

// searchUp searches for a single address. If the space has single addresses
// only, each search starts behind the previous one, so that an address is used
// again as late as possible. Otherwise single addresses stay together at the
// bottom of the space, away from blocks.
func (f *family) searchUp(covering func(netip.Prefix) netip.Prefix,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	first := f.gateway.Next()
	start := f.next
	if f.delegate > 0 || !f.prefix.Contains(start) {
		start = first
	}
	for a, wrapped := start, false; !wrapped || a.Less(start); {
		x := netip.PrefixFrom(a, a.BitLen())
		if ok(x) {
			f.next = a.Next()
			return x, true
		}
		if a = netipx.PrefixLastIP(covering(x)).Next(); f.prefix.Contains(a) {
			continue
		}
		if wrapped {
			break
		}
		a, wrapped = first, true
	}
	return netip.Prefix{}, false
}

// searchDown searches for a block, from the top of the space.
func (f *family) searchDown(bits int, covering func(netip.Prefix) netip.Prefix,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	for a := f.last; f.prefix.Contains(a); {
		x := netip.PrefixFrom(a, bits).Masked()
		if ok(x) {
			return x, true
		}
		a = covering(x).Addr().Prev()
	}
	return netip.Prefix{}, false
}
