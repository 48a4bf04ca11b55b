package proxy

import (
	"cmp"
	"net/http"
	"slices"
	"sync"

	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
)

// Counters has the counts of a Server since New, which never decrease, and the
// present numbers of sessions, connections and addresses.
type Counters struct {
	// Stats is the sum of all sessions and of packets without a session.
	Stats connectip.Stats

	Sessions    int // tunnels now
	MaxSessions int
	UDPFlows    int // sessions for UDP proxying now
	MaxUDPFlows int

	Requests []RequestCount // one entry per outcome
	Pool     []PoolUse      // one entry per family

	// AuthFailures counts failures of authentication by method. Under "missing"
	// it counts requests without credentials.
	AuthFailures map[string]uint64

	// KernelRepairs counts the changes of other programs that the proxy
	// reverted, by kind.
	KernelRepairs map[string]uint64

	// PendingConnections is the number of connections without an accepted
	// request now. ConnectionsEnded counts the connections that the proxy
	// closed because no session ran on them, by reason.
	PendingConnections int
	ConnectionsEnded   map[string]uint64

	// Oldest has the ages of the oldest packets in the proxy now.
	Oldest connectip.Ages

	// Panics counts sessions and requests that a panic ended.
	Panics uint64

	// Peers has the counts of peers, nil without one.
	Peers *PeerCounts
}

// RequestCount is the number of requests with one outcome.
type RequestCount struct {
	Status int
	Reason string // "accepted" or a word for the refusal
	Count  uint64
}

// PoolUse is the number of leased and free addresses of one family. The numbers
// may exceed the range of integers.
type PoolUse struct {
	Family       string // "ipv4" or "ipv6"
	Leased, Free float64
}

// Counters returns the counters. It may be called before and after Run.
func (s *Server) Counters() *Counters {
	c := &Counters{
		MaxSessions: s.cfg().MaxSessions, MaxUDPFlows: s.cfg().MaxUDPFlows,
		Requests: s.requests.list(), AuthFailures: s.auth.failed.counts(), Pool: s.poolUse(),
	}
	if c.Peers = s.peers.counts(); c.Peers != nil {
		c.Peers.States = s.peerStates()
	}
	c.KernelRepairs = s.host.healthNow().Repairs
	if e := s.host.supervisor.Current(); e != nil {
		e.overflow.Count(e.device, func(n int) {
			s.forwarder.unrouted.Send.DropMany(connectip.DropDeviceFull, n)
		})
	}
	c.Oldest, c.Panics = s.oldest(), rescue.Caught()
	c.PendingConnections, c.ConnectionsEnded = s.connLimiter.Counts()
	s.forwarder.unrouted.AddTo(&c.Stats)
	c.Sessions, c.UDPFlows = s.sessions.addTo(&c.Stats)
	return c
}

// poolUse returns the use of each family of the pool.
func (s *Server) poolUse() []PoolUse {
	var list []PoolUse
	for _, u := range s.pool.Use() {
		list = append(list, PoolUse(u))
	}
	return list
}

// oldest returns the ages of the oldest packets in the proxy.
func (s *Server) oldest() (a connectip.Ages) {
	a.Note(connectip.StageDeviceRead, s.forwarder.reading.Age())
	for _, ss := range s.sessions.list() {
		ss.addAges(&a)
	}
	return a
}

// Stuck returns an error that names the stage if packets do not move because of
// a fault of the proxy, and nil otherwise.
func (s *Server) Stuck() error {
	a := s.oldest()
	return a.Stuck()
}

// accepted is RequestCount.Reason of accepted requests.
const accepted = "accepted"

// outcome is the result of a request: a status code and a reason.
type outcome struct {
	status int
	reason string
}

// requestCounts counts requests by their outcome.
type requestCounts struct {
	mu     sync.Mutex // guards the field below
	counts map[outcome]uint64
}

// newRequestCounts starts common outcomes at 0, so that an alert sees the first
// increase: a counter that appears with 1 has no increase.
func newRequestCounts() requestCounts {
	const limit = "connection_limit_reached"
	return requestCounts{counts: map[outcome]uint64{
		{http.StatusOK, accepted}: 0, {http.StatusUnauthorized, "credentials"}: 0,
		{http.StatusTooManyRequests, limit}: 0, {http.StatusServiceUnavailable, limit}: 0,
	}}
}

func (c *requestCounts) count(status int, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[outcome{status, reason}]++
}

// list returns the outcomes so far, sorted.
func (c *requestCounts) list() []RequestCount {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]RequestCount, 0, len(c.counts))
	for o, n := range c.counts {
		list = append(list, RequestCount{o.status, o.reason, n})
	}
	slices.SortFunc(list, func(a, b RequestCount) int {
		return cmp.Or(cmp.Compare(a.Status, b.Status), cmp.Compare(a.Reason, b.Reason))
	})
	return list
}
