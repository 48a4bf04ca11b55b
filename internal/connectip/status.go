package connectip

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"masquevpn/capsule"
)

// StatusSchema is the version of the JSON form of Status. It does not change if
// fields are added.
const StatusSchema = 1

// Status describes one tunnel for `status --json` and `sessions --json`.
type Status struct {
	Schema int    `json:"schema"` // StatusSchema
	Name   string `json:"name"`

	// State is connecting, connected, degraded, reconnecting, stopping or
	// failed. Since is the time of its last change, and Reason its reason.
	State  string    `json:"state"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`

	// Warnings contains sentences for the user of a client.
	Warnings []string `json:"warnings,omitempty"`

	Proxy ProxyStatus `json:"proxy"`

	// Peer describes the other owner whose networks a client links as a
	// gateway of a domain. nil means that the client stands for a user.
	Peer *PeerStatus `json:"peer,omitempty"`

	// Discovery describes how a client found the proxy. nil means that it did
	// not have to.
	Discovery *DiscoveryStatus `json:"discovery,omitempty"`

	Interface string         `json:"interface"`
	MTU       int            `json:"mtu"` // bytes
	Addresses []netip.Prefix `json:"addresses"`
	Routes    []RouteStatus  `json:"routes"`
	DNS       DNSStatus      `json:"dns"`

	// KillSwitch is closed, open or off. Only clients set it.
	KillSwitch string `json:"kill_switch,omitempty"`

	RTT        int64             `json:"rtt_us"` // smoothed, in microseconds
	Packets    Counts            `json:"packets"`
	Bytes      Counts            `json:"bytes"`
	Drops      map[string]uint64 `json:"drops"` // packets by reason, both directions
	Reconnects uint64            `json:"reconnects"`

	// Underlay is the client's path to the proxy. nil means unknown.
	Underlay *Underlay `json:"uplink,omitempty"`

	// Migrations counts the client's connection migrations (RFC 9000 section
	// 9).
	Migrations uint64 `json:"migrations,omitempty"`

	// KernelRepairs counts, by kind, how often a client restored configuration
	// that other programs on its host changed.
	KernelRepairs map[string]uint64 `json:"kernel_repairs,omitempty"`

	// OldestPacket is the age of the oldest packet in each Stage of a client,
	// in milliseconds.
	OldestPacket map[string]int64 `json:"oldest_packet_ms,omitempty"`

	// CertificateUntil is the time when the client's certificate expires. nil
	// means that it has none.
	CertificateUntil *time.Time `json:"certificate_until,omitempty"`
}

// PeerStatus describes the other owner of a pair of domains.
type PeerStatus struct {
	Domain   string `json:"domain"`
	Local    string `json:"local"`    // the own domain
	Identity string `json:"identity"` // the proof of Domain, such as "certificate"
}

// DiscoveryStatus describes how a client found the proxy of a domain.
type DiscoveryStatus struct {
	Input     string `json:"input"`     // as configured
	Step      string `json:"step"`      // the source that decided, such as "srv"
	Authority string `json:"authority"` // the :authority of requests
	Records   int    `json:"records"`   // number of servers
	WellKnown string `json:"well_known"`
	Secure    bool   `json:"secure,omitempty"`
	Degraded  bool   `json:"degraded,omitempty"`
	Stale     bool   `json:"stale,omitempty"`

	// Until is the end of the result's lifetime. nil means none.
	Until *time.Time `json:"until,omitempty"`
}

// Underlay describes how packets to the proxy leave a client's host.
type Underlay struct {
	Interface string     `json:"interface"`
	Source    netip.Addr `json:"source"`
}

// ProxyStatus describes the proxy of a client.
type ProxyStatus struct {
	Name     string `json:"name"`
	Endpoint string `json:"endpoint"` // address and UDP port
	HTTP     string `json:"http"`     // version of HTTP: "h3"

	// AuthenticatedAs is the name for which the proxy's certificate was
	// verified.
	AuthenticatedAs string `json:"authenticated_as"`
}

