package proxy

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/proxy/internal/addrpool"
)

const (
	// maxAddresses is the number of leases that one session may hold, of both
	// families together.
	maxAddresses = 8

	// maxBlocks is the number of leases of one session and family that may be
	// blocks.
	maxBlocks = 1

	// unpromptedDelay is the time that a client has to ask for addresses before
	// it is assigned some unprompted. Clients that wait for an assignment give
	// up after 5 seconds.
	unpromptedDelay = 500 * time.Millisecond
)

// addressesRequested leases the addresses that the client asks for and assigns
// it the full list of its addresses (RFC 9484 section 4.7.2). A client that
// does not read blocks only this goroutine, because ss.mu is not held
// meanwhile.
func (ss *ipSession) addressesRequested(requested []capsule.Address) error {
	select {
	case <-ss.advertised:
	case <-ss.ctx.Done():
		return context.Cause(ss.ctx)
	}
	ss.assigning.Lock()
	defer ss.assigning.Unlock()
	if err := ss.conn.Assign(ss.answer(requested)); err != nil {
		return err
	}
	ss.notify()
	return nil
}

// answer leases the requested addresses and returns the full list of the
// client's addresses, followed by the refusals.
func (ss *ipSession) answer(requested []capsule.Address) []capsule.Address {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var refused []capsule.Address
	var reason error
	for _, r := range ss.answerHeld(requested) {
		a, err := ss.lease(r)
		if err != nil {
			refused, reason = append(refused, connectip.Refusal(r)), err
			continue
		}
		ss.addresses = append(ss.addresses, a)
	}
	if len(refused) > 0 {
		ss.log.Warn("addresses refused", "requests", len(refused), "reason", reason)
	}
	ss.noteAssigned("addresses assigned")
	return slices.Concat(ss.addresses, refused)
}

// answerHeld answers requests with addresses that the client has already, and
// returns the other requests. An address answers a request for itself. An
// address that was assigned unprompted also answers a request for any address
// of its family; if it answers none, it is released, so that the client has
// only the addresses that it asked for, whether or not it asked in time.
// ss.mu is held.
func (ss *ipSession) answerHeld(requested []capsule.Address) (others []capsule.Address) {
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
		return ss.shared.pool.AnySingle(r.Prefix) && answer(r, func(held capsule.Address) bool {
			return held.RequestID == 0 && held.Prefix.Addr().Is4() == r.Prefix.Addr().Is4()
		})
	})
	ss.addresses = slices.DeleteFunc(ss.addresses, func(held capsule.Address) bool {
		if held.RequestID != 0 {
			return false
		}
		ss.shared.table.remove(held.Prefix)
		ss.shared.pool.Release(held.Prefix, ss.holderKey())
		ss.userState.leases.Add(-1)
		return true
	})
	return others
}

// lease leases an address or a block for the request r and routes it to the
// session. ss.mu is held.
func (ss *ipSession) lease(r capsule.Address) (capsule.Address, error) {
	if len(ss.addresses) >= maxAddresses {
		return r, fmt.Errorf("the session has %d addresses already", maxAddresses)
	}
	want, blocks := r.Prefix, 0
	for _, held := range ss.addresses {
		if !held.Prefix.IsSingleIP() && held.Prefix.Addr().Is4() == want.Addr().Is4() {
			blocks++
		}
	}
	if blocks >= maxBlocks {
		want = netip.PrefixFrom(want.Addr(), want.Addr().BitLen())
	}
	if n := ss.userState.leases.Add(1); n > ss.maxLeases() {
		ss.userState.leases.Add(-1)
		return r, fmt.Errorf("the user has as many addresses as allowed, %d "+
			"(limits.addresses_per_user)", n-1)
	}
	p, err := ss.shared.pool.Lease(ss.holder(), want)
	if err != nil {
		ss.userState.leases.Add(-1)
		return r, err
	}
	ss.shared.table.insert(p, ss)
	return capsule.Address{RequestID: r.RequestID, Prefix: p}, nil
}

