package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/hostdns"
	"masquevpn/routing"
)

// DNS says what the host's resolver is told while the tunnel is there. The zero
// value is what the proxy says (draft-ietf-masque-connect-ip-dns-06). Lists
// that are not empty count in place of the proxy's.
type DNS struct {
	Off     bool // nothing
	Hold    bool // queries that would leave outside a full tunnel are refused
	Servers []netip.Addr
	Search  []string // domains that are tried behind short names
	Domains []string // what the servers resolve, with all names below; "." for all names
}

// Resolver is the host's; *hostdns.Manager is one.
type Resolver interface {
	Apply(hostdns.Settings) (via string, err error)
	Check() (restored string, err error)                // restored: changes of other programs that it took back
	Reaches(server netip.AddrPort) bool                 // through the tunnel
	Upstream() (servers []netip.AddrPort, applied bool) // besides the tunnel's
	// those of them that queries reach outside the tunnel
	Outside() []netip.AddrPort
	Close() error
}

// Limits on what the resolver is told. What is beyond is left out.
const (
	maxServers = 16
	maxSearch  = 32
	maxDomains = 256
)

// over returns what of pushed, which the proxy said, is left of it when d has
// its say.
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

// applyDNS has the host's resolver follow what is said about DNS, once the
// routes are there. A resolver that cannot be told does not end the tunnel: the
// status and the log say so.
func (s *session) applyDNS(pushed []capsule.DNSConfiguration, nat64 []netip.Prefix) {
	c := s.c
	said := c.cfg.DNS.merge(pushed)
	var told connectip.Status
	told.SetDNS(said, nat64)
	settings, skipped := c.usable(said, told.DNS)
	narrowed := s.narrow(&settings)
	if c.cfg.DNS.Off && len(told.DNS.Servers) > 0 {
		told.DNS.Reason = "dns.mode is off"
	} else if r := c.resolver(); r != nil {
		via, err := r.Apply(settings) // empty settings where there is nothing to apply
		if len(settings.Servers) == 0 && len(skipped) > 0 {
			err = errors.Join(fmt.Errorf("no route into the tunnel leads to %s",
				join(skipped)), err)
		} else if len(settings.Servers) == 0 && narrowed {
			err = errors.Join(errAllNames, err)
		}
		told.DNS.Via, told.DNS.Reason, told.DNS.Applied = via, reason(err), err == nil && via != ""
		if told.DNS.Applied && narrowed { // as the resolver was told
			told.DNS.Search, told.DNS.Domains = settings.Search, settings.Domains
		}
	}
	c.mu.Lock()
	before := c.status.DNS
	c.status.DNS = told.DNS
	c.mu.Unlock()
	if len(skipped) > 0 && !slices.Equal(skipped, s.skippedServers) {
		c.cfg.Logger.Warn("nameservers that no route into the tunnel leads to are not used",
			"servers", skipped)
	}
	s.skippedServers = skipped
	switch now := told.DNS; {
	case now.Applied && !(before.Applied && slices.Equal(before.Servers, now.Servers) &&
		slices.Equal(before.Search, now.Search) && slices.Equal(before.Domains, now.Domains)):
		c.cfg.Logger.Info("DNS is applied", "via", now.Via, "servers", now.Servers, "search",
			now.Search, "domains", now.Domains)
		if narrowed {
			c.cfg.Logger.Warn("the proxy's nameservers are asked about these domains alone",
				"domains", now.Domains, "reason", errAllNames)
		}
	case now.Reason != "" && now.Reason != before.Reason && !c.cfg.DNS.Off:
		c.cfg.Logger.Warn("DNS is not applied", "servers", now.Servers, "reason", now.Reason)
	case before.Applied && !now.Applied:
		c.cfg.Logger.Info("DNS is not applied any more")
	}
}

// noticeDNS is the key of the warning about names that are asked outside the
// tunnel.
const noticeDNS = "dns"

