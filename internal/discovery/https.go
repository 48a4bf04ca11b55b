package discovery

import (
	"cmp"
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
)

// maxAliases limits the HTTPS records in AliasMode that are followed.
const maxAliases = 8

// Keys of HTTPS records (RFC 9460 section 14.3.2).
const (
	keyALPN          = 1
	keyNoDefaultALPN = 2
	keyPort          = 3
	keyIPv4Hint      = 4
	keyECH           = 5
	keyIPv6Hint      = 6
)

// knownKeys are the keys that may be mandatory.
var knownKeys = []uint16{keyALPN, keyNoDefaultALPN, keyPort, keyIPv4Hint, keyECH, keyIPv6Hint}

// A httpsChain is where the HTTPS records in AliasMode of a host lead to.
type httpsChain struct {
	name    string  // the last name
	owner   string  // the owner of records, behind the CNAMEs of name
	records []HTTPS // the last name has, in ServiceMode
	ttl     lifetime
}

// https decides by the HTTPS records of n (RFC 9460). It returns nil without an
// error when these say nothing.
func (x *resolution) https(ctx context.Context, n Name) (*finding, error) {
	chain, err := x.followAliases(ctx, n)
	if err != nil {
		return nil, err
	}
	aliased := chain.name != n.host
	list := x.services(ctx, chain)
	if len(list) == 0 && !aliased {
		return nil, nil
	}
	f := &finding{step: "https", authority: n.host, ttl: chain.ttl}
	f.groups = x.groupServices(list)
	for _, s := range list {
		f.ttl.merge(s.addresses.ttl)
	}
	last := x.addresses(ctx, chain.name)
	if last.err != nil {
		if len(list) == 0 {
			return nil, last.err
		}
		return x.named(f, n), nil
	}
	f.ttl.merge(last.ttl)
	for _, t := range x.query.Transports {
		rest := slices.DeleteFunc(slices.Clone(last.list), func(a netip.Addr) bool {
			return slices.ContainsFunc(f.groups, func(g Group) bool { return g.has(a, t) })
		})
		if len(rest) > 0 {
			f.groups = append(f.groups, Group{[]Record{{Target: chain.name, Port: defaultPort,
				Transport: t, Addresses: rest}}})
		}
	}
	return x.named(f, n), nil
}

// has reports whether a record of g has an address at the default port.
func (g Group) has(a netip.Addr, t Transport) bool {
	return slices.ContainsFunc(g.Records, func(r Record) bool {
		return r.Transport == t && r.Port == defaultPort && slices.Contains(r.Addresses, a)
	})
}

// named sets the names of all records of f: HTTPS records lead to no other
// certificate.
func (x *resolution) named(f *finding, n Name) *finding {
	for _, g := range f.groups {
		for i := range g.Records {
			g.Records[i].SNI, g.Records[i].Verify = n.host, []string{n.host}
		}
	}
	return f
}

// followAliases follows the records in AliasMode of a host.
func (x *resolution) followAliases(ctx context.Context, n Name) (*httpsChain, error) {
	chain := &httpsChain{name: n.host, owner: n.host}
	seen := map[string]bool{n.host: true}
	for {
		a, err := x.ask(ctx, chain.name, TypeHTTPS).wait()
		if chain.name == n.host && x.query.DNSSEC == DNSSECRequire {
			switch {
			case err != nil:
				return nil, dnsFailure(n.host, err)
			case !a.Secure:
				return nil, notSecure(n.host)
			}
		}
		if err != nil || len(a.HTTPS) == 0 {
			return chain, nil
		}
		chain.ttl.add(a.TTL)
		alias := slices.IndexFunc(a.HTTPS, func(h HTTPS) bool { return h.Priority == 0 })
		if alias < 0 {
			chain.records = a.HTTPS
			if len(a.Aliases) > 0 {
				chain.owner = a.Aliases[len(a.Aliases)-1]
			}
			return chain, nil
		}
		target := a.HTTPS[alias].Target
		if target == "." {
			return nil, notOffered(n.host)
		}
		next, err := parseHost(target)
		switch {
		case err != nil:
			return chain, nil
		case seen[next] || len(seen) > maxAliases:
			return nil, aliasLoop(n.host)
		}
		seen[next] = true
		chain.name, chain.owner = next, next
		x.askAddresses(ctx, next)
	}
}

// A serviceRecord is an HTTPS record in ServiceMode that can be used.
type serviceRecord struct {
	priority  uint16
	host      string
	port      uint16
	alpn      []string
	addresses addressList
}

// services returns the usable records of a chain by priority, those of one
// priority in the order of the answer.
func (x *resolution) services(ctx context.Context, chain *httpsChain) []serviceRecord {
	var list []serviceRecord
	for _, h := range chain.records {
		s := serviceRecord{priority: h.Priority, host: chain.owner, port: defaultPort, alpn: h.ALPN}
		if h.HasPort {
			s.port = h.Port
		}
		if h.Target != "." {
			s.host, _ = parseHost(h.Target)
		}
		known := !slices.ContainsFunc(h.Mandatory, func(key uint16) bool {
			return !slices.Contains(knownKeys, key)
		})
		spoken := slices.ContainsFunc(h.ALPN, func(id string) bool {
			return x.query.speaks(Transport(id))
		})
		if known && spoken && s.host != "" && s.port != 0 && len(list) < maxSRV {
			x.askAddresses(ctx, s.host)
			list = append(list, s)
		}
	}
	for i := range list {
		list[i].addresses = x.addresses(ctx, list[i].host)
	}
	list = slices.DeleteFunc(list, func(s serviceRecord) bool { return s.addresses.err != nil })
	slices.SortStableFunc(list, func(a, b serviceRecord) int {
		return cmp.Compare(a.priority, b.priority)
	})
	return list
}

// groupServices returns a group for each priority and transport of list, which
// is sorted by priority. Records of a group are in random order (RFC 9460
// section 2.4.1).
func (x *resolution) groupServices(list []serviceRecord) []Group {
	x.Resolver.mu.Lock()
	defer x.Resolver.mu.Unlock()
	var groups []Group
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].priority == list[0].priority {
			n++
		}
		for _, t := range x.query.Transports {
			if g := groupOf(x.Rand, list[:n], t); len(g.Records) > 0 {
				groups = append(groups, g)
			}
		}
		list = list[n:]
	}
	return groups
}

// groupOf returns the records of list that offer t, without repetition.
func groupOf(random *rand.Rand, list []serviceRecord, t Transport) (g Group) {
	for _, s := range list {
		same := func(r Record) bool { return r.Target == s.host && r.Port == s.port }
		if slices.Contains(s.alpn, string(t)) && !slices.ContainsFunc(g.Records, same) {
			g.Records = append(g.Records, Record{Target: s.host, Port: s.port, Transport: t,
				Priority:  s.priority,
				Addresses: s.addresses.list})
		}
	}
	random.Shuffle(len(g.Records), func(i, k int) {
		g.Records[i], g.Records[k] = g.Records[k], g.Records[i]
	})
	return g
}

// sniOf returns the SNI for a name in a certificate: none for an address (RFC
// 6066 section 3).
func sniOf(name string) string {
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return ""
	}
	return name
}