// holder returns the session as the pool knows it.
func (ss *ipSession) holder() addrpool.Holder {
	return addrpool.Holder{Owner: ss.holderKey(), User: ss.owner().key(),
		Reserved: ss.user.Addresses}
}

// holderKey returns the identity that leases are held for after their release:
// the user on this installation. Without authentication it is the installation,
// or the instance if the client sent no installation. A client cannot get the
// identity of another user.
func (ss *ipSession) holderKey() string {
	if ss.user.Name == "" {
		return cmp.Or(ss.installation, ss.instance)
	}
	return ss.owner().key() + "\n" + ss.installation
}

// maxLeases returns how many addresses and blocks all sessions of the user may
// hold together.
func (ss *ipSession) maxLeases() int64 {
	cfg := ss.shared.cfg()
	switch {
	case ss.user.Name == "":
		return math.MaxInt64
	case ss.user.MaxAddresses > 0:
		return int64(ss.user.MaxAddresses)
	case cfg.MaxAddressesPerUser > 0:
		return int64(cfg.MaxAddressesPerUser)
	}
	return addressesPerSession * int64(ss.maxSessions())
}

// noteAssigned tells the other parts of the proxy the addresses that the client
// is about to be assigned. ss.mu is held.
func (ss *ipSession) noteAssigned(message string) {
	ss.assigned = true
	if ss.claim != nil {
		ss.shared.sites.setLeased(ss.claim, prefixes(ss.addresses))
	}
	ss.log.Info(message, "addresses", prefixes(ss.addresses))
}

// leaseReserved leases the user's reserved addresses, one of each family,
// before the client has sent anything: a client that is configured with the
// address may use it at once. ss.mu is held.
func (ss *ipSession) leaseReserved() []netip.Prefix {
	for _, p := range ss.shared.pool.LeaseReserved(ss.holder()) {
		ss.userState.leases.Add(1)
		ss.shared.table.insert(p, ss)
		ss.addresses = append(ss.addresses, capsule.Address{Prefix: p})
	}
	if ss.claim != nil {
		ss.shared.sites.setLeased(ss.claim, prefixes(ss.addresses))
	}
	return prefixes(ss.addresses)
}

// assignUnprompted assigns addresses to a client that does not ask for any: one
// of each family, or only the reserved ones if the client is the gateway of a
// site, which may not need one. RFC 9484 section 4.7.1 expects clients to ask
// unless they are configured with static addresses, but allows the proxy to
// assign unprompted, and many clients wait for that.
//
// It returns once addresses are assigned or the client has asked, or when
// ss.ctx ends.
func (ss *ipSession) assignUnprompted() {
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
	ss.notify()
}

// unprompted leases addresses for a client that has not asked for any, and
// returns the full list of its addresses. It returns nil if the client has
// asked.
func (ss *ipSession) unprompted() []capsule.Address {
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

// leaseMissing leases an address of each family that the client has no address
// of. ss.mu is held.
func (ss *ipSession) leaseMissing() {
	for _, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		has := slices.ContainsFunc(ss.addresses, func(a capsule.Address) bool {
			return a.Prefix.Addr().Is4() == unspecified.Is4()
		})
		if has || !ss.shared.pool.Serves(unspecified) {
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

// release releases all addresses and networks of the session.
func (ss *ipSession) release() {
	if ss.claim != nil {
		ss.shared.sites.remove(ss.claim)
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, a := range ss.addresses {
		ss.shared.table.remove(a.Prefix)
	}
	for _, a := range ss.addresses {
		ss.shared.pool.Release(a.Prefix, ss.holderKey())
		ss.userState.leases.Add(-1)
	}
	ss.addresses, ss.assigned = nil, true
}

// prefixes returns the prefixes of addrs.
func prefixes(addrs []capsule.Address) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = a.Prefix
	}
	return out
}
