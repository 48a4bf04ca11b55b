package proxy

import (
	"net/netip"
	"reflect"

	"go4.org/netipx"

	"masquevpn/capsule"
)

// DNS is what clients are told about name resolution
// (draft-ietf-masque-connect-ip-dns-06). The zero value tells them nothing.
type DNS struct {
	Servers []netip.Addr   // servers of unencrypted DNS, the preferred one first
	Domains []string       // what the servers resolve, with all names below; none: all names
	Search  []string       // search domains
	NAT64   []netip.Prefix // prefixes of NAT64 (RFC 6052 section 2.2)
}

// Limits on DNS. Within them all of it fits in capsules that any peer takes.
const (
	maxServers = 16
	maxDomains = 32 // domains of each kind
	maxNAT64   = 16
)

// check returns what is wrong with d, as an *Error.
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

// configurations is d as it goes into a capsule: the servers by falling
// preference, and all for the same names.
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

// SetDNS changes what clients are told about name resolution; those that are
// connected learn of it at once. The error, if any, is an *Error of KindUsage,
// and all stays as it was.
func (s *Server) SetDNS(d DNS) error {
	if err := d.check(); err != nil {
		return err
	}
	if old := s.dns.Swap(&d); reflect.DeepEqual(*old, d) {
		return nil
	}
	select {
	case <-s.ready: // what is denied depends on the prefixes of NAT64
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

// warnOfDNS says what clients are told to ask and cannot reach through the
// tunnel: their queries would leave outside of it, or be refused.
func (s *Server) warnOfDNS() {
	routes, err := s.access.routes(nil, nil, 0, s.pool.Serves)
	if err != nil {
		return // it is reported where routes are advertised
	}
	var advertised, denied netipx.IPSetBuilder
	for _, r := range routes {
		advertised.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	for _, p := range s.access.deniedNow().clients {
		denied.AddPrefix(p)
	}
	reached, _ := advertised.IPSet() // the error is for invalid addresses
	refused, _ := denied.IPSet()
	d := s.dns.Load()
	for _, a := range d.Servers {
		switch {
		case !reached.Contains(a):
			s.cfg().Logger.Warn("clients do not reach this DNS server through the tunnel: add it to routes.advertise, and its family to the pool", "server", a)
		case refused.Contains(a):
			s.cfg().Logger.Warn("clients may not reach this DNS server, it is an address of this host or denied: use the proxy's own address in the pool, or change routes.deny", "server", a)
		}
	}
	for _, p := range d.NAT64 {
		if !reached.ContainsPrefix(p) {
			s.cfg().Logger.Warn("clients do not reach this NAT64 prefix through the tunnel: add it to routes.advertise, and IPv6 to the pool", "prefix", p)
		}
	}
}
