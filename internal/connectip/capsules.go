package connectip

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"masquevpn/capsule"
)

const (
	// writeChunk is the number of bytes of a capsule that are written with one
	// deadline.
	writeChunk = 16 << 10

	// writeTimeout limits the time for writing one chunk. A peer that reads
	// nothing for so long is considered gone.
	writeTimeout = 10 * time.Second

	// maxPeerRequests is the maximum number of addresses that a peer may
	// request on one stream.
	maxPeerRequests = 1024
)

// readCapsules handles capsules until the stream ends. The error is never nil.
func (c *Conn) readCapsules() error {
	r := capsule.NewReader(c.str, cmp.Or(c.cfg.MaxCapsule, MaxCapsule))
	r.Skipped = c.cfg.Stats.Receive.countCapsule
	for {
		next, err := r.Next()
		if err == io.EOF {
			return ErrClosedByPeer
		}
		if closedWithoutError(err) { // the connection ended before the stream
			return ErrClosedByPeer
		}
		if err != nil {
			return err
		}
		c.cfg.Stats.Receive.countCapsule(next.Type())
		if err := c.pace.wait(c.ctx, next); err != nil {
			return err
		}
		switch x := next.(type) {
		case *capsule.AddressAssign:
			err = c.handleAssign(x.Addresses)
		case *capsule.AddressRequest:
			err = c.handleRequest(x.Addresses)
		case *capsule.RouteAdvertisement:
			err = c.handleRoutes(x.Routes)
		case *capsule.DNSAssign:
			if c.cfg.Handler.DNS != nil {
				err = c.cfg.Handler.DNS(x.Configurations)
			}
		case *capsule.PREF64:
			if c.cfg.Handler.PREF64 != nil {
				err = c.cfg.Handler.PREF64(x.Prefixes)
			}
		case *capsule.Datagram: // RFC 9297 section 3.5
			c.handleDatagram(x.Payload, unbatched{c, &c.writers.capsules})
		}
		if err != nil {
			return fmt.Errorf("%v capsule: %w", next.Type(), err)
		}
	}
}

func (c *Conn) handleAssign(addrs []capsule.Address) error {
	if c.cfg.Handler.Assigned == nil {
		return nil
	}
	if n := len(withoutRefusals(addrs)); n > MaxAssigned {
		return fmt.Errorf("%w: %d addresses assigned, at most %d are accepted", capsule.ErrTooLarge,
			n, MaxAssigned)
	}
	if err := c.changeLink(func() {
		for _, a := range addrs {
			delete(c.pendingRequests, a.RequestID)
		}
		accepted := addrs
		if filter := c.cfg.Filter.Assigned; filter != nil {
			accepted = filter(addrs)
		}
		c.setAssigned(withoutRefusals(accepted))
	}); err != nil {
		return err
	}
	return c.cfg.Handler.Assigned(addrs)
}

// changeLink calls change with c.mu held and then updates the policy.
func (c *Conn) changeLink(change func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	return c.updatePolicy()
}

// setAssigned replaces the prefixes that the peer assigned to this endpoint.
// c.mu is held.
func (c *Conn) setAssigned(prefixes []netip.Prefix) {
	c.link.assigned = append(slices.Clone(c.cfg.Static), prefixes...)
}

// withoutRefusals returns the prefixes of an ADDRESS_ASSIGN capsule, except
// refusals.
func withoutRefusals(addrs []capsule.Address) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		if !a.Refused() {
			out = append(out, a.Prefix)
		}
	}
	return out
}

func (c *Conn) handleRequest(addrs []capsule.Address) error {
	c.mu.Lock()
	for _, a := range addrs {
		if _, reused := c.peerRequestIDs[a.RequestID]; reused {
			c.mu.Unlock()
			return fmt.Errorf("%w: request ID %d used twice", capsule.ErrMalformed, a.RequestID)
		}
		c.peerRequestIDs[a.RequestID] = struct{}{}
	}
	n := len(c.peerRequestIDs)
	c.mu.Unlock()
	if n > maxPeerRequests {
		return fmt.Errorf("%w: more than %d addresses requested", capsule.ErrTooLarge,
			maxPeerRequests)
	}
	if c.cfg.Handler.Requested != nil {
		return c.cfg.Handler.Requested(addrs)
	}
	// Every requested address must be answered (RFC 9484 section 4.7.2).
	refused := make([]capsule.Address, len(addrs))
	for i, a := range addrs {
		refused[i] = Refusal(a)
	}
	return c.Assign(refused)
}

// Refusal returns the answer that refuses a requested address: the all-zero
// address of the same family (RFC 9484 section 4.7.2).
func Refusal(request capsule.Address) capsule.Address {
	a := netip.IPv4Unspecified()
	if request.Prefix.Addr().Is6() {
		a = netip.IPv6Unspecified()
	}
	return capsule.Address{RequestID: request.RequestID, Prefix: netip.PrefixFrom(a, a.BitLen())}
}

func (c *Conn) handleRoutes(routes []capsule.Route) error {
	if c.cfg.Handler.Routes == nil {
		return nil
	}
	if err := c.changeLink(func() {
		c.link.peerAdvertised = routes
		if filter := c.cfg.Filter.Routes; filter != nil {
			c.link.peerAdvertised = filter(routes)
		}
	}); err != nil {
		return err
	}
	return c.cfg.Handler.Routes(routes)
}

