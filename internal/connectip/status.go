package connectip

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"masquevpn/capsule"
)

// StatusSchema is the version of the JSON form of Status. Fields are added
// without changing it.
const StatusSchema = 1

// Status describes one tunnel in the words that `status --json` and `sessions
// --json` share.
type Status struct {
	Schema int    `json:"schema"`
	Name   string `json:"name"`
	// connecting, connected, degraded, reconnecting, stopping, failed
	State  string    `json:"state"`
	Since  time.Time `json:"since"` // when State last changed
	Reason string    `json:"reason"`
	// what a client's user should know, one sentence each
	Warnings   []string          `json:"warnings,omitempty"`
	Proxy      ProxyStatus       `json:"proxy"`
	Interface  string            `json:"interface"`
	MTU        int               `json:"mtu"` // bytes
	Addresses  []netip.Prefix    `json:"addresses"`
	Routes     []RouteStatus     `json:"routes"`
	DNS        DNSStatus         `json:"dns"`
	KillSwitch string            `json:"kill_switch,omitempty"` // closed, open, or off; of a client
	RTT        int64             `json:"rtt_us"`                // smoothed, microseconds
	Packets    Counts            `json:"packets"`
	Bytes      Counts            `json:"bytes"`
	Drops      map[string]uint64 `json:"drops"` // packets by reason, both directions
	Reconnects uint64            `json:"reconnects"`
	// how a client's packets leave its host; nil if it is not known
	Underlay *Underlay `json:"uplink,omitempty"`
	// of a client's sessions to another path (RFC 9000 section 9)
	Migrations uint64 `json:"migrations,omitempty"`

	// KernelRepairs are how often a client put right what other programs
	// changed on its host, by what it was.
	KernelRepairs map[string]uint64 `json:"kernel_repairs,omitempty"`

	// OldestPacket is the age of the oldest packet in each stage of its way
	// through a client, milliseconds.
	OldestPacket map[string]int64 `json:"oldest_packet_ms,omitempty"`

	// when the client's own certificate ends
	CertificateUntil *time.Time `json:"certificate_until,omitempty"`
}

// Underlay is how packets to the proxy leave a client's host.
type Underlay struct {
	Interface string     `json:"interface"`
	Source    netip.Addr `json:"source"`
}

// ProxyStatus is the far end as a client knows it.
type ProxyStatus struct {
	Name     string `json:"name"`
	Endpoint string `json:"endpoint"` // address and UDP port
	HTTP     string `json:"http"`     // "h3"
	// the name that its certificate was verified for
	AuthenticatedAs string `json:"authenticated_as"`
}

// RouteStatus is one advertised range.
type RouteStatus struct {
	Start    netip.Addr `json:"start"`
	End      netip.Addr `json:"end"`
	Protocol uint8      `json:"protocol"`
}

// DNSStatus is the configuration of DNS that came through the tunnel.
type DNSStatus struct {
	// of unencrypted DNS, with a port where it is not the usual one
	Servers []string `json:"servers"`
	Search  []string `json:"search"`
	// what the servers resolve, with all names below; "." is all names
	Domains []string       `json:"domains"`
	NAT64   []netip.Prefix `json:"nat64"`
	Applied bool           `json:"applied"`       // the host's resolver uses it
	Via     string         `json:"via,omitempty"` // which way it was told, "" if it was not
	// why it was not, "" if it was or there are no servers
	Reason string `json:"reason,omitempty"`
}

// Counts is a number for each direction.
type Counts struct {
	RX uint64 `json:"rx"`
	TX uint64 `json:"tx"`
}

// SetTraffic fills in what s counted.
func (st *Status) SetTraffic(s *Stats) {
	st.Packets = Counts{RX: s.Receive.Packets.Load(), TX: s.Send.Packets.Load()}
	st.Bytes = Counts{RX: s.Receive.Bytes.Load(), TX: s.Send.Bytes.Load()}
	st.Drops = map[string]uint64{DropTooBig.String(): 0} // always there
	for _, t := range []*Traffic{&s.Receive, &s.Send} {
		for reason, n := range t.Drops() {
			st.Drops[reason] += n
		}
	}
}

// SetRoutes fills in routes.
func (st *Status) SetRoutes(routes []capsule.Route) {
	st.Routes = make([]RouteStatus, len(routes))
	for i, r := range routes {
		st.Routes[i] = RouteStatus(r)
	}
}

// dnsPort is where unencrypted DNS is served unless something else is said (RFC
// 1035 section 4.2).
const dnsPort = 53

// Nameservers returns those that take unencrypted queries, of each
// configuration the preferred one first.
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

// SetDNS fills in what was said about DNS and NAT64. Nameservers that take
// encrypted queries alone are left out.
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

// distinct is a list of words without repetitions.
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
