package proxy

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"
)

var (
	errPoolExhausted = errors.New("the address pool is exhausted")
	errNoFamily      = errors.New("the pool has no addresses of this family")
)

// pool leases addresses, one by one or, where that is allowed, in aligned
// blocks (prefix delegation). No two leases overlap. What is given back rests
// for a while: until then it is its last owner's again at once, and somebody
// else's only when nothing else is free, because the last owner may come back,
// and packets to and from it may still be under way.
type pool struct {
	// an address of p is for somebody else than user
	reserved func(p netip.Prefix, user string) bool
	hold     time.Duration // for which what is given back rests
	now      func() time.Time

	mu       sync.Mutex
	families []*family
}

// newPool makes a pool of spaces; those without a valid prefix are left out.
// reserved reports whether an address of a prefix is reserved for somebody else
// than a user.
func newPool(reserved func(p netip.Prefix, user string) bool, spaces ...space) *pool {
	p := &pool{reserved: reserved, hold: DefaultHold, now: time.Now}
	for _, s := range spaces {
		if s.prefix.IsValid() {
			p.families = append(p.families, newFamily(s))
		}
	}
	return p
}

// gateways returns the proxy's own addresses with the prefix lengths of their
// pools.
func (p *pool) gateways() []netip.Prefix {
	var g []netip.Prefix
	for _, f := range p.families {
		g = append(g, netip.PrefixFrom(f.gateway, f.prefix.Bits()))
	}
	return g
}

// gatewayAddrs returns the proxy's own addresses.
func (p *pool) gatewayAddrs() []netip.Addr {
	var g []netip.Addr
	for _, f := range p.families {
		g = append(g, f.gateway)
	}
	return g
}

// prefixes returns the prefixes that addresses are leased from.
func (p *pool) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, f := range p.families {
		out = append(out, f.prefix)
	}
	return out
}

// contains reports whether a is in the pool, leased or not, and not the proxy's
// own.
func (p *pool) contains(a netip.Addr) bool {
	f := p.family(a)
	return f != nil && f.prefix.Contains(a) && a != f.gateway
}

// serves reports whether the pool has addresses of a's family.
func (p *pool) serves(a netip.Addr) bool { return p.family(a) != nil }

func (p *pool) family(a netip.Addr) *family {
	for _, f := range p.families {
		if f.prefix.Addr().Is4() == a.Is4() {
			return f
		}
	}
	return nil
}

// lease takes what user wants. An unspecified address means any. A prefix is
// granted as a block of the wanted length, or of the shortest that is allowed,
// where blocks are delegated and one is free; otherwise it is a wish for its
// first address. What is not free is replaced by something that is. owner tells
// whose the lease is once it is given back, "" for nobody's.
func (p *pool) lease(user User, owner string, want netip.Prefix) (netip.Prefix, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.family(want.Addr())
	if f == nil {
		return netip.Prefix{}, errNoFamily
	}
	f.forget(p.now())
	full := want.Addr().BitLen()
	for _, bits := range slices.Compact([]int{f.grants(want.Bits()), full}) {
		if got, ok := p.leaseBits(f, user, owner, want.Addr(), bits); ok {
			f.leased.Insert(got)
			return got, nil
		}
	}
	return netip.Prefix{}, errPoolExhausted
}

// leaseBits finds a free prefix of f with the given length: the wanted one if
// it may be, or else one that is reserved for the user, the owner's last one,
// any, and only then one that rests for somebody else.
func (p *pool) leaseBits(f *family, user User, owner string, want netip.Addr,
	bits int) (netip.Prefix, bool) {
	free := func(x netip.Prefix) bool { return f.free(x) && !p.reserved(x, user.Name) }
	rested := func(x netip.Prefix) bool { return free(x) && !f.restsForOthers(x, owner) }
	if x, err := want.Prefix(bits); err == nil && rested(x) {
		return x, true
	}
	if bits == want.BitLen() {
		if x, ok := firstReserved(user, want, rested, free); ok {
			return x, true
		}
	}
	if x, ok := f.lastOf(owner, bits, rested); ok {
		return x, true
	}
	if x, ok := f.search(bits, func(r *rest) bool { return !r.of(owner) }, rested); ok {
		return x, true
	}
	return f.search(bits, func(*rest) bool { return false }, free)
}

// firstReserved returns the first address that is reserved for user, of the
// family of a, and free. Those that rested come first: what is reserved for the
// user, only another device of the user's can have had.
func firstReserved(user User, a netip.Addr, rested,
	free func(netip.Prefix) bool) (netip.Prefix, bool) {
	for _, ok := range []func(netip.Prefix) bool{rested, free} {
		for _, r := range user.Addresses {
			if x := netip.PrefixFrom(r, r.BitLen()); r.Is4() == a.Is4() && ok(x) {
				return x, true
			}
		}
	}
	return netip.Prefix{}, false
}

// leaseReserved takes an address of each family that is reserved for user,
// where there is one that nobody has.
func (p *pool) leaseReserved(user User, owner string) (leases []netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.families {
		f.forget(p.now())
		rested := func(x netip.Prefix) bool { return f.free(x) && !f.restsForOthers(x, owner) }
		if x, ok := firstReserved(user, f.gateway, rested, f.free); ok {
			f.leased.Insert(x)
			leases = append(leases, x)
		}
	}
	return leases
}

// anySingle reports whether want is granted by any one address.
func (p *pool) anySingle(want netip.Prefix) bool {
	f := p.family(want.Addr())
	return f != nil && want.Addr().IsUnspecified() && f.grants(want.Bits()) == want.Addr().BitLen()
}

// release gives back what owner leased.
func (p *pool) release(lease netip.Prefix, owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.family(lease.Addr()); f != nil {
		f.leased.Delete(lease)
		f.rest(lease, owner, p.now().Add(p.hold))
	}
}

// use returns how the addresses of each family are used.
func (p *pool) use() []PoolUse {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []PoolUse
	for _, f := range p.families {
		out = append(out, f.use())
	}
	return out
}

// leased returns the number of leases of each family.
func (p *pool) leased() (v4, v6 int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.families {
		v4 += f.leased.Size4()
		v6 += f.leased.Size6()
	}
	return v4, v6
}
