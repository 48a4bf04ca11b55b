package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"go4.org/netipx"
	"golang.org/x/time/rate"

	"masquevpn/capsule"
	"masquevpn/routing"
)

// sites knows which networks are behind which session. What sessions say is
// only noted when it comes in; one goroutine works out who has what (decide),
// as often as it likes, and the sessions follow.
type sites struct {
	table   *table
	changed chan struct{} // something was noted since the last decision

	mu     sync.Mutex
	rights map[string]*rights // key: user
	base   int                // how many routes are advertised to all clients
	last   uint64             // rank and number that were given out last
	claims []*claim           // in order of precedence
	routed map[netip.Prefix]*ipSession
	all    *netipx.IPSet // the networks and the leased addresses of all sites
}

// claim is one session of a site: what it asks for, and what it has.
type claim struct {
	ss     *ipSession
	rights *rights // nil when they were taken away
	// rank is the place of the user among all: who came first keeps what it
	// has. A user has one place as long as any session of it runs, and of these
	// the newest goes first.
	rank, number uint64
	successor    *claim // claim of the session that replaces this one; nil: none

	told       bool // the session said something
	advertised []capsule.Route
	assigned   []netip.Prefix
	leased     []netip.Prefix // addresses of the session itself
	has        holding

	log     *rate.Limiter
	logged  string // what was last said of the holding
	refusal string // and of what was refused
}

func newSites(t *table, r map[string]*rights) *sites {
	return &sites{table: t, rights: r, changed: make(chan struct{}, 1),
		routed: make(map[netip.Prefix]*ipSession), all: new(netipx.IPSet)}
}

func (c *claim) user() string { return c.ss.user.Name }

// rightsOf returns the rights of a user, nil for one without site.
func (t *sites) rightsOf(user string) *rights {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rights[user]
}

// setRights replaces the rights of all users, also of those who have sessions.
func (t *sites) setRights(all map[string]*rights) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rights = all
	for _, c := range t.claims {
		c.rights = all[c.user()]
	}
	t.note()
}

// newClaim makes the claim of a session that is about to be taken in.
func newClaim(ss *ipSession) *claim {
	return &claim{
		ss: ss, has: holding{networks: new(netipx.IPSet)},
		log: rate.NewLimiter(rate.Every(time.Minute), 10),
	}
}

// add adds c, the claim of a session. c succeeds replaced, the claims of the
// sessions that it replaces.
func (t *sites) add(c *claim, replaced []*claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.rights = t.rights[c.user()]
	t.last++
	c.rank, c.number = t.last, t.last
	for _, other := range t.claims {
		if other.user() == c.user() {
			c.rank = other.rank
		}
	}
	for _, old := range replaced {
		old.successor = c
	}
	t.claims = append(t.claims, c)
	slices.SortFunc(t.claims, func(a, b *claim) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), -cmp.Compare(a.number, b.number))
	})
}

// remove takes out a session that has ended: no packet goes to it any more.
// What it had goes to its successor, so that nobody notices when a client only
// came back, and otherwise back.
func (t *sites) remove(c *claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.claims = slices.DeleteFunc(t.claims, func(other *claim) bool { return other == c })
	heir := c.successor
	if heir != nil && (heir.told || !slices.Contains(t.claims, heir)) {
		heir = nil
	}
	for p, ss := range t.routed {
		switch {
		case ss != c.ss:
		case heir != nil:
			t.routed[p] = heir.ss
			t.table.insert(p, heir.ss)
		default:
			delete(t.routed, p)
			t.table.remove(p)
		}
	}
	if heir != nil {
		heir.advertised, heir.assigned, heir.has = c.advertised, c.assigned, c.has
		heir.logged, heir.refusal = c.logged, c.refusal
	}
	t.note()
}

// setBase notes how many routes are advertised to all clients: sites are told
// of them besides each other's networks.
func (t *sites) setBase(routes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.base = routes
}

// note has the next decision made. t.mu may be held.
func (t *sites) note() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// advertise notes what c advertises, the full list.
func (t *sites) advertise(c *claim, routes []capsule.Route) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.advertised, c.told = routes, true
	t.note()
}

// assign notes what c assigns to the proxy, the full list.
func (t *sites) assign(c *claim, addrs []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.assigned = addrs
	t.note()
}

// lease notes which addresses the session of c has.
func (t *sites) lease(c *claim, addrs []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.leased = addrs
	t.note()
}

