package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"time"

	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/doctor"
)

// publishedCheck compares a publication with the results of resolving its
// domain.
type publishedCheck struct {
	*publication
	report *doctor.Report
	local  []netip.Addr // this host's
	now    time.Time
	// peers has the settings by which peers resolve the domain. If hasPeers is
	// set, the domain has to lead them here too.
	peers    discovery.Query
	hasPeers bool
	// keyOf connects to an address of a record, and returns the pin of the
	// server's certificate.
	keyOf func(ctx context.Context, r discovery.Record) (pin string, err error)
}

var errOtherKey = errors.New("the server there has another certificate")

// run resolves the domain as clients and as peers do.
func (c *publishedCheck) run(ctx context.Context, r *discovery.Resolver, dnssec discovery.DNSSEC) {
	if c.leaf == nil {
		c.report.Fail(c.source+": no certificate yet", "start the proxy, which gets one")
	} else {
		c.report.Certificate(doctor.Credential{Label: c.source, Chain: []*x509.Certificate{c.leaf},
			Usage: x509.ExtKeyUsageServerAuth, Renewal: "renew it"}, c.now)
	}
	name, err := discovery.ParseInput(c.domain)
	if err != nil {
		c.report.Fail(err.Error(), "")
		return
	}
	query := discovery.Query{Name: name, DNSSEC: dnssec, Private: true,
		Transports: []discovery.Transport{discovery.H3}}
	clients, err := r.Resolve(ctx, query)
	c.compare(ctx, "clients", clients, err, c.report.Fail)
	query.Purpose, query.Private, query.DNSSEC = discovery.Peer, c.peers.Private, c.peers.DNSSEC
	peers, err := r.Resolve(ctx, query)
	if err == nil && clients != nil && peers.Step == clients.Step &&
		reflect.DeepEqual(peers.Groups, clients.Groups) {
		c.report.OK("peers: as clients")
		return
	}
	fail := c.report.Warn
	if c.hasPeers {
		fail = c.report.Fail
	}
	c.compare(ctx, "peers", peers, err, fail)
}

// compare reports how a result differs from a proxy that is this one. Findings
// begin with who.
func (c *publishedCheck) compare(ctx context.Context, who string, r *discovery.Result, err error,
	fail func(finding, remedy string)) {
	if err != nil {
		e, ok := errors.AsType[*discovery.Error](err)
		if !ok {
			fail(who+": "+err.Error(), "")
			return
		}
		c.reportFile(who, e.WellKnown)
		c.reportSkipped(who, e.Skipped)
		fail(who+": "+e.Reason, e.Remedy)
		return
	}
	c.reportFile(who, r.WellKnown)
	c.reportSkipped(who, r.Skipped)
	if r.Degraded {
		c.report.Warn(who+": SRV records could not be looked up", "check this host's DNS")
	}
	var records []discovery.Record
	for _, g := range r.Groups {
		records = append(records, g.Records...)
	}
	places := c.places(ctx, records)
	found := false
	for i := range records {
		found = found || places[i].here()
	}
	for i := range records {
		c.reportRecord(who, r.Step, &records[i], places[i], found, fail)
	}
	if !found {
		fail(fmt.Sprintf("%s: %s does not lead to this proxy", who, c.domain),
			"publish one of the ways of "+program+" publish")
	}
}

// A place says for each address of a record why it is not this proxy: nil if it
// is.
type place []error

// here reports whether one of the addresses is this proxy.
func (p place) here() bool {
	for _, err := range p {
		if err == nil {
			return true
		}
	}
	return false
}

// places finds out which addresses of records are this proxy: those of this
// host at which it listens, and others at which a server has its certificate.
func (c *publishedCheck) places(ctx context.Context, records []discovery.Record) []place {
	all := make([]place, len(records))
	var asking sync.WaitGroup
	for i, r := range records {
		all[i] = make(place, len(r.Addresses))
		for j, a := range r.Addresses {
			if c.listensOn(netip.AddrPortFrom(a, r.Port), c.local) {
				continue
			}
			one := r
			one.Addresses = []netip.Addr{a}
			asking.Go(func() {
				pin, err := c.keyOf(ctx, one)
				if err == nil && (c.leaf == nil || pin != pinOf(c.leaf)) {
					err = errOtherKey
				}
				all[i][j] = err
			})
		}
	}
	asking.Wait()
	return all
}

// connect is keyOf.
func (c *publishedCheck) connect(ctx context.Context, r discovery.Record) (pin string, err error) {
	d := &dial.Dialer{Logger: slog.New(slog.DiscardHandler),
		Verify: func(s tls.ConnectionState, _ *discovery.Record) (string, error) {
			pin = pinOf(s.PeerCertificates[0])
			return "", nil
		}}
	conn, err := d.Dial(ctx, []discovery.Group{{Records: []discovery.Record{r}}})
	if err != nil {
		if e, ok := errors.AsType[*dial.Error](err); ok && e.Failure == dial.Silence {
			return "", errors.New("it does not answer")
		} else if ok {
			err = e.Err
		}
		return "", err
	}
	conn.Close()
	return pin, nil
}

// reportRecord reports where a record leads, and whether the certificate fits.
// found is set if some record leads to this proxy.
func (c *publishedCheck) reportRecord(who, step string, r *discovery.Record, p place, found bool,
	fail func(finding, remedy string)) {
	target := fmt.Sprintf("%s port %d", r.Target, r.Port)
	if !p.here() {
		report := fail
		if found {
			report = c.report.Warn // the domain has several hosts
		}
		for i, a := range r.Addresses {
			report(fmt.Sprintf("%s: %s leads to %s at %s, which is not this proxy: %v", who, step,
				target, a, p[i]), "")
		}
		return
	}
	for i, a := range r.Addresses {
		if p[i] != nil {
			fail(fmt.Sprintf("%s: %s leads to %s at %s, which is not this proxy: %v", who, step,
				target, a, p[i]), "correct the addresses of "+r.Target)
		} else {
			c.report.OK("%s: %s leads to %s at %s, this proxy", who, step, target, a)
		}
	}
	if c.leaf == nil {
		return
	}
	for _, name := range r.Verify {
		if c.leaf.VerifyHostname(name) == nil {
			c.report.OK("%s: the certificate is for %s", who, name)
			return
		}
	}
	needed := strings.Join(r.Verify, " or ")
	remedy := "get one for " + needed
	if step == "srv" || step == "srv-fed" {
		remedy += ", publish the delegation file, or sign the zone and set discovery.dnssec " +
			"in clients"
	}
	fail(fmt.Sprintf("%s: the certificate is not for %s, but for %s", who, needed,
		strings.Join(names(c.leaf), ", ")), remedy)
}

// reportFile reports a delegation file that is there and not used.
func (c *publishedCheck) reportFile(who, status string) {
	reason, failed := strings.CutPrefix(status, "error: ")
	if !failed || reason == "unreachable" || strings.HasPrefix(reason, "status 4") {
		return
	}
	c.report.Warn(fmt.Sprintf("%s: the delegation file is not used (%s)", who, reason),
		"correct https://"+c.domain+discovery.FilePath)
}

// reportSkipped reports records that are not used.
func (c *publishedCheck) reportSkipped(who string, list []discovery.Skipped) {
	for _, s := range list {
		c.report.Warn(fmt.Sprintf("%s: the SRV record %q is not used (%s)", who, s.Record,
			s.Reason),
			"correct it, or remove it")
	}
}
