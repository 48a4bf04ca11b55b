package proxy

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go4.org/netipx"
	"golang.org/x/time/rate"

	"masquevpn/capsule"
	"masquevpn/routing"
)

const (
	// maxSiteRanges is the number of ranges of one advertisement that are
	// accepted.
	maxSiteRanges = 256

	// maxSitePrefixes is the number of prefixes, and so of kernel routes, that
	// the networks of one site may have.
	maxSitePrefixes = 1024

	// maxRefusals is the number of refusals of one decision that are logged.
	maxRefusals = 5
)

// claim holds the networks and addresses that one session of a site asks for,
// and the granted part of them.
type claim struct {
	owner owner

	// route makes a network lead to the session in the forwarding table.
	route func(netip.Prefix)

	// session and log are the ID and the log of the session. They are set
	// before the claim is added to the sites.
	session string
	log     *slog.Logger

	// The fields below are guarded by sites.mu.

	// rights are the rights of the owner; nil after they were taken away.
	rights *rights

	// Claims with lower ranks take precedence. All sessions of an owner have
	// the same rank, so it keeps its networks while any of its sessions runs.
	// Among them the claim with the higher number, the newer one, takes
	// precedence.
	rank, number uint64

	// successor is the claim of the session that replaces this one; nil: none.
	successor *claim

	// updated is set once the client has advertised routes. Before that, the
	// claim inherits from the claim that it succeeds.
	updated bool

	advertised []capsule.Route // the client's last full list
	assigned   []netip.Prefix  // addresses for the proxy, the client's last full list
	leased     []netip.Prefix  // addresses of the session itself
	granted    grant

	logLimit *rate.Limiter // limits the log lines about the claim

	// loggedGrant and loggedRefusals are the texts that were logged last.
	loggedGrant, loggedRefusals string
}

// newClaim returns the claim of a session of o, which asks for nothing yet.
func newClaim(o owner, route func(netip.Prefix)) *claim {
	return &claim{
		owner: o, route: route, granted: grant{networks: new(netipx.IPSet)},
		logLimit: rate.NewLimiter(rate.Every(time.Minute), 10),
	}
}

// isPair reports whether c is the claim of a peer.
func (c *claim) isPair() bool { return c.owner.isPair() }

// place returns the word for the place of the networks, for the log.
func (c *claim) place() string {
	if c.isPair() {
		return "peer"
	}
	return "site"
}

// reservedNetwork is a network that no site can have.
type reservedNetwork struct {
	prefix netip.Prefix
	name   string // for messages: "a network of the proxy's host"
}

// grant is the granted part of a claim.
type grant struct {
	routes   []capsule.Route
	networks *netipx.IPSet  // the addresses in routes
	prefixes []netip.Prefix // networks as prefixes
	assigned []netip.Prefix // single addresses assigned to the proxy
	refusals []string       // the parts that are not granted, with reasons
}

// decide returns the grant for c, after the claims with higher precedence
// (earlier) and the networks already in use (reserved). room is the number of
// prefixes that the routes of all clients have left.
func (c *claim) decide(reserved []reservedNetwork, earlier []*claim, room int) grant {
	g := grant{networks: new(netipx.IPSet)}
	if c.rights == nil {
		return g
	}
	siteRoom := maxSitePrefixes
	for _, e := range earlier {
		if e.owner == c.owner {
			siteRoom -= len(e.granted.prefixes)
		}
	}
	var networks netipx.IPSetBuilder
	for i, r := range c.advertised {
		if i == maxSiteRanges {
			g.refuse("%d more: only %d ranges are accepted", len(c.advertised)-i, maxSiteRanges)
			break
		}
		advertised := netipx.IPRangeFrom(r.Start, r.End)
		var outside netipx.IPSetBuilder // the part that is in no network of the site
		outside.AddRange(advertised)
		for _, n := range c.rights.networks {
			part, ok := intersection(advertised, netipx.RangeOfPrefix(n))
			if !ok {
				continue
			}
			outside.RemoveRange(part)
			if reason := c.conflict(part, reserved, earlier); reason != "" {
				g.refuse("%s overlaps %s", rangeText(part), reason)
				continue
			}
			n := len(part.Prefixes())
			if siteRoom -= n; siteRoom < 0 {
				g.refuse("%s: the networks of a site may make %d prefixes", rangeText(part),
					maxSitePrefixes)
				continue
			}
			if room -= n; room < 0 {
				g.refuse("%s: the advertised networks may make %d prefixes in all",
					rangeText(part), routing.MaxRoutes)
				continue
			}
			g.routes = append(g.routes,
				capsule.Route{Start: part.From(), End: part.To(), Protocol: r.Protocol})
			networks.AddRange(part)
		}
		if s, err := outside.IPSet(); err != nil || len(s.Ranges()) > 0 {
			g.refuse("%s is not within the networks of its %s", rangeText(advertised),
				c.owner.table())
		}
	}
	g.networks, _ = networks.IPSet() // the ranges are valid
	g.prefixes = g.networks.Prefixes()
	for i, a := range c.assigned {
		switch reason := c.conflict(netipx.RangeOfPrefix(a), reserved, earlier); {
		case c.isPair():
			g.refuse("address %v: a peer assigns none", a)
		case i >= maxAddresses:
			g.refuse("address %v: a site may assign %d", a, maxAddresses)
		case !a.IsSingleIP():
			g.refuse("%v, which it assigns, is not a single address", a)
		case !c.rights.assign.ContainsPrefix(a):
			g.refuse("address %v is not within the networks of its %s", a.Addr(), c.owner.table())
		case reason != "":
			g.refuse("address %v is within %s", a.Addr(), reason)
		default:
			g.assigned = append(g.assigned, a)
		}
	}
	return g
}

