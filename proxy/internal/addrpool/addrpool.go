// Package addrpool leases tunnel addresses to clients.
//
// A [Pool] has one [Space] of addresses per IP family. It leases single
// addresses and, if a space allows it, aligned blocks (prefix delegation). No
// two leases overlap. The first address of a space is the proxy's own, its
// gateway.
//
// # Quarantine
//
// A released lease stays in quarantine for a while. The last owner gets it back
// at once. Others get it only if nothing else is free, because the last owner
// may return, and packets to and from it may still be in transit.
//
// # Reservations
//
// Single addresses may be reserved for a user. Nobody else is leased such an
// address, alone or in a block. The pool does not store reservations: the
// caller supplies them with each lease and answers [Config.Reserved].
package addrpool

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Reasons why Lease fails.
var (
	ErrExhausted = errors.New("the address pool is exhausted")
	ErrNoFamily  = errors.New("the pool has no addresses of this family")
)

// Space is the part of a pool for one IP family.
type Space struct {
	// Prefix contains the addresses. An invalid prefix means that the pool does
	// not serve the family.
	Prefix netip.Prefix

	// Delegate is the prefix length in bits of the largest block. 0 means that
	// only single addresses are leased.
	Delegate int
}

// Config describes a pool.
type Config struct {
	Spaces []Space // one per family

	// Quarantine is the time for which a released lease is held back from
	// others.
	Quarantine time.Duration

	// Reserved reports whether p contains an address that is reserved for
	// anybody but user. nil means that there are no reservations.
	Reserved func(p netip.Prefix, user string) bool
}

// Holder says on whose behalf addresses are leased.
type Holder struct {
	// Owner identifies the holder across leases: a released lease in quarantine
	// is free for the owner that released it. "" matches no other holder.
	Owner string

	User     string       // for Config.Reserved
	Reserved []netip.Addr // addresses reserved for User, in the order of preference
}

// Pool leases addresses. Make it with New. Its methods may be called
// concurrently.
type Pool struct {
	reserved   func(p netip.Prefix, user string) bool
	quarantine time.Duration
	now        func() time.Time

	mu       sync.Mutex // guards the state of families
	families []*family
}

// New makes a pool without leases.
func New(cfg Config) *Pool {
	p := &Pool{reserved: cfg.Reserved, quarantine: cfg.Quarantine, now: time.Now}
	if p.reserved == nil {
		p.reserved = func(netip.Prefix, string) bool { return false }
	}
	for _, s := range cfg.Spaces {
		if s.Prefix.IsValid() {
			p.families = append(p.families, newFamily(s))
		}
	}
	return p
}

// Gateway returns the proxy's own address in the family of a. It is invalid if
// the pool does not serve the family.
func (p *Pool) Gateway(a netip.Addr) netip.Addr {
	if f := p.family(a); f != nil {
		return f.gateway
	}
	return netip.Addr{}
}

// Gateways returns the proxy's own addresses.
func (p *Pool) Gateways() []netip.Addr {
	var addrs []netip.Addr
	for _, f := range p.families {
		addrs = append(addrs, f.gateway)
	}
	return addrs
}

// GatewayPrefixes returns the proxy's own addresses with the prefix lengths of
// their spaces.
func (p *Pool) GatewayPrefixes() []netip.Prefix {
	var prefixes []netip.Prefix
	for _, f := range p.families {
		prefixes = append(prefixes, netip.PrefixFrom(f.gateway, f.prefix.Bits()))
	}
	return prefixes
}

// Prefixes returns the prefixes of the spaces.
func (p *Pool) Prefixes() []netip.Prefix {
	var prefixes []netip.Prefix
	for _, f := range p.families {
		prefixes = append(prefixes, f.prefix)
	}
	return prefixes
}

// Contains reports whether a is an address for clients, leased or not.
func (p *Pool) Contains(a netip.Addr) bool {
	f := p.family(a)
	return f != nil && f.prefix.Contains(a) && a != f.gateway
}

// Serves reports whether the pool has addresses in the family of a.
func (p *Pool) Serves(a netip.Addr) bool { return p.family(a) != nil }

