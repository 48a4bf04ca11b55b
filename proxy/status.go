package proxy

import (
	"strconv"
	"time"

	"masquevpn/internal/connectip"
)

// Status describes the proxy as a whole.
type Status struct {
	Schema int       `json:"schema"`
	Name   string    `json:"name"`
	Since  time.Time `json:"since"`

	// State is StateRunning or StateDegraded.
	State string `json:"state"`

	// Warnings are sentences for the operator.
	Warnings []string `json:"warnings,omitempty"`

	Listen    []string `json:"listen"`
	Template  string   `json:"template"`
	Interface string   `json:"interface"`
	Sessions  int      `json:"sessions"`  // tunnels
	UDPFlows  int      `json:"udp_flows"` // sessions for UDP proxying
	// Peers has the numbers of peers; nil without a [[peer]].
	Peers *PeerTotals `json:"peers,omitempty"`

	Leased  map[string]int   `json:"leased"` // number of leases by family
	Packets connectip.Counts `json:"packets"`
	Bytes   connectip.Counts `json:"bytes"`

	Drops    map[string]uint64 `json:"drops"`    // dropped packets by reason
	Requests map[string]uint64 `json:"requests"` // requests by status code
	ICMPSent uint64            `json:"icmp_sent"`

	// AuthFailures counts failures of authentication by method. Under "missing"
	// it counts requests without credentials.
	AuthFailures map[string]uint64 `json:"auth_failures"`

	// KernelRepairs counts the changes of other programs that the proxy
	// reverted, by kind.
	KernelRepairs map[string]uint64 `json:"kernel_repairs,omitempty"`

	// OldestPacket is the age in milliseconds of the oldest packet that waits
	// in each stage of forwarding.
	OldestPacket map[string]int64 `json:"oldest_packet_ms"`

	// Panics counts sessions and requests that a panic ended.
	Panics uint64 `json:"panics"`
}

// The states of a Status.
const (
	StateRunning  = "running"
	StateDegraded = "degraded" // the host does not keep the configuration that clients need
)

// Status describes the proxy. It must not be called before Ready is closed.
func (s *Server) Status() Status {
	c := s.Counters()
	var st connectip.Status
	st.SetTraffic(&c.Stats)
	requests := make(map[string]uint64)
	for _, r := range c.Requests {
		if r.Count == 0 {
			continue
		}
		requests[strconv.Itoa(r.Status)] += r.Count
	}
	v4, v6 := s.pool.Leased()
	status := Status{
		Schema: connectip.StatusSchema, Name: s.cfg().Name, State: StateRunning, Since: s.started,
		Listen:   s.listening(),
		Template: s.templates[0].String(), Interface: s.host.name(),
		Peers:    c.peerTotals(),
		Sessions: c.Sessions,
		UDPFlows: c.UDPFlows,
		Leased:   map[string]int{"ipv4": v4, "ipv6": v6},
		Packets:  st.Packets, Bytes: st.Bytes, Drops: st.Drops,
		Requests: requests, ICMPSent: c.Stats.ICMPSent.Total(), AuthFailures: c.AuthFailures,
		KernelRepairs: c.KernelRepairs,
		OldestPacket:  c.Oldest.Milliseconds(), Panics: c.Panics,
	}
	if problem := s.Problem(); problem != "" {
		status.State, status.Warnings = StateDegraded, []string{problem}
	}
	return status
}

// Problem returns a sentence about the part of the host's configuration that is
// not as clients need it, with a remedy. It returns "" if there is none.
func (s *Server) Problem() string { return s.host.healthNow().Problem }

// listening returns the addresses for Status.Listen: the configured ones, or
// the addresses of Config.Sockets.
func (s *Server) listening() []string {
	if len(s.cfg().Sockets) == 0 {
		return s.cfg().Listen
	}
	var list []string
	for _, a := range s.addrs {
		list = append(list, a.String())
	}
	return list
}