// RouteStatus is one advertised range of addresses. Protocol 0 means all
// protocols.
type RouteStatus struct {
	Start    netip.Addr `json:"start"`
	End      netip.Addr `json:"end"`
	Protocol uint8      `json:"protocol"`
}

// DNSStatus describes the DNS configuration that a client received.
type DNSStatus struct {
	// Servers contains the nameservers for unencrypted DNS, with a port unless
	// it is 53.
	Servers []string `json:"servers"`

	Search []string `json:"search"`

	// Domains contains the names that the servers resolve, each with all names
	// below it. "." means all names.
	Domains []string `json:"domains"`

	NAT64 []netip.Prefix `json:"nat64"`

	// Applied means that the host's resolver uses the configuration. Via names
	// the backend that configured the resolver, or is empty. Reason is the
	// reason if there are servers and Applied is false.
	Applied bool   `json:"applied"`
	Via     string `json:"via,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

// Counts contains a number for each direction.
type Counts struct {
	RX uint64 `json:"rx"`
	TX uint64 `json:"tx"`
}

// SetTraffic fills in Packets, Bytes and Drops from s.
func (st *Status) SetTraffic(s *Stats) {
	st.Packets = Counts{RX: s.Receive.Packets.Load(), TX: s.Send.Packets.Load()}
	st.Bytes = Counts{RX: s.Receive.Bytes.Load(), TX: s.Send.Bytes.Load()}
	st.Drops = map[string]uint64{DropTooBig.String(): 0} // scripts expect this key
	for _, t := range []*Traffic{&s.Receive, &s.Send} {
		for reason, n := range t.Drops() {
			st.Drops[reason] += n
		}
	}
}

// SetRoutes fills in Routes.
func (st *Status) SetRoutes(routes []capsule.Route) {
	st.Routes = make([]RouteStatus, len(routes))
	for i, r := range routes {
		st.Routes[i] = RouteStatus(r)
	}
}

// dnsPort is the default port of unencrypted DNS (RFC 1035 section 4.2).
const dnsPort = 53

// Nameservers returns the nameservers that answer unencrypted queries, sorted
// by priority within each configuration.
func Nameservers(configurations []capsule.DNSConfiguration) []netip.AddrPort {
	var servers []netip.AddrPort
	for _, c := range configurations {
		byPriority := slices.Clone(c.Nameservers)
		slices.SortStableFunc(byPriority, func(a, b capsule.Nameserver) int {
			return cmp.Compare(a.Priority, b.Priority)
		})
		for _, n := range byPriority {
			for _, a := range n.Addresses {
				if n.Unencrypted() {
					servers = append(servers, netip.AddrPortFrom(a, cmp.Or(n.Port, dnsPort)))
				}
			}
		}
	}
	return servers
}

// SetDNS fills in Servers, Search, Domains and NAT64 of DNS. It omits
// nameservers that answer only encrypted queries.
func (st *Status) SetDNS(configurations []capsule.DNSConfiguration, nat64 []netip.Prefix) {
	var servers, search, domains distinct
	for _, a := range Nameservers(configurations) {
		if a.Port() == dnsPort {
			servers.add(a.Addr().String())
		} else {
			servers.add(a.String())
		}
	}
	for _, c := range configurations {
		for _, name := range c.SearchDomains {
			search.add(name)
		}
		for _, name := range c.InternalDomains {
			domains.add(cmp.Or(name, "."))
		}
	}
	st.DNS.Servers, st.DNS.Search, st.DNS.Domains = servers.list(), search.list(), domains.list()
	st.DNS.NAT64 = append([]netip.Prefix{}, nat64...)
}

// distinct is a list of words without duplicates, in the order of add.
type distinct struct {
	seen  map[string]struct{}
	words []string
}

func (d *distinct) add(word string) {
	if _, ok := d.seen[word]; ok {
		return
	}
	if d.seen == nil {
		d.seen = make(map[string]struct{})
	}
	d.seen[word] = struct{}{}
	d.words = append(d.words, word)
}

// list returns the words, never nil.
func (d *distinct) list() []string { return append([]string{}, d.words...) }