// AnySingle reports whether any single address satisfies a request for want.
func (p *Pool) AnySingle(want netip.Prefix) bool {
	f := p.family(want.Addr())
	return f != nil && want.Addr().IsUnspecified() && f.grants(want.Bits()) == want.Addr().BitLen()
}

func (p *Pool) family(a netip.Addr) *family {
	for _, f := range p.families {
		if f.prefix.Addr().Is4() == a.Is4() {
			return f
		}
	}
	return nil
}

// Lease leases want to h, or a substitute if it is not free. An unspecified
// address means any address. If the space delegates blocks and one is free, a
// prefix gets a block of its length or of the shortest permitted length.
// Otherwise it gets a single address, its first one if possible.
func (p *Pool) Lease(h Holder, want netip.Prefix) (netip.Prefix, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.family(want.Addr())
	if f == nil {
		return netip.Prefix{}, ErrNoFamily
	}
	f.endQuarantines(p.now())
	single := want.Addr().BitLen()
	for _, bits := range slices.Compact([]int{f.grants(want.Bits()), single}) {
		if got, ok := p.find(f, h, want.Addr(), bits); ok {
			f.leased.Insert(got)
			return got, nil
		}
	}
	return netip.Prefix{}, ErrExhausted
}

// find returns a prefix of f that may be leased to h. In the order of
// preference: the wanted one, an address reserved for the user, the last one
// that the owner released, any other, and at last one in quarantine for another
// owner. p.mu is held.
func (p *Pool) find(f *family, h Holder, want netip.Addr, bits int) (netip.Prefix, bool) {
	free := func(x netip.Prefix) bool { return f.free(x) && !p.reserved(x, h.User) }
	available := func(x netip.Prefix) bool { return free(x) && !f.heldBack(x, h.Owner) }
	if x, err := want.Prefix(bits); err == nil && available(x) {
		return x, true
	}
	if bits == want.BitLen() {
		if x, ok := firstReserved(h, want, available, free); ok {
			return x, true
		}
	}
	if x, ok := f.lastReleased(h.Owner, bits, available); ok {
		return x, true
	}
	othersQuarantine := func(q *quarantine) bool { return !q.releasedBy(h.Owner) }
	if x, ok := f.search(bits, othersQuarantine, available); ok {
		return x, true
	}
	return f.search(bits, func(*quarantine) bool { return false }, free)
}

// firstReserved returns the first address that is reserved for h, is in the
// family of a and satisfies available, or else free. An address in quarantine
// is good enough: only another device of the same user can have released it.
func firstReserved(h Holder, a netip.Addr, available,
	free func(netip.Prefix) bool) (netip.Prefix, bool) {
	for _, ok := range []func(netip.Prefix) bool{available, free} {
		for _, r := range h.Reserved {
			if x := netip.PrefixFrom(r, r.BitLen()); r.Is4() == a.Is4() && ok(x) {
				return x, true
			}
		}
	}
	return netip.Prefix{}, false
}

// LeaseReserved leases one address of each family that is reserved for h and
// not leased.
func (p *Pool) LeaseReserved(h Holder) (leases []netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.families {
		f.endQuarantines(p.now())
		available := func(x netip.Prefix) bool { return f.free(x) && !f.heldBack(x, h.Owner) }
		if x, ok := firstReserved(h, f.gateway, available, f.free); ok {
			f.leased.Insert(x)
			leases = append(leases, x)
		}
	}
	return leases
}

// Release ends a lease of owner and puts it into quarantine.
func (p *Pool) Release(lease netip.Prefix, owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.family(lease.Addr()); f != nil {
		f.leased.Delete(lease)
		f.quarantine(lease, owner, p.now().Add(p.quarantine))
	}
}

// Use is the number of leased and free addresses of one family. The numbers may
// exceed the range of integers.
type Use struct {
	Family       string // "ipv4" or "ipv6"
	Leased, Free float64
}

// Use returns the use of each family.
func (p *Pool) Use() []Use {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Use
	for _, f := range p.families {
		list = append(list, f.use())
	}
	return list
}

// Leased returns the number of leases of each family.
func (p *Pool) Leased() (v4, v6 int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.families {
		v4 += f.leased.Size4()
		v6 += f.leased.Size6()
	}
	return v4, v6
}
