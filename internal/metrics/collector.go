// Package metrics serves a program's metrics to Prometheus and its health to
// any HTTP client.
//
// A program gives [Serve] a [Config] with functions that return its current
// [Values], its health and its readiness. [Server] answers GET /metrics,
// /healthz and /readyz.
package metrics

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"masquevpn/internal/connectip"
)

// Values are a program's counters since its start and its current gauges.
// Counters never decrease. A field that is nil or zero belongs to the other
// program and is omitted, unless its comment permits zero.
type Values struct {
	Stats    *connectip.Stats // never nil
	Sessions int              // zero is a value

	MaxSessions int
	// UDPFlows may be zero if MaxUDPFlows is not zero.
	UDPFlows     int
	MaxUDPFlows  int
	Requests     []Request
	AuthFailures map[string]uint64 // keyed by method

	PendingConnections int
	ConnectionsEnded   map[string]uint64 // keyed by reason; nil: none
	Pool               []Pool

	Reconnects map[string]uint64 // keyed by reason
	// Discoveries counts resolutions of the proxy's domain by their outcome,
	// and WellKnownRequests requests for delegation files by their result.
	Discoveries       []Discovery
	WellKnownRequests map[string]uint64
	// PeerPairs has the pairs with peers by identity, PeerRequests the requests
	// for pairs by status, and PeerRevocations the pairs that were ended by
	// reason.
	PeerPairs         map[string]int
	PeerStates        map[string]int // configured peers by state
	PeerRequests      map[int]uint64
	PeerRevocations   map[string]uint64
	PeerVerifications []PeerVerification
	// Repairs counts repairs on this host, keyed by object. Both programs.
	Repairs map[string]uint64
	// Queues counts waiting packets. Both programs; zero is a value.
	Oldest connectip.Ages
	Panics uint64        // both programs
	RTT    time.Duration // session's round-trip time; zero without a session
	MTU    int           // tunnel's MTU in bytes; zero without a session

	// CertificateExpiry is the expiry of this end's certificate; zero without
	// one.
	CertificateExpiry time.Time
}

// Request counts the requests with one outcome.
type Request struct {
	Status int
	Reason string
	Count  uint64
}

// Discovery counts the resolutions with one outcome.
type Discovery struct {
	Step, Result string
	Count        uint64
}

// PeerVerification counts the looks at peers' certificates with one outcome.
type PeerVerification struct {
	Identity, Result string
	Count            uint64
}

// Pool is the usage of one address family.
type Pool struct {
	Family       string
	Leased, Free float64
}

// Program identifies the program that has the values.
type Program struct {
	Name, Version, Revision, GoVersion string
}

// Directions of traffic, named as in status --json: to this end of the tunnel,
// and from it.
const (
	received = "rx"
	sent     = "tx"
)

// metric is one family of metrics.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func counter(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc(name, help, labels, nil), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue}
}

var (
	buildInfo = gauge("masque_build_info", "Always 1; the labels say what is running.", "program",
		"version", "revision", "goversion")
	sessions = gauge("masque_sessions",
		"Sessions now, without flows of UDP; of a client, 1 while it is connected.")
	limit     = gauge("masque_sessions_limit", "Sessions that there may be at once.")
	flows     = gauge("masque_udp_flows", "Flows of UDP for clients now.")
	flowLimit = gauge("masque_udp_flows_limit", "Flows of UDP that there may be at once.")
	requests  = counter("masque_session_requests_total",
		"Requests by the status of their answer and the reason for it.", "status", "reason")
	auth = counter("masque_auth_failures_total",
		"Requests and handshakes whose credentials were refused, by kind; missing: there were none.", "method")
	pending = gauge("masque_pending_connections", "Connections without an accepted request.")
	ended   = counter("masque_connections_ended_total",
		"Connections that were ended because no session ran on them, by reason.", "reason")
	packets = counter("masque_packets_total",
		"IP packets out of tunnels (rx) and into them (tx), and UDP packets of flows for clients.",
		"direction")
	bytes = counter("masque_bytes_total",
		"Bytes of those packets, without what the tunnel adds.", "direction")
	dropped = counter("masque_dropped_packets_total",
		"Packets out of tunnels (rx) and into them (tx) that were dropped.", "direction", "reason")
	icmp = counter("masque_icmp_sent_total",
		"ICMP errors made here, by what they say.", "type")
	noICMP = counter("masque_icmp_suppressed_total",
		"ICMP errors that were held back by a limit on their rate.")
	capsules = counter("masque_capsules_total",
		"Capsules of RFC 9484 and 9297 from the peer (rx) and to it (tx).", "type", "direction")
	pool = gauge("masque_pool_addresses", "Addresses for clients, leased or free.", "family",
		"state")
	reconnect = counter("masque_reconnects_total",
		"Attempts to connect again, by what was wrong before.", "reason")
	discoveries = counter("masque_discoveries_total",
		"Resolutions of the proxy's domain, by the source that decided and the outcome.", "step",
		"result")
	wellKnown = counter("masque_well_known_requests_total",
		"Requests for the delegation file of the proxy's domain.", "result")
	peerStates = gauge("masque_peers",
		"Peers of the configuration, by their state.", "state")
	peerPairs = gauge("masque_peer_pairs",
		"Pairs of domains that are linked now, by the identity of the peer.",
		"identity")
	peerRequests = counter("masque_peer_requests_total",
		"Requests of peers for pairs of domains, by the status of their answer.", "status")
	peerRevocations = counter("masque_peer_revocations_total",
		"Pairs of domains that were ended because the peer may no longer have them, by reason.",
		"reason")
	peerVerifications = counter("masque_peer_verifications_total",
		"Looks at certificates of peers, by the identity that was found and the result.",
		"identity",
		"result")
	rtt     = gauge("masque_rtt_seconds", "Smoothed round-trip time to the proxy, while connected.")
	mtu     = gauge("masque_mtu_bytes", "Largest packet that the tunnel carries, while connected.")
	repairs = counter("masque_kernel_repairs_total",
		"Things that other programs changed in the kernel's side of tunnels and that were put right, by what they are.", "what")
	oldest = gauge("masque_oldest_packet_seconds",
		"Age of the oldest packet in each stage of its way through the program, 0 where none waits.", "stage")
	panics = counter("masque_panics_total",
		"Faults of the program that ended a session or a request, whose stack is in the log.")
	expiry = gauge("masque_certificate_expiry_timestamp_seconds",
		"When the certificate of this end ends, in seconds since 1970.")
)

