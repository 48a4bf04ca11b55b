package discovery

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// maxSRV limits the SRV records of a domain that are used.
const maxSRV = 16

// A Reason says why a record is skipped.
type Reason string

// The reasons.
const (
	TooMany           Reason = "too many" // beyond the first 16
	PortZero          Reason = "port 0"
	NotAHostName      Reason = "not a host name"
	Duplicate         Reason = "duplicate" // another record has the same target and port
	Alias             Reason = "alias"     // the target is one, which RFC 2782 forbids
	NoTargetAddresses Reason = "no addresses"
	ForbiddenTarget   Reason = "forbidden address"
	TemporaryFailure  Reason = "temporary failure"
)

// describe returns r for a message.
func (r Reason) describe() string {
	switch r {
	case Alias:
		return "an alias"
	case Duplicate:
		return "a duplicate"
	}
	return string(r)
}

// A Skipped is an SRV record that is not used.
type Skipped struct {
	Record string // as in a zone file, behind the protocol label of its owner
	Reason Reason
	target string
	port   uint16
}

// MarshalJSON returns the record and the reason.
func (s Skipped) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]string{"record": s.Record, "reason": string(s.Reason)})
}

// A candidate is an SRV record under consideration.
type candidate struct {
	SRV
	transport Transport
	signed    bool
	ttl       time.Duration
	host      string // Target as a host name, "" if it is none
	skip      Reason // "" if it is used
	addresses addressList
}

// An srvResult is the outcome of the records of one service. If finding and err
// are nil, the next step follows: there are no records, or they could not be
// asked for (degraded).
type srvResult struct {
	finding  *finding
	err      *Error
	degraded bool
	skipped  []Skipped
}

// An srvAnswer is the answer for one transport.
type srvAnswer struct {
	transport Transport
	*Answer
	err error
}

// srvOwner returns the owner name of the records of a service, and reports
// whether it is short enough to be one.
func srvOwner(host, service string, t Transport) (string, bool) {
	owner := "_" + service + "." + t.label() + "." + host
	return owner, len(owner) <= maxNameLength
}

// askSRV asks for the records of a service without waiting for the answers,
// and for the addresses of former targets, which may have to serve.
func (x *resolution) askSRV(ctx context.Context, host, service string) {
	for _, t := range []Transport{H3, H2} {
		if owner, ok := srvOwner(host, service, t); ok {
			x.ask(ctx, owner, TypeSRV)
		}
	}
	if former := x.formerSRV(host, service); former != nil {
		for _, c := range former.used {
			x.askAddresses(ctx, c.host)
		}
	}
}

// srv decides by the SRV records of a service.
func (x *resolution) srv(ctx context.Context, n Name, service string) *srvResult {
	var answers []srvAnswer
	for _, t := range []Transport{H3, H2} {
		if owner, ok := srvOwner(n.host, service, t); ok {
			a, err := x.ask(ctx, owner, TypeSRV).wait()
			answers = append(answers, srvAnswer{t, a, err})
		}
	}
	var failed error
	exists := false
	for _, a := range answers {
		switch {
		case a.err != nil:
			failed = a.err
		case x.query.DNSSEC == DNSSECRequire && !a.Secure:
			return &srvResult{err: notSecure(n.host)}
		}
		exists = exists || len(a.SRV) > 0
	}
	list, other := x.candidates(answers)
	x.judge(ctx, list)
	res := &srvResult{skipped: skipped(list)}
	used := slices.DeleteFunc(slices.Clone(list), func(c *candidate) bool { return c.skip != "" })
	if len(used) > 0 {
		res.finding = x.found(n, service, used)
		res.finding.skipped = res.skipped
		x.remember(n.host, service, used, res.finding.ttl.bounded())
		return res
	}
	for _, c := range list {
		if failed == nil && c.skip == TemporaryFailure {
			failed = errTimeout
		}
	}
	switch {
	case failed != nil:
		x.lastResort(ctx, n, service, failed, res)
	case !exists:
	case len(list) > 0:
		res.err = unusableRecords(n.host, res.skipped)
	case other != "":
		res.err = otherTransport(n.host, service, other)
	default:
		res.err = notOffered(n.host)
	}
	if res.err != nil {
		res.err.Skipped = res.skipped
	}
	return res
}

// candidates returns the records of transports that the caller speaks, by
// priority, and a transport that it does not speak and that has records. A
// record with the target "." that is the only one of its owner is none.
func (x *resolution) candidates(answers []srvAnswer) (list []*candidate, other Transport) {
	for _, a := range answers {
		if a.err != nil || len(a.SRV) == 1 && a.SRV[0].Target == "." {
			continue
		}
		for _, r := range a.SRV {
			if !x.query.speaks(a.transport) {
				if r.Target != "." {
					other = a.transport
				}
				continue
			}
			c := &candidate{SRV: r, transport: a.transport, signed: a.Secure &&
				x.query.DNSSEC != DNSSECOff,
				ttl: a.TTL}
			c.host, _ = parseHost(r.Target)
			list = append(list, c)
		}
	}
	slices.SortStableFunc(list, func(a, b *candidate) int {
		return cmp.Compare(a.Priority, b.Priority)
	})
	return list, other
}

