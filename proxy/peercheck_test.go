package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"masquevpn/internal/federation"
)

// checker is what TestDelegationChecks needs of a peer.
type checker struct {
	owners *owners
	checks delegationChecks
	peer   *federation.Peer
	ca     *peerCA
	t      *testing.T
}

func newChecker(t *testing.T) *checker {
	ca := newPeerCA(t)
	return &checker{owners: new(owners), ca: ca, t: t, peer: &federation.Peer{Domain: "b.example",
		WellKnown: true, Roots: ca.pool()}}
}

// prove checks a certificate for a server and returns the identity.
func (c *checker) prove(server string) (federation.Identity, error) {
	c.t.Helper()
	leaf, err := x509.ParseCertificate(c.ca.issue(c.t, server).Certificate[0])
	if err != nil {
		c.t.Fatal(err)
	}
	chain := []*x509.Certificate{leaf}
	// A new resolver has no cache.
	v := &federation.Verifier{Resolver: c.owners.resolver()}
	_, failure := c.peer.Direct(chain, c.owners.now())
	if failure == nil {
		c.t.Fatal("the certificate needs no delegation")
	}
	found, _, err := c.checks.prove(context.Background(), v,
		pairKey{"b.example", "a.example"}, c.peer,
		chain, failure)
	return found.Identity, err
}

// TestDelegationChecks checks that the owner of a domain is asked once a minute
// after a failure, and that a stranger with a certificate of the right
// authority does not keep the peer away meanwhile.
func TestDelegationChecks(t *testing.T) {
	c := newChecker(t)
	c.owners.file = `{"masque.peer": "gw.hoster.example"}`
	want := func(what, server string, identity federation.Identity, asks bool) {
		t.Helper()
		before := c.owners.asked()
		got, err := c.prove(server)
		if err != nil || got != identity || (c.owners.asked() > before) != asks {
			t.Errorf("%s: got %v, %v, asked %v; want %v, asked %v", what, got, err,
				c.owners.asked() > before, identity, asks)
		}
	}
	want("the peer", "gw.hoster.example", federation.WellKnown, true)
	want("a stranger", "x.hoster.example", federation.None, true)
	want("the stranger again", "x.hoster.example", federation.None, false)
	want("the peer, a moment later", "gw.hoster.example", federation.WellKnown, false)
	c.owners.change(func(o *owners) { o.ahead = checkRetry })
	want("the peer, a minute later", "gw.hoster.example", federation.WellKnown, true)
}

// TestDelegationChecksWhileTheOwnerIsDown checks that a peer is told to come
// back, and not refused, when the owner of its domain could not be asked.
func TestDelegationChecksWhileTheOwnerIsDown(t *testing.T) {
	c := newChecker(t)
	c.owners.down = true
	if _, err := c.prove("gw.hoster.example"); err != nil {
		t.Errorf("the first check: %v", err)
	}
	if _, err := c.prove("gw.hoster.example"); !errors.Is(err, errTooManyChecks) {
		t.Errorf("the second check: got %v, want %v", err, errTooManyChecks)
	}
}

// TestDelegationChecksAtOnce checks the limits of checks that run at the same
// time, in all and of one pair.
func TestDelegationChecksAtOnce(t *testing.T) {
	var d delegationChecks
	pair := func(i int) pairKey { return pairKey{string(rune('a' + i)), "a.example"} }
	var first *delegationCheck
	for i := range maxChecks {
		c, _, err := d.begin(pair(i), time.Now())
		if c == nil || err != nil {
			t.Fatalf("check %d: %v", i, err)
		}
		if i == 0 {
			first = c
		}
	}
	if _, _, err := d.begin(pair(maxChecks), time.Now()); !errors.Is(err, errTooManyChecks) {
		t.Errorf("one more: got %v", err)
	}
	d.end(first, federation.Answer{}, false, time.Now())
	if c, _, err := d.begin(pair(1), time.Now()); c != nil || !errors.Is(err, errTooManyChecks) {
		t.Errorf("a second one of a pair: got %v", err)
	}
	if c, _, err := d.begin(pair(0), time.Now()); c == nil || err != nil {
		t.Errorf("after the end of one: got %v", err)
	}
}
