package proxy

import (
	"math"
	"net/netip"
	"time"

	"github.com/gaissmai/bart"
	"go4.org/netipx"
)

// maxResting is how many leases of one family rest at once; beyond that, the
// oldest are forgotten early.
const maxResting = 4096

// space is what addresses of one family are leased from.
type space struct {
	prefix   netip.Prefix
	delegate int // length of the largest block that is leased, in bits; 0: single addresses only
}

// family is the state of one space. It is the pool's, which locks it.
type family struct {
	space
	gateway netip.Addr // the proxy's own
	last    netip.Addr // last address of the space
	leased  bart.Lite
	next    netip.Addr        // where the search for a single address goes on
	resting bart.Table[*rest] // prefixes in quarantine, disjoint
	queue   []*rest           // oldest first
}

// rest is a lease that was given back.
type rest struct {
	lease netip.Prefix
	owner string
	until time.Time
	// of lease, what rests for it, and some that another lease was given back
	// for since
	parts []netip.Prefix
}

func newFamily(s space) *family {
	gateway := s.prefix.Addr().Next()
	return &family{space: s, gateway: gateway, last: netipx.PrefixLastIP(s.prefix),
		next: gateway.Next()}
}

// grants returns the length of prefix that a client gets who wants one of the
// given length.
func (f *family) grants(bits int) int {
	full := f.prefix.Addr().BitLen()
	if f.delegate == 0 || bits >= full {
		return full
	}
	return max(bits, f.delegate)
}

// free reports whether x may be leased, whether it rests or not: it is in the
// space, without the addresses of the network, the proxy and, in IPv4,
// broadcast, and overlaps no lease.
func (f *family) free(x netip.Prefix) bool {
	return x.Bits() > f.prefix.Bits() && f.prefix.Contains(x.Addr()) &&
		!x.Contains(f.prefix.Addr()) && !x.Contains(f.gateway) &&
		!(x.Addr().Is4() && x.Contains(f.last)) &&
		!f.leased.OverlapsPrefix(x)
}

// restsForOthers reports whether a part of x was given back a while ago by
// somebody else than owner.
func (f *family) restsForOthers(x netip.Prefix, owner string) bool {
	if !f.resting.OverlapsPrefix(x) {
		return false
	}
	if _, r, ok := f.resting.LookupPrefixLPM(x); ok && !r.of(owner) {
		return true
	}
	for _, r := range f.resting.Subnets(x) {
		if !r.of(owner) {
			return true
		}
	}
	return false
}

func (r *rest) of(owner string) bool { return owner != "" && r.owner == owner }

// use returns how many addresses are leased and how many are left, those that
// rest or are reserved for a user included.
func (f *family) use() PoolUse {
	size := func(p netip.Prefix) float64 { return math.Ldexp(1, p.Addr().BitLen()-p.Bits()) }
	// without those of the network and the proxy
	u := PoolUse{Family: "ipv6", Free: size(f.prefix) - 2}
	if f.prefix.Addr().Is4() {
		u.Family, u.Free = "ipv4", u.Free-1 // and that of broadcast
	}
	for p := range f.leased.All() {
		u.Leased += size(p)
	}
	u.Free -= u.Leased
	return u
}

// rest lets x rest until then, which owner gave back. It is what counts of x
// from now on.
func (f *family) rest(x netip.Prefix, owner string, until time.Time) {
	if len(f.queue) == maxResting {
		f.forgetOldest()
	}
	if around, r, ok := f.resting.LookupPrefixLPM(x); ok {
		f.resting.Delete(around)
		var b netipx.IPSetBuilder
		b.AddPrefix(around)
		b.RemovePrefix(x)
		left, _ := b.IPSet() // the prefixes are valid
		f.keep(r, left.Prefixes()...)
	}
	var within []netip.Prefix
	for p := range f.resting.Subnets(x) {
		within = append(within, p)
	}
	for _, p := range within {
		f.resting.Delete(p)
	}
	r := &rest{lease: x, owner: owner, until: until}
	f.keep(r, x)
	f.queue = append(f.queue, r)
}

// keep notes that parts rest because of r.
func (f *family) keep(r *rest, parts ...netip.Prefix) {
	for _, p := range parts {
		f.resting.Insert(p, r)
	}
	r.parts = append(r.parts, parts...)
}

// forget ends the rest of what has rested long enough.
func (f *family) forget(now time.Time) {
	for len(f.queue) > 0 && !now.Before(f.queue[0].until) {
		f.forgetOldest()
	}
}

func (f *family) forgetOldest() {
	r := f.queue[0]
	f.queue = f.queue[1:]
	for _, p := range r.parts {
		if latest, _ := f.resting.Get(p); latest == r {
			f.resting.Delete(p)
		}
	}
}

// lastOf returns what owner gave back last, of those prefixes of the given
// length that are ok.
func (f *family) lastOf(owner string, bits int, ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	for i := len(f.queue) - 1; i >= 0; i-- {
		if r := f.queue[i]; r.of(owner) && r.lease.Bits() == bits && ok(r.lease) {
			return r.lease, true
		}
	}
	return netip.Prefix{}, false
}

// search returns a prefix of the given length that is ok. It skips leases as a
// whole, and what rests for the reasons that skip is about, so that it is quick
// in a large space too.
func (f *family) search(bits int, skip func(*rest) bool,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	// covering returns the largest prefix around x that is not worth a look, or
	// x.
	covering := func(x netip.Prefix) netip.Prefix {
		if lease, ok := f.leased.LookupPrefixLPM(x); ok {
			return lease
		}
		if resting, r, ok := f.resting.LookupPrefixLPM(x); ok && skip(r) {
			return resting
		}
		return x
	}
	if bits < f.last.BitLen() {
		return f.searchDown(bits, covering, ok)
	}
	return f.searchUp(covering, ok)
}

// searchUp looks for a single address. In a space of single addresses each
// search goes on after the last one, so that an address is used again as late
// as possible. Where blocks are leased as well, single addresses stay together
// at the bottom.
func (f *family) searchUp(covering func(netip.Prefix) netip.Prefix,
	ok func(netip.Prefix) bool) (netip.Prefix, bool) {
	first := f.gateway.Next()
	start := f.next
	if f.delegate > 0 || !f.prefix.Contains(start) {
		start = first
	}
	for a, again := start, false; !again || a.Less(start); {
		x := netip.PrefixFrom(a, a.BitLen())
		if ok(x) {
			f.next = a.Next()
			return x, true
		}
		if a = netipx.PrefixLastIP(covering(x)).Next(); f.prefix.Contains(a) {
			continue
		}
		if again {
			break
		}
		a, again = first, true
	}
	return netip.Prefix{}, false
}

// searchDown looks for a block, from the top of the space.
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
