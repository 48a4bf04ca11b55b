package proxy

import (
	"net/netip"
	"reflect"

	"go4.org/netipx"

	"masquevpn/capsule"
)

// DNS has the DNS settings that are pushed to clients
// (draft-ietf-masque-connect-ip-dns-06). The zero value pushes none.
type DNS struct {
	// Servers are servers for unencrypted DNS, in the order of preference.
	Servers []netip.Addr

	// Domains are the domains that the servers resolve, each with its
	// subdomains. If there are none, the servers resolve all names.
	Domains []string

	// Search has the search domains.
	Search []string

	// NAT64 has the prefixes of translators (RFC 6052 section 2.2).
	NAT64 []netip.Prefix
}

// Limits on DNS. Within them the settings fit in capsules that any peer
// accepts.
const (
	maxServers = 16
	maxDomains = 32 // for Domains and for Search
	maxNAT64   = 16
)

// check returns an *Error if d cannot be pushed.
func (d DNS) check() error {
	switch {
	case len(d.Servers) > maxServers:
		return usage("dns.servers", "%d are too many, at most %d are possible", len(d.Servers),
			maxServers)
	case len(d.Search) > maxDomains:
		return usage("dns.search", "%d are too many, at most %d are possible", len(d.Search),
			maxDomains)
	case len(d.Domains) > maxDomains:
		return usage("dns.domains", "%d are too many, at most %d are possible", len(d.Domains),
			maxDomains)
	case len(d.NAT64) > maxNAT64:
		return usage("dns.nat64", "%d are too many, at most %d are possible", len(d.NAT64),
			maxNAT64)
	case len(d.Servers) == 0 && len(d.Search)+len(d.Domains) > 0:
		return usage("dns.servers", "there are domains, but no servers to resolve names in them")
	}
	if err := (&capsule.DNSAssign{Configurations: d.configurations()}).Validate(); err != nil {
		return usage("dns", "%v", err)
	}
	if err := (&capsule.PREF64{Prefixes: d.NAT64}).Validate(); err != nil {
		return usage("dns.nat64", "%v", err)
	}
	return nil
}

// configurations returns d for a DNS_ASSIGN capsule. All servers are for the
// same domains.
func (d DNS) configurations() []capsule.DNSConfiguration {
	if len(d.Servers) == 0 {
		return nil
	}
	c := capsule.DNSConfiguration{InternalDomains: d.Domains, SearchDomains: d.Search}
	for i, a := range d.Servers {
		c.Nameservers = append(c.Nameservers,
			capsule.Nameserver{Priority: uint16(i + 1), Addresses: []netip.Addr{a}})
	}
	if len(d.Domains) == 0 {
		c.InternalDomains = []string{""} // the root
	}
	return []capsule.DNSConfiguration{c}
}

// SetDNS changes the DNS settings and pushes them to connected clients. An
// error because of d is an *Error of KindUsage; the settings stay as they were
// then.
func (s *Server) SetDNS(d DNS) error {
	if err := d.check(); err != nil {
		return err
	}
	if old := s.dns.Swap(&d); reflect.DeepEqual(*old, d) {
		return nil
	}
	select {
	case <-s.ready: // denied destinations depend on the NAT64 prefixes
		if err := s.host.refresh(); err != nil {
			return err
		}
	default:
	}
	s.warnOfDNS()
	for _, ss := range s.sessions.list() {
		ss.notify()
	}
	return nil
}

// warnOfDNS warns about servers and NAT64 prefixes that clients cannot reach
// through the tunnel: queries would bypass the tunnel or be refused.
func (s *Server) warnOfDNS() {
	routes, err := s.access.routes(nil, nil, 0, s.pool.Serves)
	if err != nil {
		return // reported when routes are advertised
	}
	var advertised, denied netipx.IPSetBuilder
	for _, r := range routes {
		advertised.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	for _, p := range s.access.deniedNow().clients {
		denied.AddPrefix(p)
	}
	reached, _ := advertised.IPSet() // all addresses are valid
	refused, _ := denied.IPSet()
	d := s.dns.Load()
	for _, a := range d.Servers {
		switch {
		case !reached.Contains(a):
			s.cfg().Logger.Warn("clients do not reach this DNS server through the tunnel: "+
				"add it to routes.advertise, and its family to the pool", "server", a)
		case refused.Contains(a):
			s.cfg().Logger.Warn("clients may not reach this DNS server, it is an address of "+
				"this host or denied: use the proxy's own address in the pool, or change "+
				"routes.deny", "server", a)
		}
	}
	for _, p := range d.NAT64 {
		if !reached.ContainsPrefix(p) {
			s.cfg().Logger.Warn("clients do not reach this NAT64 prefix through the tunnel: "+
				"add it to routes.advertise, and IPv6 to the pool", "prefix", p)
		}
	}
}