// noteDNSOutside says, in the log and in the status, whom this host asks for names
// outside a tunnel for everything.
func (c *Client) noteDNSOutside() {
	c.noting.Lock()
	defer c.noting.Unlock()
	c.mu.Lock()
	state, told := c.lastState, c.status.DNS
	c.mu.Unlock()
	text := ""
	if r := c.resolver(); r != nil && state != nil &&
		(routing.IsFull(state.Routes, false) || routing.IsFull(state.Routes, true)) &&
		!(told.Applied && slices.Contains(told.Domains, hostdns.Root)) {
		if servers := r.Outside(); len(servers) > 0 {
			text = c.outside(join(servers), told)
		}
	}
	if text != "" && text != c.loggedOutside {
		c.cfg.Logger.Warn("DNS beside a full tunnel", "reason", text)
	}
	c.loggedOutside = text
	c.warn(noticeDNS, text)
}

// outside says what becomes of queries to servers outside the tunnel, and why
// it has none for them.
func (c *Client) outside(servers string, told connectip.DNSStatus) string {
	why := "the proxy hands out no nameservers"
	switch {
	case told.Applied:
		why = "the tunnel's nameservers are for some names alone"
	case told.Reason != "":
		why = told.Reason
	}
	const remedy = "set dns.servers to nameservers in the tunnel"
	switch {
	case c.cfg.DNS.Hold:
		return fmt.Sprintf("DNS queries to %s are refused, because they would leave outside the tunnel (%s): %s", servers, why, remedy)
	case c.cfg.KillSwitch != nil:
		return fmt.Sprintf("DNS queries to %s leave outside the tunnel, in the clear, as far as kill_switch.allow lets them (%s): %s", servers, why, remedy)
	}
	return fmt.Sprintf("DNS queries to %s leave outside the tunnel, in the clear (%s): %s, or dns.outside = false to have them refused", servers, why, remedy)
}

// errAllNames is why the proxy's nameservers are not asked about all names.
var errAllNames = errors.New("the proxy's nameservers are for all names, and not all traffic goes through the tunnel: to ask them about all, set dns.domains to [\".\"]")

// narrow takes all names from the nameservers of the proxy in a tunnel that
// does not carry everything, unless the configuration gives them all names: who
// is asked for some networks shall not hear of, nor answer for, all others.
// What is left are the domains that the proxy lists, or those that it has tried
// behind short names, where it lists none. It reports whether something was
// taken.
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

// usable returns what of DNS the resolver is told. Servers that queries would
// not reach through the tunnel are skipped: they would be asked outside.
func (c *Client) usable(said []capsule.DNSConfiguration,
	status connectip.DNSStatus) (settings hostdns.Settings, skipped []netip.AddrPort) {
	r := c.resolver()
	if c.cfg.DNS.Off || r == nil {
		return settings, nil
	}
	for _, a := range connectip.Nameservers(said) {
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

func reason(err error) string {
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}

// upstream returns the nameservers of the host besides the tunnel's. applied is
// false while they are those of its resolver.
func (c *Client) upstream() (servers []netip.AddrPort, applied bool) {
	r := c.resolver()
	if r == nil {
		return nil, false
	}
	return r.Upstream()
}

// maxUpstream is how many nameservers are asked for the proxy's name.
const maxUpstream = 3

// lookup finds the addresses of a name, of a network as net.Resolver has it,
// outside the tunnel, so that a dead tunnel can be dialed again. While the
// host's resolver asks through the tunnel, the servers that it has besides are
// asked in turn.
func (d *dialer) lookup(ctx context.Context, network, name string) ([]netip.Addr, error) {
	var servers []netip.AddrPort
	applied := false
	if d.upstream != nil {
		servers, applied = d.upstream()
	}
	if !applied {
		return d.resolver.LookupNetIP(ctx, network, name)
	}
	err := errors.New("this host has no nameservers besides those of the tunnel")
	servers = servers[:min(len(servers), maxUpstream)]
	deadline, _ := ctx.Deadline()
	for i, server := range servers {
		each, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(servers)-i))
		var found []netip.Addr
		dial := func(ctx context.Context, transport, _ string) (net.Conn, error) {
			return (&net.Dialer{Control: d.control}).DialContext(ctx, transport, server.String())
		}
		found, err = (&net.Resolver{PreferGo: true, Dial: dial}).LookupNetIP(each, network, name)
		cancel()
		var answer *net.DNSError
		if err == nil || errors.As(err, &answer) && answer.IsNotFound {
			return found, err
		}
	}
	return nil, err
}