// updatePolicy computes the policy from the link. c.mu is held, except in New.
func (c *Conn) updatePolicy() error {
	p, err := c.link.policy()
	if err != nil {
		return err
	}
	c.policy.Store(p)
	return nil
}

// Assign sends the peer the complete list of its addresses, which replaces the
// previous list (RFC 9484 section 4.7.1). An address that answers a request
// carries the request's ID. The policy ignores refusals.
func (c *Conn) Assign(addrs []capsule.Address) error {
	return c.send(&capsule.AddressAssign{Addresses: addrs}, func(l *link) {
		l.peerAssigned = withoutRefusals(addrs)
	})
}

// Advertise sends the peer the complete list of routes that it can reach
// through this endpoint. It replaces the previous list (RFC 9484 section
// 4.7.3).
func (c *Conn) Advertise(routes []capsule.Route) error {
	return c.send(&capsule.RouteAdvertisement{Routes: routes},
		func(l *link) { l.advertised = routes })
}

// AssignDNS sends the peer DNS configurations, which replace the previous ones;
// an empty list removes them. Advertise the routes to the nameservers first, so
// that no query leaves outside the tunnel
// (draft-ietf-masque-connect-ip-dns-06 section 5).
func (c *Conn) AssignDNS(configurations []capsule.DNSConfiguration) error {
	return c.send(&capsule.DNSAssign{Configurations: configurations}, nil)
}

// SendPREF64 sends the peer the prefixes of NAT64, which replace the previous
// ones; an empty list means that there is no NAT64
// (draft-ietf-masque-connect-ip-dns-06 section 4).
func (c *Conn) SendPREF64(prefixes []netip.Prefix) error {
	return c.send(&capsule.PREF64{Prefixes: prefixes}, nil)
}

// Request requests addresses from the peer (RFC 9484 section 4.7.2). 0.0.0.0/32
// and ::/128 request any address of their family, other prefixes are
// preferences.
func (c *Conn) Request(prefixes []netip.Prefix) error {
	c.mu.Lock()
	addrs := make([]capsule.Address, len(prefixes))
	for i, p := range prefixes {
		c.lastRequestID++
		addrs[i] = capsule.Address{RequestID: c.lastRequestID, Prefix: p}
		c.pendingRequests[c.lastRequestID] = p
	}
	c.mu.Unlock()
	return c.send(&capsule.AddressRequest{Addresses: addrs}, nil)
}

// Unanswered reports whether addresses that Request requested are still
// unanswered.
func (c *Conn) Unanswered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pendingRequests) > 0
}

// SetFiltered replaces the accepted entries of the peer's last capsules. Call
// it when Filter would now return other entries.
func (c *Conn) SetFiltered(assigned []netip.Prefix, routes []capsule.Route) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, n := c.link.assigned, len(c.cfg.Static)
	if len(before) >= n && slices.Equal(before[n:], assigned) &&
		slices.Equal(c.link.peerAdvertised, routes) {
		return nil
	}
	c.setAssigned(assigned)
	c.link.peerAdvertised = routes
	return c.updatePolicy()
}

// SetDenied replaces Config.Denied and Config.Withheld.
func (c *Conn) SetDenied(denied, withheld []netip.Prefix) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Equal(c.link.denied, denied) && slices.Equal(c.link.withheld, withheld) {
		return nil
	}
	c.link.denied, c.link.withheld = denied, withheld
	return c.updatePolicy()
}

// send calls change, updates the policy, and writes one capsule. In this order,
// the policy permits packets before the peer can know that it may send them.
func (c *Conn) send(x capsule.Capsule, change func(*link)) error {
	if err := x.Validate(); err != nil {
		return err
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if change != nil {
		if err := c.changeLink(func() { change(&c.link) }); err != nil {
			return err
		}
	}
	if c.truncated {
		return fmt.Errorf("sending %v: %w", x.Type(), errTunnelClosed)
	}
	begun, err := c.writeCapsule(x.Append(nil))
	if err != nil {
		err = fmt.Errorf("sending %v: %w", x.Type(), err)
		if begun {
			c.truncated = true
			c.stop(err)
		}
		return err
	}
	c.cfg.Stats.Send.countCapsule(x.Type())
	return nil
}

var errTunnelClosed = errors.New("the tunnel is closed")

// writeCapsule writes b in chunks, each with a deadline of its own, because a
// long list takes a while on a slow path. begun reports whether a part of b may
// have been written. c.writeMu is held.
func (c *Conn) writeCapsule(b []byte) (begun bool, err error) {
	for chunk := range slices.Chunk(b, writeChunk) {
		_ = c.str.SetWriteDeadline(time.Now().Add(writeTimeout))
		// end sets closed before its own deadline. So if closed is not set
		// here, the deadline of end comes later and limits this write.
		if c.closed.Load() {
			return begun, errTunnelClosed
		}
		begun = true
		if _, err := c.str.Write(chunk); err != nil {
			return begun, err
		}
	}
	return begun, nil
}
