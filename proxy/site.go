package proxy

import (
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"masquevpn/internal/connectip"
)

// Site is a user whose client is a gateway to networks of its own (RFC 9484
// section 8.2).
type Site struct {
	// User is the name of the user whose client is the gateway.
	User string

	// Networks are the networks that the client may advertise and send from.
	Networks []netip.Prefix

	// Peer are the networks, besides Networks, from which the client may assign
	// addresses to the proxy.
	Peer []netip.Prefix

	// Reach limits the routes that the client is told: to networks of the proxy
	// and of other sites. nil means no limit.
	Reach []netip.Prefix
}

// owner is who holds networks: the user of a site, or a peer with one of the
// proxy's domains. A user may have the name of a domain.
type owner struct {
	user string  // empty for a pair
	pair pairKey // zero for a user
}

func (o owner) isPair() bool { return o.pair != pairKey{} }

// String describes o for messages.
func (o owner) String() string {
	if o.isPair() {
		return fmt.Sprintf("the peer %q", o.pair.domain)
	}
	return fmt.Sprintf("the site %q", o.user)
}

// noun returns the kind of o, for messages.
func (o owner) noun() string {
	if o.isPair() {
		return "peer"
	}
	return "user"
}

// table returns the table of the configuration that o has.
func (o owner) table() string {
	if o.isPair() {
		return "[[peer]]"
	}
	return "[[site]]"
}

// key returns o as text that no other owner has. It is the name of a user.
func (o owner) key() string {
	if o.isPair() {
		return "\n" + o.pair.domain + "\n" + o.pair.local
	}
	return o.user
}

// rights are the rights of an owner of networks, besides those of every client.
type rights struct {
	networks []netip.Prefix // it may advertise parts of them
	assign   *netipx.IPSet  // addresses that it may assign to the proxy
	reach    *netipx.IPSet  // addresses that it may reach; nil: no limit

	// withheld are addresses that it may not reach; nil: none. beyond are all
	// addresses outside reach, and those.
	withheld *netipx.IPSet
	beyond   []netip.Prefix
}

// rights checks c.Sites and returns the rights of their users and of peers.
func (c Config) rights() (map[owner]*rights, error) {
	all := make(map[owner]*rights)
	for i, site := range c.Sites {
		key := func(name string) string { return fmt.Sprintf("site[%d].%s", i, name) }
		switch {
		case site.User == "":
			return nil, usage(key("user"), "the user whose client is the gateway is missing")
		case slices.Contains(c.Methods, MethodNone):
			return nil, usage(key("user"), "nobody is known to be %q when auth.methods is %q",
				site.User, MethodNone)
		case all[owner{user: site.User}] != nil:
			return nil, usage(key("user"),
				"%q has a [[site]] already: write all of its networks there", site.User)
		case len(site.Networks) == 0:
			return nil, usage(key("networks"), "the networks behind %q are missing", site.User)
		}
		for _, list := range []struct {
			name     string
			prefixes []netip.Prefix
			behind   bool // the networks are behind the gateway
		}{{"networks", site.Networks, true}, {"peer", site.Peer, true},
			{"reach", site.Reach, false}} {
			for _, p := range list.prefixes {
				if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
					return nil, usage(key(list.name),
						"%v is not a prefix without bits beyond its length", p)
				}
				if reserved, overlaps := connectip.Reserved(p); overlaps && list.behind {
					return nil, usage(key(list.name),
						"%v overlaps %v, which is never behind a gateway", p, reserved)
				}
			}
		}
		r := &rights{networks: site.Networks,
			assign: setOf(slices.Concat(site.Networks, site.Peer))}
		if site.Reach != nil {
			r.reach = setOf(site.Reach)
		}
		all[owner{user: site.User}] = r
	}
	c.addPeerRights(all)
	return all, nil
}

// setOf returns the set of the addresses in prefixes. The prefixes must be
// valid.
func setOf(prefixes []netip.Prefix) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, p := range prefixes {
		b.AddPrefix(p)
	}
	set, _ := b.IPSet()
	return set
}
