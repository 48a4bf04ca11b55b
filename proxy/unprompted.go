package proxy

import (
	"net/netip"
	"slices"
	"time"

	"masquevpn/capsule"
)

// RFC 9484 section 4.7.1 has a client that expects an address ask for it,
// unless it is configured with static ones. Many clients do not ask and wait
// for what they are assigned, which the same section allows.

// leaseReserved leases what is reserved for the user, one address of each
// family, before the client has said anything: a client that is configured with
// the address may use it at once. ss.mu is held.
func (ss *session) leaseReserved() []netip.Prefix {
	for _, p := range ss.server.pool.leaseReserved(ss.user, ss.owner()) {
		ss.userState.leases.Add(1)
		ss.server.table.insert(p, ss)
		ss.addresses = append(ss.addresses, capsule.Address{Prefix: p})
	}
	if ss.claim != nil {
		ss.server.sites.lease(ss.claim, prefixes(ss.addresses))
	}
	return prefixes(ss.addresses)
}

// assignUnprompted assigns a client that does not ask one address of each
// family, or, where the client is the gateway of a site, which may have no use
// for one, what is reserved for its user alone. It returns when the client has
// asked, or is assigned addresses, or ss.ctx ends.
func (ss *session) assignUnprompted() {
	delay := time.NewTimer(unpromptedDelay)
	defer delay.Stop()
	select {
	case <-delay.C:
	case <-ss.ctx.Done():
		return
	}
	select {
	case <-ss.advertised:
	case <-ss.ctx.Done():
		return
	}
	ss.assigning.Lock()
	defer ss.assigning.Unlock()
	addrs := ss.unprompted()
	if len(addrs) == 0 {
		return
	}
	if err := ss.conn.Assign(addrs); err != nil {
		ss.stop(err)
		return
	}
	ss.refresh()
}

// unprompted leases what a client gets that did not ask, and returns its full
// list of addresses, nil when it has asked.
func (ss *session) unprompted() []capsule.Address {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.assigned {
		return nil
	}
	if ss.claim == nil {
		ss.leaseMissing()
	}
	if len(ss.addresses) == 0 {
		return nil
	}
	ss.noteAssigned("addresses assigned, though the client asked for none")
	return slices.Clone(ss.addresses)
}

// leaseMissing leases an address of each family that the client has none of.
// ss.mu is held.
func (ss *session) leaseMissing() {
	for _, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		has := slices.ContainsFunc(ss.addresses, func(a capsule.Address) bool {
			return a.Prefix.Addr().Is4() == unspecified.Is4()
		})
		if has || !ss.server.pool.serves(unspecified) {
			continue
		}
		a, err := ss.lease(capsule.Address{Prefix: netip.PrefixFrom(unspecified,
			unspecified.BitLen())})
		if err != nil {
			ss.log.Warn("no address for a client that asked for none", "reason", err)
			continue
		}
		ss.addresses = append(ss.addresses, a)
	}
}

// answerHeld answers requests with what the client has, and returns the others:
// a request for an address, or a prefix, that it was assigned, and one for any
// address while it has one that it did not ask for. What answers none of the
// client's first requests goes back, so that the client has what it asked for,
// whether or not it was quick. ss.mu is held.
func (ss *session) answerHeld(requested []capsule.Address) (others []capsule.Address) {
	answered := make([]bool, len(ss.addresses))
	answer := func(r capsule.Address, fits func(held capsule.Address) bool) bool {
		for i, held := range ss.addresses {
			if !answered[i] && fits(held) {
				ss.addresses[i].RequestID, answered[i] = r.RequestID, true
				return true
			}
		}
		return false
	}
	others = slices.DeleteFunc(slices.Clone(requested), func(r capsule.Address) bool {
		return answer(r, func(held capsule.Address) bool { return held.Prefix == r.Prefix })
	})
	others = slices.DeleteFunc(others, func(r capsule.Address) bool {
		return ss.server.pool.anySingle(r.Prefix) && answer(r, func(held capsule.Address) bool {
			return held.RequestID == 0 && held.Prefix.Addr().Is4() == r.Prefix.Addr().Is4()
		})
	})
	ss.addresses = slices.DeleteFunc(ss.addresses, func(held capsule.Address) bool {
		if held.RequestID != 0 {
			return false
		}
		ss.server.table.remove(held.Prefix)
		ss.server.pool.release(held.Prefix, ss.owner())
		ss.userState.leases.Add(-1)
		return true
	})
	return others
}
