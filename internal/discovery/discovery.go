package discovery

import (
	"context"
	"encoding/json"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

const (
	// resolutionTimeout limits a whole resolution.
	resolutionTimeout = 10 * time.Second
	// minTTL and maxTTL bound the time for which a result is used.
	minTTL, maxTTL = 30 * time.Second, time.Hour
	// staleness is for how long after its end a former answer serves while
	// there is no other.
	staleness = 24 * time.Hour
	// maxParallel limits the DNS questions that are asked at the same time.
	maxParallel = 8
)

// A Purpose says who looks for a server.
type Purpose int

// The purposes.
const (
	Client Purpose = iota // a client, for a proxy
	Peer                  // a proxy of another domain, for a gateway
)

// A Transport is a way to carry HTTP: "h3" or "h2", its ALPN identifier.
type Transport string

// The transports.
const (
	H3 Transport = "h3" // HTTP/3 over UDP
	H2 Transport = "h2" // HTTP/2 over TLS and TCP
)

// label is the protocol label of SRV owner names (RFC 2782).
func (t Transport) label() string {
	if t == H3 {
		return "_udp"
	}
	return "_tcp"
}

func (t Transport) protocol() string {
	if t == H3 {
		return "HTTP/3"
	}
	return "HTTP/2"
}

func (t Transport) other() Transport {
	if t == H3 {
		return H2
	}
	return H3
}

// DNSSEC says what signatures of DNS answers are for.
type DNSSEC int

// The modes.
const (
	DNSSECOff     DNSSEC = iota // signatures are not looked at
	DNSSECUse                   // signed SRV records may lead to another name's certificate
	DNSSECRequire               // unsigned answers about the domain are an error
)

// A Method says which sources a resolution uses for a name without a port.
type Method int

// The methods.
const (
	Auto      Method = iota // the delegation file and DNS
	DNSOnly                 // no delegation file
	Addresses               // addresses of the name alone
)

// A Query is what to resolve.
type Query struct {
	Name       Name
	Purpose    Purpose
	Method     Method
	Transports []Transport // spoken by the caller, the preferred one first
	DNSSEC     DNSSEC
	// Private lets names and addresses that came from the network lead into
	// private networks.
	Private bool
	// ServerName, if not empty, replaces the names in certificates and SNI of
	// every record.
	ServerName string
	// Asked, if not nil, is told of each DNS question that was answered or
	// failed. It is called by one goroutine at a time.
	Asked func(Question)
	// WithoutFile, if not nil, is called at most once, with the result of the
	// domain's own records, if that is there before the delegation file is. The
	// file still decides the resolution.
	WithoutFile func(*Result)
}

// speaks reports whether the caller speaks t.
func (q *Query) speaks(t Transport) bool {
	for _, s := range q.Transports {
		if s == t {
			return true
		}
	}
	return false
}

// A Question is a DNS question and how it went.
type Question struct {
	Name   string        `json:"name"`
	Type   Type          `json:"type"`
	Answer []string      `json:"answer,omitempty"` // records, as a zone file has them
	Status string        `json:"status"`           // "ok", "none" for no records, or the failure
	Secure bool          `json:"secure"`
	Took   time.Duration `json:"-"`
}

// MarshalJSON adds the duration in milliseconds as "ms".
func (q Question) MarshalJSON() ([]byte, error) {
	type question Question
	return json.Marshal(struct {
		question
		Milliseconds float64 `json:"ms"`
	}{question(q), float64(q.Took.Microseconds()) / 1000})
}

// A Record is one server to try.
type Record struct {
	Target    string       `json:"target"` // the name or address that has Addresses
	Port      uint16       `json:"port"`
	Transport Transport    `json:"transport"`
	Priority  uint16       `json:"-"` // 0 without an SRV or HTTPS record
	Weight    uint16       `json:"weight,omitempty"`
	Addresses []netip.Addr `json:"addresses"` // in the order in which to try them
	SNI       string       `json:"sni"`       // "" for none
	Verify    []string     `json:"verify"`    // the certificate has to be for one of these
	Signed    bool         `json:"-"`         // found by a signed SRV record
}

// A Group is a set of records of the same priority, in the order drawn.
type Group struct {
	Records []Record `json:"records"`
}

// A Result is how a server name is reached.
type Result struct {
	Step      string  // how it was found, such as "well-known/srv"
	Authority string  // the :authority of requests
	Groups    []Group // in the order in which to try them
	// TTL is the smallest lifetime of the DNS records used, between 30 s and
	// 1 h; 0 when the result must not be kept, -1 without DNS records.
	TTL time.Duration
	// Until is the end of the result's lifetime; the zero Time for an address.
	Until     time.Time
	Secure    bool // all records were found by signed SRV records
	Degraded  bool // SRV records could not be asked for
	Stale     bool // former SRV records, because they could not be asked for
	Skipped   []Skipped
	WellKnown string // how asking for the delegation file went; "none" if it was not asked for
	// Delegated is the server name in the delegation file, the zero Name
	// without one, and FileUntil the end of the file's lifetime.
	Delegated Name
	FileUntil time.Time
	// FileUnknown is set if a temporary failure kept the delegation file from
	// being read, so that there may be one.
	FileUnknown bool
}

// MarshalJSON returns the form that docs/reference describes.
func (r *Result) MarshalJSON() ([]byte, error) {
	var ttl *int
	if r.TTL >= 0 {
		ttl = new(int(r.TTL / time.Second))
	}
	return json.Marshal(struct {
		Step      string    `json:"step"`
		Authority string    `json:"authority"`
		TTL       *int      `json:"ttl,omitempty"` // seconds
		WellKnown string    `json:"well_known"`
		Groups    []Group   `json:"groups"`
		Skipped   []Skipped `json:"skipped,omitempty"`
		Secure    bool      `json:"secure,omitempty"`
		Degraded  bool      `json:"degraded,omitempty"`
		Stale     bool      `json:"stale,omitempty"`
	}{r.Step, r.Authority, ttl, r.WellKnown, r.Groups, r.Skipped, r.Secure, r.Degraded, r.Stale})
}

// Addrs returns the addresses and ports of all records, without repetition, in
// the order in which to try them.
func (r *Result) Addrs() []netip.AddrPort {
	var list []netip.AddrPort
	seen := make(map[netip.AddrPort]bool)
	for _, g := range r.Groups {
		for _, rec := range g.Records {
			for _, a := range rec.Addresses {
				if ap := netip.AddrPortFrom(a, rec.Port); !seen[ap] {
					seen[ap] = true
					list = append(list, ap)
				}
			}
		}
	}
	return list
}

// A Resolver finds out how server names are reached. Its methods may be called
// by several goroutines at the same time; its fields do not change after the
// first call. The zero value of a field is an error unless the field says
// otherwise.
type Resolver struct {
	DNS   DNS
	Fetch Fetch
	// Hosts returns the addresses that the host's own table has for a name.
	Hosts func(name string) []netip.Addr
	// Local looks up a name as any program of the host does, with its search
	// domains.
	Local func(ctx context.Context, name string) ([]netip.Addr, error)
	Now   func() time.Time
	Rand  *rand.Rand // order of records and jitter; guarded by mu
	// NoJitter makes waiting times exact.
	NoJitter bool
	Logger   *slog.Logger // nil for none

	mu           sync.Mutex // guards the following
	files        map[fileKey]*file
	former       map[srvKey]*formerSRV
	discoveries  map[Outcome]uint64
	fileRequests map[string]uint64
}

// Resolve resolves q. Its error is an *Error, or the cause of the end of ctx.
func (r *Resolver) Resolve(ctx context.Context, q Query) (*Result, error) {
	parent := ctx
	ctx, cancel := context.WithTimeout(ctx, resolutionTimeout)
	x := newResolution(r, &q)
	defer x.questions.Wait()
	defer cancel()
	f, err := x.run(ctx)
	if parent.Err() != nil {
		return nil, context.Cause(parent)
	}
	var result *Result
	var failure *Error
	if err != nil {
		failure = x.failure(err)
	} else {
		result = x.result(f)
	}
	if q.Name.Discovers() {
		r.count(result, failure)
	}
	if failure != nil {
		return nil, failure
	}
	return result, nil
}

// Forget drops everything that earlier resolutions found.
func (r *Resolver) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.files, r.former = nil, nil
}

// jittered returns d changed by at most a tenth, so that hosts that started
// together do not ask together.
func (r *Resolver) jittered(d time.Duration) time.Duration {
	if r.NoJitter {
		return d
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return d + time.Duration((r.Rand.Float64()-0.5)*0.2*float64(d))
}

func (r *Resolver) logger() *slog.Logger {
	if r.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return r.Logger
}
