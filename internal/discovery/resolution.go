package discovery

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// The SRV services.
const (
	service     = "masque"
	peerService = "masque-fed" // for peers, before the other
)

// A resolution is one call of Resolve.
type resolution struct {
	*Resolver
	query     *Query
	input     string        // host of the query; "" for an address
	slots     chan struct{} // holds one value for each question being asked
	questions sync.WaitGroup

	mu    sync.Mutex // guards the following
	asked map[question]*pending

	wellKnown   string // how the delegation file went, set before the result is made
	delegated   Name
	fileUntil   time.Time
	fileUnknown bool
	asking      sync.Mutex // held while Query.Asked runs
}

type question struct {
	name string
	t    Type
}

// A pending is a question that was asked. Its answer and err are set before
// done is closed.
type pending struct {
	done   chan struct{}
	answer Answer
	err    error
}

func newResolution(r *Resolver, q *Query) *resolution {
	return &resolution{Resolver: r, query: q, input: q.Name.host, wellKnown: "none",
		slots: make(chan struct{}, maxParallel), asked: make(map[question]*pending)}
}

// ask asks a question, unless the resolution did before, and returns without
// waiting for the answer.
func (x *resolution) ask(ctx context.Context, name string, t Type) *pending {
	x.mu.Lock()
	defer x.mu.Unlock()
	q := question{name, t}
	p := x.asked[q]
	if p == nil {
		p = &pending{done: make(chan struct{})}
		x.asked[q] = p
		x.questions.Go(func() {
			defer close(p.done)
			p.answer, p.err = x.lookUp(ctx, name, t)
		})
	}
	return p
}

// lookUp waits for its turn, and asks DNS.
func (x *resolution) lookUp(ctx context.Context, name string, t Type) (Answer, error) {
	select {
	case x.slots <- struct{}{}:
		defer func() { <-x.slots }()
	case <-ctx.Done():
		return Answer{}, errTimeout
	}
	start := x.Now()
	a, err := x.DNS.Lookup(ctx, name, t)
	if x.query.Asked != nil && !errors.Is(ctx.Err(), context.Canceled) {
		x.asking.Lock()
		defer x.asking.Unlock()
		q := Question{Name: name, Type: t, Answer: a.lines(), Status: "ok", Secure: a.Secure,
			Took: x.Now().Sub(start)}
		switch {
		case err != nil:
			q.Status = clean(err.Error())
		case len(q.Answer) == 0:
			q.Status = "none"
		}
		x.query.Asked(q)
	}
	return a, err
}

var errTimeout = errors.New("TIMEOUT")

// wait returns the answer to a question.
func (p *pending) wait() (*Answer, error) {
	<-p.done
	return &p.answer, p.err
}

// A finding is the outcome of a step, before it becomes a Result.
type finding struct {
	step      string
	authority string
	groups    []Group
	skipped   []Skipped
	secure    bool
	degraded  bool
	stale     bool
	ttl       lifetime
	until     time.Time // end of the lifetime, without DNS records
}

// A lifetime is the smallest of several; the zero value is of none.
type lifetime struct {
	ttl time.Duration
	set bool
}

// add includes another lifetime.
func (l *lifetime) add(ttl time.Duration) {
	if !l.set || ttl < l.ttl {
		l.ttl, l.set = ttl, true
	}
}

// merge includes the lifetimes of o.
func (l *lifetime) merge(o lifetime) {
	if o.set {
		l.add(o.ttl)
	}
}

// bounded returns l between minTTL and maxTTL.
func (l lifetime) bounded() time.Duration { return min(max(l.ttl, minTTL), maxTTL) }

// run takes the steps in their order.
func (x *resolution) run(ctx context.Context) (*finding, error) {
	n := x.query.Name
	switch {
	case n.addr.IsValid():
		return x.literal("literal", n), nil
	case n.port != 0:
		return x.address(ctx, "port", n)
	case len(x.Hosts(n.host)) > 0:
		return x.address(ctx, "hosts", n)
	case isLocal(n.host):
		return x.address(ctx, "local", n)
	case x.query.Method == Addresses:
		return x.address(ctx, "address", n)
	case x.query.Method == DNSOnly:
		return x.records(ctx, n)
	}
	return x.discover(ctx)
}

// discover asks for the delegation file and for the domain's own records at the
// same time. A valid file decides.
func (x *resolution) discover(ctx context.Context) (*finding, error) {
	type outcome struct {
		f   *finding
		err error
	}
	files := make(chan fileResult, 1)
	own := make(chan outcome, 1)
	x.questions.Go(func() { files <- x.delegation(ctx) })
	x.questions.Go(func() {
		f, err := x.records(ctx, x.query.Name)
		own <- outcome{f, err}
	})
	var file fileResult
	select {
	case file = <-files:
	case o := <-own:
		if o.err == nil && x.query.WithoutFile != nil {
			x.wellKnown = "none"
			x.query.WithoutFile(x.result(o.f))
		}
		own <- o
		file = <-files
	}
	x.wellKnown, x.fileUnknown = file.status, file.unknown
	if file.name != (Name{}) {
		x.delegated, x.fileUntil = file.name, file.until
		return x.follow(ctx, file)
	}
	o := <-own
	return o.f, o.err
}