// heldRoutes returns the part of routes that c has already.
func (t *sites) heldRoutes(c *claim, routes []capsule.Route) []capsule.Route {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []capsule.Route
	for _, r := range routes[:min(len(routes), maxSiteRanges)] {
		for _, held := range c.has.networks.Ranges() {
			if part, ok := intersection(netipx.IPRangeFrom(r.Start, r.End), held); ok {
				out = append(out, capsule.Route{Start: part.From(), End: part.To(),
					Protocol: r.Protocol})
			}
		}
	}
	return out
}

// heldAddresses returns the part of addrs that c has assigned already.
func (t *sites) heldAddresses(c *claim, addrs []capsule.Address) []capsule.Address {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(addrs), func(a capsule.Address) bool {
		return !slices.Contains(c.has.assigned, a.Prefix)
	})
}

// held returns what c has.
func (t *sites) held(c *claim) holding {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.has
}

// layout is the outcome of a decision.
type layout struct {
	networks  []netip.Prefix // networks of all sites
	addresses []netip.Prefix // addresses of the proxy, as long as the networks that they are in
	leased    []netip.Prefix // addresses of the sites' sessions
}

// decide works out who has what, and makes the table follow.
func (t *sites) decide(all []taken) layout {
	t.mu.Lock()
	var l layout
	var b netipx.IPSetBuilder
	routed := make(map[netip.Prefix]*ipSession)
	var logs []func()
	room := routing.MaxRoutes - t.base
	for i, c := range t.claims {
		c.has = c.decide(all, t.claims[:i], room)
		room -= len(c.has.prefixes)
		logs = append(logs, c.report()...)
		for _, p := range c.has.prefixes {
			routed[p] = c.ss
			l.networks = append(l.networks, p)
		}
		for _, a := range c.has.assigned {
			l.addresses = append(l.addresses, c.onLink(a))
		}
		for _, a := range c.leased {
			l.leased = append(l.leased, a)
			b.AddPrefix(a)
		}
		b.AddSet(c.has.networks)
	}
	t.all, _ = b.IPSet() // the prefixes are valid
	for p, ss := range routed {
		if t.routed[p] != ss {
			t.table.insert(p, ss)
		}
	}
	for p := range t.routed {
		if routed[p] == nil {
			t.table.remove(p)
		}
	}
	t.routed = routed
	t.mu.Unlock()
	for _, log := range logs {
		log()
	}
	return l
}

// onLink returns the address a of the proxy with the length of the site's
// network that it is in, which makes it the source of what the proxy itself
// sends there.
func (c *claim) onLink(a netip.Prefix) netip.Prefix {
	for _, p := range c.has.prefixes {
		if p.Contains(a.Addr()) {
			return netip.PrefixFrom(a.Addr(), p.Bits())
		}
	}
	return a
}

// report returns what is to be written to the log of a new decision. What a
// client says again and again is not.
func (c *claim) report() (logs []func()) {
	log := c.ss.log
	if text := prefixText(slices.Concat(c.has.prefixes, c.has.assigned)); text != c.logged &&
		c.log.Allow() {
		c.logged = text
		logs = append(logs, func() { log.Info("networks of the site", "accepted", text) })
	}
	if text := strings.Join(c.has.refused, "; "); text != c.refusal && c.log.Allow() {
		c.refusal = text
		if text != "" {
			logs = append(logs, func() {
				log.Warn("networks of the site are refused", "refused", text)
			})
		}
	}
	return logs
}

// prefixText lists prefixes for the log.
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

// routesTo returns what is advertised to c: of base, and of the networks and
// addresses of the other sites, what it may reach by the rights of its site and
// as its user, which is what may has, nil for all; and of base the proxy's own
// addresses.
func (t *sites) routesTo(c *claim, base []capsule.Route, may *netipx.IPSet,
	own []netip.Addr) ([]capsule.Route, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b netipx.IPSetBuilder
	b.AddSet(t.all)
	for _, other := range t.claims {
		if other.user() == c.user() {
			b.RemoveSet(other.has.networks)
			for _, a := range other.leased {
				b.RemovePrefix(a)
			}
		}
	}
	var always []netip.Addr
	for _, r := range base {
		addresses := netipx.IPRangeFrom(r.Start, r.End)
		b.AddRange(addresses)
		for _, a := range own {
			if addresses.Contains(a) {
				always = append(always, a)
			}
		}
	}
	if c.rights != nil && c.rights.reach != nil {
		b.Intersect(c.rights.reach)
	}
	if may != nil {
		b.Intersect(may)
	}
	for _, a := range always {
		b.Add(a)
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, err
	}
	routes := []capsule.Route{}
	for _, r := range set.Ranges() {
		routes = append(routes, capsule.Route{Start: r.From(), End: r.To()})
	}
	return routes, nil
}
