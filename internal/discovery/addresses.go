package discovery

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"masquevpn/internal/special"
)

// maxAddresses limits the addresses of each family of a name.
const maxAddresses = 8

// An addressList has the addresses of a name.
type addressList struct {
	list    []netip.Addr // in the order in which to try them (RFC 8305)
	aliased bool         // a CNAME led to some
	ttl     lifetime
	err     *Error // why list is empty
}

// askAddresses asks for the addresses of a host, without waiting for answers.
func (x *resolution) askAddresses(ctx context.Context, host string) [2]*pending {
	if len(x.Hosts(host)) > 0 || x.asksHost(host) {
		return [2]*pending{}
	}
	return [2]*pending{x.ask(ctx, host, TypeAAAA), x.ask(ctx, host, TypeA)}
}

// asksHost reports whether the host's resolver looks up a name: a local one
// that the operator wrote.
func (x *resolution) asksHost(host string) bool { return isLocal(host) && host == x.input }

// addresses returns the addresses of a host.
func (x *resolution) addresses(ctx context.Context, host string) addressList {
	if list := x.Hosts(host); len(list) > 0 {
		return addressList{list: ByTurns(list)}
	}
	if x.asksHost(host) {
		list, err := x.Local(ctx, host)
		if err != nil {
			return addressList{err: dnsFailure(host, err)}
		}
		if len(list) == 0 {
			return addressList{err: noAddresses(host)}
		}
		return addressList{list: ByTurns(list)}
	}
	var all addressList
	var found []netip.Addr
	var failed, loop error
	for _, p := range x.askAddresses(ctx, host) {
		a, err := p.wait()
		switch {
		case errors.Is(err, ErrAliases):
			loop = err
		case err != nil:
			failed = err
		default:
			all.aliased = all.aliased || len(a.Aliases) > 0
			if len(a.Addrs) > 0 {
				all.ttl.add(a.TTL)
			}
			found = append(found, a.Addrs...)
		}
	}
	allowed := found
	if host != x.input {
		allowed = slices.DeleteFunc(slices.Clone(found), x.forbids)
	}
	all.list = ByTurns(allowed)
	switch {
	case len(all.list) > 0:
	case len(found) > 0:
		all.err = forbiddenAddress(host, found[0])
	case failed != nil:
		all.err = dnsFailure(host, failed)
	case loop != nil:
		all.err = aliasLoop(host)
	default:
		all.err = noAddresses(host)
	}
	return all
}

// forbids reports whether no server can be at an address that came from the
// network.
func (x *resolution) forbids(a netip.Addr) bool {
	return special.ForbiddenServer(a, x.query.Private)
}

// ByTurns returns the first 8 addresses of each family of list, without
// repetition, by turns and beginning with IPv6. IPv4 addresses in IPv6 form
// become IPv4.
func ByTurns(list []netip.Addr) []netip.Addr {
	var families [2][]netip.Addr // IPv6, IPv4
	for _, a := range list {
		a = a.Unmap()
		f := &families[0]
		if a.Is4() {
			f = &families[1]
		}
		if len(*f) < maxAddresses && !slices.Contains(*f, a) {
			*f = append(*f, a)
		}
	}
	var turns []netip.Addr
	for i := range maxAddresses {
		for _, f := range families {
			if i < len(f) {
				turns = append(turns, f[i])
			}
		}
	}
	return turns
}