// judge decides which candidates are used, and looks up their addresses.
func (x *resolution) judge(ctx context.Context, list []*candidate) {
	type server struct {
		host      string
		port      uint16
		transport Transport
	}
	seen := make(map[server]bool)
	for i, c := range list {
		s := server{c.host, c.Port, c.transport}
		switch {
		case i >= maxSRV:
			c.skip = TooMany
		case c.host == "":
			c.skip = NotAHostName
		case c.Port == 0:
			c.skip = PortZero
		case seen[s]:
			c.skip = Duplicate
		default:
			seen[s] = true
			x.askAddresses(ctx, c.host)
		}
	}
	for _, c := range list {
		if c.skip == "" {
			c.addresses = x.addresses(ctx, c.host)
			c.skip = c.addresses.skip()
		}
	}
}

// skip returns why a record with the target's addresses a is skipped, or "".
func (a *addressList) skip() Reason {
	switch {
	case a.aliased || a.err != nil && a.err.Code == AliasLoop:
		return Alias
	case a.err == nil:
		return ""
	}
	switch a.err.Code {
	case NoAddresses:
		return NoTargetAddresses
	case ForbiddenAddress:
		return ForbiddenTarget
	}
	return TemporaryFailure
}

// skipped returns those of list that are not used.
func skipped(list []*candidate) []Skipped {
	var s []Skipped
	for _, c := range list {
		if c.skip != "" {
			s = append(s, Skipped{Record: clean(c.transport.label() + " " + c.String()),
				Reason: c.skip,
				target: clean(strings.TrimSuffix(c.Target, ".")), port: c.Port})
		}
	}
	return s
}

// found returns the finding of usable records, which are sorted by priority.
func (x *resolution) found(n Name, service string, used []*candidate) *finding {
	f := &finding{step: "srv", authority: n.host, secure: true}
	if service == peerService {
		f.step = "srv-fed"
	}
	for i, c := range used {
		r := Record{Target: c.host, Port: c.Port, Transport: c.transport,
			Priority: c.Priority, Weight: c.Weight,
			Addresses: c.addresses.list, SNI: n.host, Verify: []string{n.host}, Signed: c.signed}
		if c.signed {
			r.SNI = c.host
			if c.host != n.host {
				r.Verify = append(r.Verify, c.host)
			}
		}
		f.secure = f.secure && c.signed
		f.ttl.add(c.ttl)
		f.ttl.merge(c.addresses.ttl)
		if i == 0 || used[i-1].Priority != c.Priority {
			f.groups = append(f.groups, Group{})
		}
		g := &f.groups[len(f.groups)-1]
		g.Records = append(g.Records, r)
	}
	x.Resolver.mu.Lock()
	defer x.Resolver.mu.Unlock()
	for _, g := range f.groups {
		draw(x.Rand, g.Records)
	}
	return f
}

// An srvKey names the records of a service that a kind of query found.
type srvKey struct {
	host, service string
	purpose       Purpose
	dnssec        DNSSEC
	private       bool
	transports    string
}

// A formerSRV has the records that an earlier resolution used.
type formerSRV struct {
	used  []*candidate // never changed
	until time.Time
}

func (x *resolution) srvKey(host, service string) srvKey {
	k := srvKey{host: host, service: service, purpose: x.query.Purpose, dnssec: x.query.DNSSEC,
		private: x.query.Private}
	for _, t := range x.query.Transports {
		k.transports += string(t)
	}
	return k
}

// formerSRV returns the records that an earlier resolution used, if they may
// still serve, else nil.
func (x *resolution) formerSRV(host, service string) *formerSRV {
	x.Resolver.mu.Lock()
	defer x.Resolver.mu.Unlock()
	f := x.former[x.srvKey(host, service)]
	if f == nil || x.Now().After(f.until.Add(staleness)) {
		return nil
	}
	return f
}

// remember keeps records that were found for later resolutions.
func (x *resolution) remember(host, service string, used []*candidate, ttl time.Duration) {
	x.Resolver.mu.Lock()
	defer x.Resolver.mu.Unlock()
	if x.former == nil {
		x.former = make(map[srvKey]*formerSRV)
	}
	key := x.srvKey(host, service)
	if x.former[key] == nil && len(x.former) >= maxCached {
		oldest := srvKey{}
		for k, f := range x.former {
			if o := x.former[oldest]; o == nil || f.until.Before(o.until) {
				oldest = k
			}
		}
		delete(x.former, oldest)
	}
	x.former[key] = &formerSRV{used, x.Now().Add(ttl)}
}

// lastResort decides when records could not be asked for: former records serve;
// else clients without DNSSEC go on without records.
func (x *resolution) lastResort(ctx context.Context, n Name, service string, failed error,
	res *srvResult) {
	if former := x.formerSRV(n.host, service); former != nil {
		res.finding = x.found(n, service, x.current(ctx, former))
		res.finding.stale, res.finding.skipped = true, res.skipped
		return
	}
	if x.query.Purpose == Client && x.query.DNSSEC == DNSSECOff {
		res.degraded = true
		x.logger().Warn("SRV could not be looked up, trying the addresses of the name",
			"domain", n.host, "error", failed)
		return
	}
	res.err = dnsFailure(n.host, failed)
}

// current returns the former records with the addresses that their targets have
// now, or had when they cannot be looked up.
func (x *resolution) current(ctx context.Context, former *formerSRV) []*candidate {
	var list []*candidate
	for _, c := range former.used {
		now := *c
		if a := x.addresses(ctx, c.host); a.skip() == "" {
			now.addresses = a
		}
		list = append(list, &now)
	}
	return list
}
