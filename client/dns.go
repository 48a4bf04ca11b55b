package client

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/hostdns"
	"masquevpn/routing"
)

// DNS configures the host's resolver while the tunnel exists. The zero value
// applies the proxy's configuration (draft-ietf-masque-connect-ip-dns-06). A
// list that is not empty replaces the proxy's.
type DNS struct {
	// Off leaves the host's resolver alone.
	Off bool

	// Hold refuses DNS queries that would leave outside a full tunnel.
	Hold bool

	// Servers are nameservers that listen on port 53.
	Servers []netip.Addr

	// Search lists the domains that the resolver appends to short names.
	Search []string

	// Domains limits the servers to these names and all names below them. "."
	// stands for all names.
	Domains []string
}

// Resolver configures the resolver of the host. *[hostdns.Manager] implements
// it.
type Resolver interface {
	// Apply replaces the settings of the tunnel. Empty settings remove them.
	// via names the mechanism of the host, "" after a removal.
	Apply(hostdns.Settings) (via string, err error)

	// Check restores settings that another program changed, and describes them
	// in restored ("": none). An error explains why they are still missing.
	Check() (restored string, err error)

	// Reaches reports whether queries to server leave through the tunnel.
	Reaches(server netip.AddrPort) bool

	// Upstream returns the nameservers that the host has without tunnels. If
	// applied is false, no tunnel changed the host's resolver.
	Upstream() (servers []netip.AddrPort, applied bool)

	// Outside returns the upstream servers that queries reach outside the
	// tunnel.
	Outside() []netip.AddrPort

	// Close restores the host's own settings.
	Close() error
}

// The most entries of each list that the resolver is given. The rest of a
// longer list is ignored.
const (
	maxServers = 16
	maxSearch  = 32
	maxDomains = 256
)

// merge returns pushed, the proxy's configurations, with d's non-empty lists in
// place of the proxy's. If d replaces a list, the result is one configuration.
func (d DNS) merge(pushed []capsule.DNSConfiguration) []capsule.DNSConfiguration {
	if len(d.Servers) == 0 && (len(pushed) == 0 || len(d.Search)+len(d.Domains) == 0) {
		return pushed
	}
	var merged capsule.DNSConfiguration
	for _, c := range pushed {
		merged.Nameservers = append(merged.Nameservers, c.Nameservers...)
		merged.SearchDomains = append(merged.SearchDomains, c.SearchDomains...)
		merged.InternalDomains = append(merged.InternalDomains, c.InternalDomains...)
	}
	if len(d.Servers) > 0 {
		merged.Nameservers = []capsule.Nameserver{{Priority: 1, Addresses: d.Servers}}
	}
	if len(d.Search) > 0 {
		merged.SearchDomains = d.Search
	}
	if len(d.Domains) > 0 {
		merged.InternalDomains = d.Domains
	}
	if len(merged.InternalDomains) == 0 {
		merged.InternalDomains = []string{hostdns.Root}
	}
	return []capsule.DNSConfiguration{merged}
}

// applyDNS configures the host's resolver with pushed, the proxy's DNS
// configurations, and the client's own. It is called once the routes are
// installed. A resolver that fails does not end the tunnel: the status and the
// log name the reason.
func (s *session) applyDNS(pushed []capsule.DNSConfiguration, nat64 []netip.Prefix) {
	c := s.c
	merged := c.cfg.DNS.merge(pushed)
	var status connectip.Status
	status.SetDNS(merged, nat64)
	now := &status.DNS
	settings, skipped := c.resolverSettings(merged, *now)
	narrowed := s.narrow(&settings)
	if c.cfg.DNS.Off && len(now.Servers) > 0 {
		now.Reason = "dns.mode is off"
	} else if r := c.resolver(); r != nil {
		via, err := r.Apply(settings) // empty settings remove the last ones
		if len(settings.Servers) == 0 && len(skipped) > 0 {
			err = errors.Join(fmt.Errorf("no route into the tunnel leads to %s",
				join(skipped)), err)
		} else if len(settings.Servers) == 0 && narrowed {
			err = errors.Join(errAllNames, err)
		}
		now.Via, now.Reason, now.Applied = via, reason(err), err == nil && via != ""
		if now.Applied && narrowed { // the status shows the resolver's settings
			now.Search, now.Domains = settings.Search, settings.Domains
		}
	}
	c.mu.Lock()
	before := c.status.DNS
	c.status.DNS = *now
	c.mu.Unlock()
	if len(skipped) > 0 && !slices.Equal(skipped, s.skippedServers) {
		c.cfg.Logger.Warn("nameservers without a route into the tunnel are not used",
			"servers", skipped)
	}
	s.skippedServers = skipped
	c.logDNS(before, *now, narrowed)
}

// logDNS logs that the DNS status has changed from before to now. narrowed
// reports whether narrow limited the names of the proxy's nameservers.
func (c *Client) logDNS(before, now connectip.DNSStatus, narrowed bool) {
	switch {
	case now.Applied && !(before.Applied && slices.Equal(before.Servers, now.Servers) &&
		slices.Equal(before.Search, now.Search) && slices.Equal(before.Domains, now.Domains)):
		c.cfg.Logger.Info("DNS is applied", "via", now.Via, "servers", now.Servers, "search",
			now.Search, "domains", now.Domains)
		if narrowed {
			c.cfg.Logger.Warn("the proxy's nameservers are asked only about these domains",
				"domains", now.Domains, "reason", errAllNames)
		}
	case now.Reason != "" && now.Reason != before.Reason && !c.cfg.DNS.Off:
		c.cfg.Logger.Warn("DNS is not applied", "servers", now.Servers, "reason", now.Reason)
	case before.Applied && !now.Applied:
		c.cfg.Logger.Info("DNS is no longer applied")
	}
}

