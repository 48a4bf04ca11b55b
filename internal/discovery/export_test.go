package discovery

import (
	"net/http"
	"net/netip"
	"time"
)

// For tests of package discovery_test.
const (
	MaxSRV            = maxSRV
	MaxParallel       = maxParallel
	MaxCached         = maxCached
	ResolutionTimeout = resolutionTimeout
	AnswerTimeout     = answerTimeout
	FileTimeout       = fileTimeout
	MinLifetime       = minLifetime
	MaxLifetime       = maxLifetime
)

// Cached returns how many delegation files and SRV records r keeps, and whether
// the file of a domain is among them.
func (r *Resolver) Cached(domain string) (files, records int, has bool) {
	_, has = r.files[fileKey{domain, Client, true}]
	return len(r.files), len(r.former), has
}

// Forbids reports whether no result of q may have an address that came from the
// network.
func (q *Query) Forbids(a netip.Addr) bool { return (&resolution{query: q}).forbids(a) }

// FileLifetime returns the lifetime of a delegation file with the given header.
func FileLifetime(h http.Header, now time.Time) time.Duration {
	x := &resolution{Resolver: &Resolver{Now: func() time.Time { return now }, NoJitter: true}}
	return x.fileLifetime(h)
}