// refuse adds a refusal, up to maxRefusals.
func (g *grant) refuse(format string, args ...any) {
	switch len(g.refusals) {
	case maxRefusals:
		g.refusals = append(g.refusals, "and more")
	case maxRefusals + 1:
	default:
		g.refusals = append(g.refusals, fmt.Sprintf(format, args...))
	}
}

// conflict names the reserved or granted network that r overlaps, which c
// cannot have for that reason. It returns "" if there is none.
func (c *claim) conflict(r netipx.IPRange, reserved []reservedNetwork, earlier []*claim) string {
	for _, n := range reserved {
		if r.Overlaps(netipx.RangeOfPrefix(n.prefix)) {
			return fmt.Sprintf("%v, %s", n.prefix, n.name)
		}
	}
	for _, e := range earlier {
		overlaps := e.granted.networks.OverlapsRange(r) ||
			slices.ContainsFunc(e.granted.assigned, func(a netip.Prefix) bool {
				return r.Contains(a.Addr())
			})
		switch {
		case !overlaps:
		case e.owner == c.owner:
			return "a network of the newer session " + e.session + " of the same " + e.owner.noun()
		default:
			return "the networks of " + e.owner.String()
		}
	}
	return ""
}

// onLink returns the proxy's address a with the prefix length of the site's
// network that contains it. The kernel then uses the address as the source of
// the proxy's own packets to that network.
func (c *claim) onLink(a netip.Prefix) netip.Prefix {
	for _, p := range c.granted.prefixes {
		if p.Contains(a.Addr()) {
			return netip.PrefixFrom(a.Addr(), p.Bits())
		}
	}
	return a
}

// report returns functions that log a changed decision. It limits the lines
// that a client can cause.
func (c *claim) report() (logs []func()) {
	accepted := prefixText(slices.Concat(c.granted.prefixes, c.granted.assigned))
	if accepted != c.loggedGrant && c.logLimit.Allow() {
		c.loggedGrant = accepted
		logs = append(logs, func() {
			c.log.Info("networks of the "+c.place(), "accepted", accepted)
		})
	}
	refused := strings.Join(c.granted.refusals, "; ")
	if refused != c.loggedRefusals && c.logLimit.Allow() {
		c.loggedRefusals = refused
		if refused != "" {
			logs = append(logs, func() {
				c.log.Warn("networks of the "+c.place()+" are refused", "refused", refused)
			})
		}
	}
	return logs
}

// prefixText lists the first prefixes for the log.
func prefixText(prefixes []netip.Prefix) string {
	const limit = 16
	var words []string
	for _, p := range prefixes[:min(len(prefixes), limit)] {
		words = append(words, p.String())
	}
	if len(prefixes) > limit {
		words = append(words, "and more")
	}
	return strings.Join(words, ", ")
}

// intersection returns the range of the addresses in both a and b, and whether
// there are any.
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

// rangeText returns r as a prefix if it is one, or else as a range.
func rangeText(r netipx.IPRange) string {
	if p, ok := r.Prefix(); ok {
		return p.String()
	}
	return r.String()
}
