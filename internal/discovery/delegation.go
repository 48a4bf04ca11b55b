package discovery

import (
	"context"
	"strings"
	"time"
)

// A Delegation is what the owner of a domain says about the servers that may
// stand for it.
type Delegation struct {
	// Names are the hosts that may stand for the domain, none if its owner
	// names no other.
	Names []string
	// Until is the end of the lifetime of a definite answer.
	Until time.Time
	// Temporary is set if the owner could not be asked, so that Names says
	// nothing unless a former answer serves.
	Temporary bool
	// Status says how asking went: as Result.WellKnown, or the failure of DNS.
	Status string
}

// DelegatedByFile asks for the delegation file of the domain of q, for the
// purpose of q, and returns the host in it. It asks for nothing else, so the
// host may have no address.
func (r *Resolver) DelegatedByFile(ctx context.Context, q Query) Delegation {
	ctx, cancel := context.WithTimeout(ctx, resolutionTimeout)
	x := newResolution(r, &q)
	defer x.questions.Wait()
	defer cancel()
	if !q.Name.Discovers() {
		return Delegation{Until: r.Now().Add(maxTTL), Status: "none"}
	}
	res := x.delegation(ctx)
	d := Delegation{Until: res.until, Status: res.status}
	switch {
	case res.name != (Name{}):
		d.Temporary = res.status == "stale"
		d.Names = []string{res.name.verifyName()}
	default:
		d.Temporary, d.Until = x.failedTemporarily(res.status)
	}
	return d
}

// failedTemporarily reports whether the last failure of the resolution's file
// was a temporary one, and returns when the file is asked for again.
func (x *resolution) failedTemporarily(status string) (bool, time.Time) {
	f := x.file(fileKey{x.input, x.query.Purpose, x.query.Private})
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	// A resolution that ended while it asked has noted nothing.
	noted := x.Now().Before(f.notBefore)
	return !noted || f.failures > 0, f.notBefore
}

// verifyName returns the name that a certificate of the server n has.
func (n Name) verifyName() string {
	if n.addr.IsValid() {
		return n.addr.String()
	}
	return n.host
}

// DelegatedBySRV asks for the SRV records of the domain of q, those for peers
// and, when there are none, those for clients, and returns the targets of the
// signed ones. It does not look for their addresses.
func (r *Resolver) DelegatedBySRV(ctx context.Context, q Query) Delegation {
	ctx, cancel := context.WithTimeout(ctx, resolutionTimeout)
	x := newResolution(r, &q)
	defer x.questions.Wait()
	defer cancel()
	d := Delegation{Until: r.Now().Add(maxTTL), Status: "none"}
	if !q.Name.Discovers() {
		return d
	}
	for _, service := range []string{peerService, service} {
		if x.signedTargets(ctx, service, &d) {
			break
		}
	}
	return d
}

// signedTargets adds the targets of the signed records of a service to d. It
// reports whether d is complete: there are records, or none could be asked for.
func (x *resolution) signedTargets(ctx context.Context, service string, d *Delegation) bool {
	for _, t := range []Transport{H3, H2} {
		if owner, ok := srvOwner(x.input, service, t); ok {
			x.ask(ctx, owner, TypeSRV)
		}
	}
	exists := false
	var ttl lifetime
	for _, t := range []Transport{H3, H2} {
		owner, ok := srvOwner(x.input, service, t)
		if !ok {
			continue
		}
		a, err := x.ask(ctx, owner, TypeSRV).wait()
		if err != nil {
			d.Temporary, d.Status = true, clean(err.Error())
			continue
		}
		for _, rec := range a.SRV {
			exists = true
			ttl.add(a.TTL)
			host, err := parseHost(rec.Target)
			if a.Secure && err == nil && strings.TrimSuffix(rec.Target, ".") != "" {
				d.Names = append(d.Names, host)
			}
		}
	}
	if exists {
		d.Until = x.Now().Add(ttl.bounded())
		if !d.Temporary {
			d.Status = "ok"
		}
	}
	return exists || d.Temporary
}