// follow goes on with the server name of a delegation file.
func (x *resolution) follow(ctx context.Context, file fileResult) (f *finding, err error) {
	n := file.name
	switch {
	case n.addr.IsValid():
		if x.forbids(n.addr) {
			return nil, forbiddenAddress(x.input, n.addr)
		}
		f = x.literal("literal", n)
	case n.port != 0:
		f, err = x.address(ctx, "port", n)
	default:
		f, err = x.records(ctx, n)
	}
	if err == nil {
		f.step = "well-known/" + f.step
		if !f.ttl.set {
			f.until = file.until
		}
	}
	return f, err
}

// records takes the steps that ask DNS about a host: SRV, HTTPS, addresses.
func (x *resolution) records(ctx context.Context, n Name) (*finding, error) {
	services := []string{service}
	if x.query.Purpose == Peer {
		services = []string{peerService, service}
	}
	for _, s := range services {
		x.askSRV(ctx, n.host, s)
	}
	x.ask(ctx, n.host, TypeHTTPS)
	x.askAddresses(ctx, n.host)

	var last *srvResult // the last service that was asked for
	for _, s := range services {
		last = x.srv(ctx, n, s)
		if last.err != nil {
			return nil, last.err
		}
		if last.finding != nil {
			return last.finding, nil
		}
		if last.degraded {
			break
		}
	}
	f, err := x.https(ctx, n)
	if f == nil && err == nil {
		f, err = x.address(ctx, "address", n)
	}
	if err != nil {
		return nil, err
	}
	f.degraded, f.skipped = last.degraded, last.skipped
	return f, nil
}

// literal returns the finding of an address.
func (x *resolution) literal(step string, n Name) *finding {
	r := Record{Target: n.addr.String(), Port: n.portOr(defaultPort),
		Verify: []string{n.addr.String()}}
	r.Addresses = append(r.Addresses, n.addr)
	return &finding{step: step, authority: n.String(), groups: x.eachTransport(r)}
}

// address returns the finding of the addresses of n.
func (x *resolution) address(ctx context.Context, step string, n Name) (*finding, error) {
	a := x.addresses(ctx, n.host)
	if a.err != nil {
		return nil, a.err
	}
	r := Record{Target: n.host, Port: n.portOr(defaultPort), Addresses: a.list, SNI: n.host,
		Verify: []string{n.host}}
	f := &finding{step: step, authority: n.String(), groups: x.eachTransport(r), ttl: a.ttl}
	if !a.ttl.set {
		f.until = x.Now().Add(minTTL) // the host's table may change
	}
	return f, nil
}

func (n Name) portOr(other uint16) uint16 {
	if n.port == 0 {
		return other
	}
	return n.port
}

// eachTransport returns a group with r for each transport that is spoken.
func (x *resolution) eachTransport(r Record) []Group {
	var groups []Group
	for _, t := range x.query.Transports {
		r.Transport = t
		groups = append(groups, Group{[]Record{r}})
	}
	return groups
}

// result returns f as a Result. It copies what two results may share.
func (x *resolution) result(f *finding) *Result {
	r := &Result{Step: f.step, Authority: f.authority, Skipped: f.skipped, Secure: f.secure,
		Degraded: f.degraded, Stale: f.stale, WellKnown: x.wellKnown, Delegated: x.delegated,
		FileUntil: x.fileUntil, FileUnknown: x.fileUnknown,
		TTL: -1, Until: f.until}
	for _, g := range f.groups {
		g.Records = slices.Clone(g.Records)
		for i := range g.Records {
			if name := x.query.ServerName; name != "" {
				g.Records[i].Verify, g.Records[i].SNI = []string{name}, sniOf(name)
			}
		}
		r.Groups = append(r.Groups, g)
	}
	switch {
	case f.degraded || f.stale:
		r.TTL = 0
	case f.ttl.set:
		r.TTL = f.ttl.bounded()
	}
	if r.TTL >= 0 {
		r.Until = x.Now().Add(r.TTL)
	}
	return r
}

// failure returns err as the error of the resolution.
func (x *resolution) failure(err error) *Error {
	var e *Error
	if !errors.As(err, &e) {
		e = dnsFailure(x.query.Name.String(), err)
	}
	e.WellKnown, e.Delegated, e.FileUnknown = x.wellKnown, x.delegated, x.fileUnknown
	return e
}
