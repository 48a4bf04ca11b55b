package connectip

import (
	"net/netip"
	"time"

	"masquevpn/capsule"
)

// StatusSchema is the version of the JSON form of Status. Fields are added without changing it.
const StatusSchema = 1

// Status describes one tunnel in the words that `status --json` and `sessions --json` share.
type Status struct {
	Schema     int               `json:"schema"`
	Name       string            `json:"name"`
	State      string            `json:"state"` // connecting, connected, reconnecting, stopping, failed
	Since      time.Time         `json:"since"` // of State
	Reason     string            `json:"reason"`
	Proxy      ProxyStatus       `json:"proxy"`
	Interface  string            `json:"interface"`
	MTU        int               `json:"mtu"` // bytes
	Addresses  []netip.Prefix    `json:"addresses"`
	Routes     []RouteStatus     `json:"routes"`
	DNS        DNSStatus         `json:"dns"`
	RTT        int64             `json:"rtt_us"` // smoothed, microseconds
	Packets    Counts            `json:"packets"`
	Bytes      Counts            `json:"bytes"`
	Drops      map[string]uint64 `json:"drops"` // packets by reason, both directions
	Reconnects uint64            `json:"reconnects"`
}

// ProxyStatus is the far end as a client knows it.
type ProxyStatus struct {
	Name            string `json:"name"`
	Endpoint        string `json:"endpoint"`         // address and UDP port
	HTTP            string `json:"http"`             // "h3"
	AuthenticatedAs string `json:"authenticated_as"` // the name that its certificate was verified for
}

// RouteStatus is one advertised range.
type RouteStatus struct {
	Start    netip.Addr `json:"start"`
	End      netip.Addr `json:"end"`
	Protocol uint8      `json:"protocol"`
}

// DNSStatus is the configuration of DNS that came through the tunnel.
type DNSStatus struct {
	Servers []string `json:"servers"`
	Search  []string `json:"search"`
	Applied bool     `json:"applied"`
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
	st.Drops = s.Receive.Drops()
	for reason, n := range s.Send.Drops() {
		st.Drops[reason] += n
	}
}

// SetRoutes fills in routes.
func (st *Status) SetRoutes(routes []capsule.Route) {
	st.Routes = make([]RouteStatus, len(routes))
	for i, r := range routes {
		st.Routes[i] = RouteStatus(r)
	}
}
