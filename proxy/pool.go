package proxy

import (
	"errors"
	"net/netip"
	"sync"
)

var (
	errPoolExhausted = errors.New("the address pool is exhausted")
	errNoFamily      = errors.New("the pool has no addresses of this family")
)

// pool leases single addresses. An address is with one holder at most, and comes back into use as late as possible.
type pool struct {
	holder   func(netip.Addr) string // the user for whom an address is reserved, "" for none
	mu       sync.Mutex
	families []*family
}

// family is the addresses of one family.
type family struct {
	prefix  netip.Prefix
	gateway netip.Addr // the proxy's own
	leased  map[netip.Addr]struct{}
	next    netip.Addr // where the search for a free address goes on
}

// newPool makes a pool of prefixes; invalid ones are left out. holder names the user for whom an address is reserved.
func newPool(holder func(netip.Addr) string, prefixes ...netip.Prefix) *pool {
	p := &pool{holder: holder}
	for _, prefix := range prefixes {
		if !prefix.IsValid() {
			continue
		}
		gateway := prefix.Addr().Next()
		p.families = append(p.families, &family{
			prefix:  prefix,
			gateway: gateway,
			leased:  make(map[netip.Addr]struct{}),
			next:    gateway.Next(),
		})
	}
	return p
}

// gateways returns the proxy's own addresses with the prefix lengths of their pools.
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

// contains reports whether a is in the pool, leased or not, and not the proxy's own.
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

// lease takes want for user, or when that is unspecified, not free or not in the pool, one reserved for the user, or else
// any free address of its family.
func (p *pool) lease(user User, want netip.Addr) (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.family(want)
	if f == nil {
		return netip.Addr{}, errNoFamily
	}
	take := func(a netip.Addr) bool {
		if !f.usable(a) || !f.free(a) {
			return false
		}
		if holder := p.holder(a); holder != "" && holder != user.Name {
			return false
		}
		f.leased[a] = struct{}{}
		return true
	}
	if take(want) {
		return want, nil
	}
	for _, a := range user.Addresses {
		if a.Is4() == want.Is4() && take(a) {
			return a, nil
		}
	}
	for start := f.next; ; {
		a := f.next
		f.next = a.Next()
		if !f.usable(f.next) {
			f.next = f.gateway.Next()
		}
		if take(a) {
			return a, nil
		}
		if f.next == start {
			return netip.Addr{}, errPoolExhausted
		}
	}
}

// usable reports whether a can be an address of a client: not the network's, the proxy's own or IPv4's broadcast address.
func (f *family) usable(a netip.Addr) bool {
	if !f.prefix.Contains(a) || a == f.prefix.Addr() || a == f.gateway {
		return false
	}
	return a.Is6() || f.prefix.Contains(a.Next())
}

func (f *family) free(a netip.Addr) bool {
	_, taken := f.leased[a]
	return !taken
}

// release gives a back.
func (p *pool) release(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.family(a); f != nil {
		delete(f.leased, a)
	}
}

// leased returns the number of leased addresses of each family.
func (p *pool) leased() (v4, v6 int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.families {
		if f.prefix.Addr().Is4() {
			v4 = len(f.leased)
		} else {
			v6 = len(f.leased)
		}
	}
	return v4, v6
}