// noticeDNS is the key of the warning about DNS queries outside the tunnel.
const noticeDNS = "dns"

// noteDNSOutside warns, in the log and in the status, about nameservers that
// this host asks outside a full tunnel.
func (c *Client) noteDNSOutside() {
	c.notingMu.Lock()
	defer c.notingMu.Unlock()
	c.mu.Lock()
	state, dns := c.lastState, c.status.DNS
	c.mu.Unlock()
	text := ""
	if r := c.resolver(); r != nil && state != nil &&
		(routing.IsFull(state.Routes, false) || routing.IsFull(state.Routes, true)) &&
		!(dns.Applied && slices.Contains(dns.Domains, hostdns.Root)) {
		if servers := r.Outside(); len(servers) > 0 {
			text = c.outsideText(join(servers), dns)
		}
	}
	if text != "" && text != c.loggedOutside {
		c.cfg.Logger.Warn("DNS queries outside a full tunnel", "reason", text)
	}
	c.loggedOutside = text
	c.warn(noticeDNS, text)
}

// outsideText describes what happens to queries to servers, which are outside
// the tunnel, and why the tunnel's nameservers do not get these queries.
func (c *Client) outsideText(servers string, dns connectip.DNSStatus) string {
	why := "the proxy hands out no nameservers"
	switch {
	case dns.Applied:
		why = "the tunnel's nameservers are for some names alone"
	case dns.Reason != "":
		why = dns.Reason
	}
	const remedy = "set dns.servers to nameservers in the tunnel"
	switch {
	case c.cfg.DNS.Hold:
		return fmt.Sprintf("DNS queries to %s are refused, because they would leave outside the "+
			"tunnel (%s): %s", servers, why, remedy)
	case c.cfg.KillSwitch != nil:
		return fmt.Sprintf("DNS queries to %s leave outside the tunnel, in the clear, as far as "+
			"kill_switch.allow lets them (%s): %s", servers, why, remedy)
	}
	return fmt.Sprintf("DNS queries to %s leave outside the tunnel, in the clear (%s): %s, or "+
		"dns.outside = false to have them refused", servers, why, remedy)
}

// errAllNames is the reason why narrow keeps the proxy's nameservers from being
// asked about all names.
var errAllNames = errors.New("the proxy's nameservers are for all names, but not all traffic " +
	"goes through the tunnel: to use them for all names, set dns.domains to [\".\"]")

// narrow limits the proxy's nameservers in a split tunnel to the domains that
// the proxy lists or, if it lists none, to its search domains. A proxy that
// carries only some networks must neither learn nor answer all of this host's
// queries. dns.servers and dns.domains of the configuration prevent the limit.
// narrow reports whether it changed settings.
func (s *session) narrow(settings *hostdns.Settings) bool {
	d := s.c.cfg.DNS
	if s.full || len(settings.Servers) == 0 || len(d.Servers)+len(d.Domains) > 0 {
		return false
	}
	listed := slices.DeleteFunc(slices.Clone(settings.Domains), func(name string) bool {
		return name == hostdns.Root
	})
	all := len(listed) < len(settings.Domains)
	if len(listed) == 0 && all {
		listed = settings.Search
	}
	below := func(name string) bool {
		return slices.ContainsFunc(listed, func(domain string) bool {
			return name == domain || strings.HasSuffix(name, "."+domain)
		})
	}
	search := settings.Search
	if len(d.Search) == 0 {
		search = slices.DeleteFunc(slices.Clone(search), func(name string) bool {
			return !below(name)
		})
	}
	narrowed := all || len(search) < len(settings.Search)
	settings.Domains, settings.Search = listed, search
	if len(listed) == 0 {
		*settings = hostdns.Settings{}
	}
	return narrowed
}

// resolverSettings returns the resolver's settings for the configurations,
// whose domains are in status. It skips servers that queries would not reach
// through the tunnel.
func (c *Client) resolverSettings(configurations []capsule.DNSConfiguration,
	status connectip.DNSStatus) (settings hostdns.Settings, skipped []netip.AddrPort) {
	r := c.resolver()
	if c.cfg.DNS.Off || r == nil {
		return settings, nil
	}
	for _, a := range connectip.Nameservers(configurations) {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		switch {
		case slices.Contains(settings.Servers, a) || slices.Contains(skipped, a):
		case len(settings.Servers)+len(skipped) == maxServers:
			return settings, skipped
		case a.Addr().IsGlobalUnicast() && !c.isOwn(a.Addr()) && r.Reaches(a):
			settings.Servers = append(settings.Servers, a)
		default:
			skipped = append(skipped, a)
		}
	}
	settings.Search = status.Search[:min(len(status.Search), maxSearch)]
	settings.Domains = status.Domains[:min(len(status.Domains), maxDomains)]
	return settings, skipped
}

// join formats servers as a list for users. It omits port 53.
func join(servers []netip.AddrPort) string {
	words := make([]string, len(servers))
	for i, a := range servers {
		words[i] = a.String()
		if a.Port() == 53 {
			words[i] = a.Addr().String()
		}
	}
	return strings.Join(words, ", ")
}

// reason returns the text of err in one line, "" for nil.
func reason(err error) string {
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}

// upstream returns the nameservers that the host has without tunnels. If
// applied is false, the host's resolver can be asked instead.
func (c *Client) upstream() (servers []netip.AddrPort, applied bool) {
	r := c.resolver()
	if r == nil {
		return nil, false
	}
	return r.Upstream()
}