// all lists the metrics of both programs.
var all = []metric{
	buildInfo, sessions, limit, flows, flowLimit, requests, auth, pending, ended, packets, bytes,
	dropped, icmp, noICMP, capsules, pool, reconnect, discoveries, wellKnown, peerPairs, peerStates,
	peerRequests, peerRevocations, peerVerifications, rtt, mtu, repairs,
	oldest, panics, expiry,
}

// collector reads the values for each request of Prometheus.
type collector struct {
	program Program
	values  func() Values
}

// Describe sends the descriptions of all metrics of both programs.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range all {
		ch <- m.desc
	}
}

// Collect sends the metrics that this program has.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	send := func(m metric, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, value, labels...)
	}
	p, v := c.program, c.values()
	send(buildInfo, 1, p.Name, p.Version, p.Revision, p.GoVersion)
	send(sessions, float64(v.Sessions))
	if v.MaxSessions > 0 {
		send(limit, float64(v.MaxSessions))
	}
	if v.MaxUDPFlows > 0 {
		send(flows, float64(v.UDPFlows))
		send(flowLimit, float64(v.MaxUDPFlows))
	}
	for _, r := range v.Requests {
		send(requests, float64(r.Count), strconv.Itoa(r.Status), r.Reason)
	}
	for method, n := range v.AuthFailures {
		send(auth, float64(n), method)
	}
	if v.ConnectionsEnded != nil {
		send(pending, float64(v.PendingConnections))
	}
	for reason, n := range v.ConnectionsEnded {
		send(ended, float64(n), reason)
	}
	for direction, t := range map[string]*connectip.Traffic{received: &v.Stats.Receive,
		sent: &v.Stats.Send} {
		send(packets, float64(t.Packets.Load()), direction)
		send(bytes, float64(t.Bytes.Load()), direction)
		for reason, n := range t.EachDrop() {
			send(dropped, float64(n), direction, reason)
		}
		for typ, n := range t.EachCapsule() {
			send(capsules, float64(n), typ, direction)
		}
	}
	for typ, n := range v.Stats.ICMPSent.Each() {
		send(icmp, float64(n), typ)
	}
	send(noICMP, float64(v.Stats.ICMPSuppressed.Load()))
	for _, f := range v.Pool {
		send(pool, f.Leased, f.Family, "leased")
		send(pool, f.Free, f.Family, "free")
	}
	for reason, n := range v.Reconnects {
		send(reconnect, float64(n), reason)
	}
	for state, n := range v.PeerStates {
		send(peerStates, float64(n), state)
	}
	for identity, n := range v.PeerPairs {
		send(peerPairs, float64(n), identity)
	}
	for status, n := range v.PeerRequests {
		send(peerRequests, float64(n), strconv.Itoa(status))
	}
	for reason, n := range v.PeerRevocations {
		send(peerRevocations, float64(n), reason)
	}
	for _, p := range v.PeerVerifications {
		send(peerVerifications, float64(p.Count), p.Identity, p.Result)
	}
	for _, d := range v.Discoveries {
		send(discoveries, float64(d.Count), d.Step, d.Result)
	}
	for result, n := range v.WellKnownRequests {
		send(wellKnown, float64(n), result)
	}
	for what, n := range v.Repairs {
		send(repairs, float64(n), what)
	}
	for stage, age := range v.Oldest.Each() {
		send(oldest, age.Seconds(), stage)
	}
	send(panics, float64(v.Panics))
	if v.RTT > 0 {
		send(rtt, v.RTT.Seconds())
	}
	if v.MTU > 0 {
		send(mtu, float64(v.MTU))
	}
	if !v.CertificateExpiry.IsZero() {
		send(expiry, float64(v.CertificateExpiry.Unix()))
	}
}
