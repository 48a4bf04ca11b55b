package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"sync"
	"time"

	"masquevpn/internal/federation"
)

const (
	// maxChecks limits the owners of domains that are asked for delegations at
	// the same time.
	maxChecks = 8
	// checkTimeout limits one of these. A connection without an accepted
	// request ends a little later.
	checkTimeout = 8 * time.Second
	// checkRetry is the time between two checks of one pair after a failure.
	checkRetry = time.Minute
)

// errTooManyChecks is the error for a pair whose delegation is not asked for
// now.
var errTooManyChecks = errors.New("too many delegations of peers are being asked for")

// delegationChecks asks the owners of peers' domains for delegations. It limits
// how often: strangers with a certificate of an authority that the operator
// trusts can cause it.
type delegationChecks struct {
	mu      sync.Mutex // guards the fields below
	running int
	checks  map[pairKey]*delegationCheck
}

// delegationCheck is the last check of one pair. After a failure its answer
// judges the certificates that come before checkRetry has passed, so that a
// stranger cannot keep the peer away.
type delegationCheck struct {
	running bool
	failed  time.Time // zero: the last one succeeded
	answer  federation.Answer
}

// forget drops the former answers.
func (d *delegationChecks) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for pair, c := range d.checks {
		if !c.running {
			delete(d.checks, pair)
		}
	}
}

// begin starts a check of a pair. It returns nil with the answer of the last
// check if that has to do, and errTooManyChecks if there is none.
func (d *delegationChecks) begin(pair pairKey, now time.Time) (*delegationCheck,
	federation.Answer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.checks[pair]
	if c == nil {
		if d.checks == nil {
			d.checks = make(map[pairKey]*delegationCheck)
		}
		c = new(delegationCheck)
		d.checks[pair] = c
	}
	switch {
	case !c.failed.IsZero() && now.Sub(c.failed) < checkRetry && now.Sub(c.failed) >= 0:
		return nil, c.answer, nil
	case c.running || d.running >= maxChecks:
		return nil, federation.Answer{}, errTooManyChecks
	}
	c.running = true
	d.running++
	return c, federation.Answer{}, nil
}

// end notes the outcome of a check.
func (d *delegationChecks) end(c *delegationCheck, a federation.Answer, failed bool,
	now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.running, c.answer, c.failed = false, a, time.Time{}
	if failed {
		c.failed = now
	}
	d.running--
}

// prove returns the identity that a delegation gives to chain, after failure
// was all that it proves by itself. The error is errTooManyChecks if the owner
// of the domain was not asked and what it said last decides nothing.
func (d *delegationChecks) prove(ctx context.Context, v *federation.Verifier, pair pairKey,
	p *federation.Peer, chain []*x509.Certificate, failure *federation.Failure) (federation.Proof,
	*federation.Failure, error) {
	now := v.Resolver.Now()
	check, answer, err := d.begin(pair, now)
	if err != nil {
		return federation.Proof{}, failure, err
	}
	if check == nil {
		found, failed := p.ByAnswer(chain, answer, failure, now)
		if failed != nil && failed.Temporary {
			err = errTooManyChecks
		}
		return found, failed, err
	}
	failed := failure
	defer func() { d.end(check, answer, failed != nil, v.Resolver.Now()) }()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	answer = v.Ask(ctx, p)
	var found federation.Proof
	found, failed = p.ByAnswer(chain, answer, failure, v.Resolver.Now())
	return found, failed, nil
}
