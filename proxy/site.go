package proxy

import (
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/routing"
)

// Site is a user whose client is a gateway to networks of its own (RFC 9484
// section 8.2).
type Site struct {
	User     string
	Networks []netip.Prefix // what the client may advertise and send from
	// where the addresses may be from that it assigns to the proxy, besides
	// Networks
	Peer []netip.Prefix
	// of what the proxy advertises and of other sites, what this one reaches;
	// nil: all
	Reach []netip.Prefix
}

// rights is what a session may do besides what every client may. It is decided
// once for each request, from who asks.
type rights struct {
	networks []netip.Prefix // may be advertised
	assign   *netipx.IPSet  // may be assigned to the proxy
	reach    *netipx.IPSet  // may be reached, nil for no limit
}

// siteRights checks c.Sites and returns the rights of each site's user.
func (c Config) siteRights() (map[string]*rights, error) {
	all := make(map[string]*rights)
	for i, site := range c.Sites {
		key := func(name string) string { return fmt.Sprintf("site[%d].%s", i, name) }
		switch {
		case site.User == "":
			return nil, usage(key("user"), "the user whose client is the gateway is missing")
		case slices.Contains(c.Methods, MethodNone):
			return nil, usage(key("user"), "nobody is known to be %q when auth.methods is %q",
				site.User, MethodNone)
		case all[site.User] != nil:
			return nil, usage(key("user"),
				"%q has a [[site]] already: write all of its networks there", site.User)
		case len(site.Networks) == 0:
			return nil, usage(key("networks"), "the networks behind %q are missing", site.User)
		}
		for _, list := range []struct {
			name     string
			prefixes []netip.Prefix
			behind   bool // the gateway
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
		all[site.User] = r
	}
	return all, nil
}

// setOf returns the set of prefixes, which are valid.
func setOf(prefixes []netip.Prefix) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, p := range prefixes {
		b.AddPrefix(p)
	}
	set, _ := b.IPSet()
	return set
}

const (
	// maxSiteRanges is how many ranges of one advertisement count.
	maxSiteRanges = 256
	// maxSitePrefixes is how many prefixes, and so routes of the kernel, the
	// networks of one site may make.
	maxSitePrefixes = 1024
	// maxRefusals is how many refusals of one session are written to the log.
	maxRefusals = 5
)

// taken is a network that is somebody's already.
type taken struct {
	prefix netip.Prefix
	whose  string // as in "192.0.2.0/24, WHOSE"
}

// holding is what a session has of the networks that it advertised and the
// addresses that it assigned.
type holding struct {
	routes   []capsule.Route
	networks *netipx.IPSet  // addresses in routes
	prefixes []netip.Prefix // networks as prefixes
	assigned []netip.Prefix // single addresses assigned to the proxy
	refused  []string       // the rest, and why
}

// decide works out what c has when earlier, which are the claims that go first,
// have what they have. roomOfAll is how many prefixes clients would take
// besides.
func (c *claim) decide(all []taken, earlier []*claim, roomOfAll int) holding {
	h := holding{networks: new(netipx.IPSet)}
	if c.rights == nil {
		return h
	}
	var networks netipx.IPSetBuilder
	room := maxSitePrefixes
	for _, e := range earlier {
		if e.user() == c.user() {
			room -= len(e.has.prefixes)
		}
	}
	for i, r := range c.advertised {
		if i == maxSiteRanges {
			h.refuse("%d more: only %d ranges are accepted", len(c.advertised)-i, maxSiteRanges)
			break
		}
		whole := netipx.IPRangeFrom(r.Start, r.End)
		var rest netipx.IPSetBuilder
		rest.AddRange(whole)
		for _, n := range c.rights.networks {
			part, ok := intersection(whole, netipx.RangeOfPrefix(n))
			if !ok {
				continue
			}
			rest.RemoveRange(part)
			if why := conflict(part, c, all, earlier); why != "" {
				h.refuse("%s overlaps %s", rangeText(part), why)
				continue
			}
			n := len(part.Prefixes())
			if room -= n; room < 0 {
				h.refuse("%s: the networks of a site may make %d prefixes", rangeText(part),
					maxSitePrefixes)
				continue
			}
			if roomOfAll -= n; roomOfAll < 0 {
				h.refuse("%s: what is advertised may make %d prefixes in all", rangeText(part),
					routing.MaxRoutes)
				continue
			}
			h.routes = append(h.routes,
				capsule.Route{Start: part.From(), End: part.To(), Protocol: r.Protocol})
			networks.AddRange(part)
		}
		if s, err := rest.IPSet(); err != nil || len(s.Ranges()) > 0 {
			h.refuse("%s is not within the networks of its [[site]]", rangeText(whole))
		}
	}
	h.networks, _ = networks.IPSet() // the ranges are valid
	h.prefixes = h.networks.Prefixes()
	for i, a := range c.assigned {
		switch why := conflict(netipx.RangeOfPrefix(a), c, all, earlier); {
		case i >= maxAddresses:
			h.refuse("address %v: a site may assign %d", a, maxAddresses)
		case !a.IsSingleIP():
			h.refuse("%v, which it assigns, is not a single address", a)
		case !c.rights.assign.ContainsPrefix(a):
			h.refuse("address %v is not within the networks of its [[site]]", a.Addr())
		case why != "":
			h.refuse("address %v is within %s", a.Addr(), why)
		default:
			h.assigned = append(h.assigned, a)
		}
	}
	return h
}

func (h *holding) refuse(format string, args ...any) {
	switch len(h.refused) {
	case maxRefusals:
		h.refused = append(h.refused, "and more")
	case maxRefusals + 1:
	default:
		h.refused = append(h.refused, fmt.Sprintf(format, args...))
	}
}

// conflict says with what r overlaps that c cannot have, "" for nothing.
func conflict(r netipx.IPRange, c *claim, all []taken, earlier []*claim) string {
	for _, t := range all {
		if r.Overlaps(netipx.RangeOfPrefix(t.prefix)) {
			return fmt.Sprintf("%v, %s", t.prefix, t.whose)
		}
	}
	for _, e := range earlier {
		held := e.has.networks.OverlapsRange(r) ||
			slices.ContainsFunc(e.has.assigned, func(a netip.Prefix) bool {
				return r.Contains(a.Addr())
			})
		switch {
		case !held:
		case e.user() == c.user():
			return "what the newer session " + e.ss.id + " of the same user has"
		default:
			return fmt.Sprintf("the networks of the site %q", e.user())
		}
	}
	return ""
}

// intersection returns what is both in a and in b.
func intersection(a, b netipx.IPRange) (netipx.IPRange, bool) {
	from, to := a.From(), a.To()
	if from.BitLen() != b.From().BitLen() {
		return netipx.IPRange{}, false
	}
	if from.Less(b.From()) {
		from = b.From()
	}
	if b.To().Less(to) {
		to = b.To()
	}
	r := netipx.IPRangeFrom(from, to)
	return r, r.IsValid()
}

func rangeText(r netipx.IPRange) string {
	if p, ok := r.Prefix(); ok {
		return p.String()
	}
	return r.String()
}
