package proxy

import (
	"cmp"
	"net/http"
	"slices"
	"sync"

	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
)

// Counters are what a Server has counted since it was made, and what it has
// now. Counts never get less.
type Counters struct {
	Stats        connectip.Stats // all sessions, and packets that belong to none
	Sessions     int             // now, tunnels
	MaxSessions  int
	UDPFlows     int // now
	MaxUDPFlows  int
	Requests     []RequestCount    // one entry for each outcome
	AuthFailures map[string]uint64 // key: method; "missing": there were no credentials
	Pool         []PoolUse
	// KernelRepairs are how often the host was put right, by what it was.
	KernelRepairs map[string]uint64
	// PendingConnections are those without an accepted request now, and
	// ConnectionsEnded how many the proxy ended because no session ran on them,
	// by reason.
	PendingConnections int
	ConnectionsEnded   map[string]uint64
	// Oldest are the ages of the oldest packets that wait in the proxy now.
	Oldest connectip.Ages
	Panics uint64 // that ended a session or a request
}

// RequestCount is how many requests had one outcome.
type RequestCount struct {
	Status int
	Reason string // "accepted", or why not: one of a few words
	Count  uint64
}

// PoolUse is how the addresses of one family are used. There may be more than
// an integer can count.
type PoolUse struct {
	Family       string // ipv4 or ipv6
	Leased, Free float64
}

// Counters may be called at any time, also before Run and after it.
func (s *Server) Counters() *Counters {
	c := &Counters{
		MaxSessions: s.cfg().MaxSessions, MaxUDPFlows: s.cfg().MaxUDPFlows,
		Requests: s.requests.counts(), AuthFailures: s.auth.failed.counts(), Pool: s.poolUse(),
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

// oldest returns the ages of the oldest packets that wait.
func (s *Server) oldest() (a connectip.Ages) {
	a.Note(connectip.StageDeviceRead, s.forwarder.reading.Age())
	for _, ss := range s.sessions.list() {
		ss.addAges(&a)
	}
	return a
}

// Stuck says where packets are stuck for a reason that is this proxy's own, nil
// for nowhere.
func (s *Server) Stuck() error {
	a := s.oldest()
	return a.Stuck()
}

// accepted is the reason of requests that were.
const accepted = "accepted"

// outcome is what became of a request.
type outcome struct {
	status int
	reason string
}

// requestCounts counts requests by their outcome.
type requestCounts struct {
	mu sync.Mutex
	by map[outcome]uint64
}

// newRequestCounts begins with those outcomes at 0 that somebody may want to be
// alerted of: an alert sees how a number grows, and not how it appears.
func newRequestCounts() requestCounts {
	const limit = "connection_limit_reached"
	return requestCounts{by: map[outcome]uint64{
		{http.StatusOK, accepted}: 0, {http.StatusUnauthorized, "credentials"}: 0,
		{http.StatusTooManyRequests, limit}: 0, {http.StatusServiceUnavailable, limit}: 0,
	}}
}

func (c *requestCounts) count(status int, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by[outcome{status, reason}]++
}

// counts returns all outcomes so far in order.
func (c *requestCounts) counts() []RequestCount {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]RequestCount, 0, len(c.by))
	for o, n := range c.by {
		list = append(list, RequestCount{o.status, o.reason, n})
	}
	slices.SortFunc(list, func(a, b RequestCount) int {
		return cmp.Or(cmp.Compare(a.Status, b.Status), cmp.Compare(a.Reason, b.Reason))
	})
	return list
}
