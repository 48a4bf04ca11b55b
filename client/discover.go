package client

import (
	"context"
	"errors"
	"log/slog"
	"net/http/httptrace"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/dnsclient"
	"masquevpn/internal/federation"
	"masquevpn/internal/nat64"
	"masquevpn/internal/resolver"
)

const (
	// fileDelay is how much longer than for DNS a client waits for the
	// delegation file before it dials the servers found without.
	fileDelay = 500 * time.Millisecond

	// minResolveInterval is the time between two resolutions if all servers
	// found by the first one fail.
	minResolveInterval = 10 * time.Second

	// translatorTimeout limits the query for the NAT64 of the host's network,
	// and maxTranslators the prefixes that are tried.
	translatorTimeout = 2 * time.Second
	maxTranslators    = 2
)

// resolution is an outcome of Resolve.
type resolution struct {
	result *discovery.Result
	err    error
}

// earlyDial dials the servers found without the delegation file: fileDelay
// after DNS, or at once if these are at the addresses of the domain, where the
// web server is too. A server that answers before fileDelay waits for the file,
// if the web server has been reached.
type earlyDial struct {
	result *discovery.Result
	cancel context.CancelFunc // nil before the start
	done   chan earlyOutcome  // receives one value; nil before the start and after the value
	conn   *dial.Conn         // the server that answered, until it is used or closed
	err    error              // why none did
}

type earlyOutcome struct {
	conn *dial.Conn
	err  error
}

// connect resolves the proxy and connects to it. A former result is used until
// its lifetime ends, or until all of its servers fail.
func (d *dialer) connect(ctx context.Context) (*dial.Conn, error) {
	if r := d.result; r != nil && (r.Until.IsZero() || time.Now().Before(r.Until)) &&
		(!d.failed || time.Since(d.resolvedAt) < minResolveInterval) {
		return d.connectTo(ctx, r)
	}
	resolved := make(chan resolution, 1)
	own := make(chan *discovery.Result, 1)
	query := d.target.query
	if query.DNSSEC != discovery.DNSSECRequire && !d.target.isPeer() {
		query.WithoutFile = func(r *discovery.Result) { own <- r }
	}
	var webReached atomic.Bool
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectDone: func(network, _ string, err error) {
			if network == "tcp" && err == nil {
				webReached.Store(true)
			}
		}})
	// The resolution goes on when a server answers before the delegation file
	// is there, so that a failure of the file is known to the next one.
	go func() {
		r, err := d.resolver.Resolve(traced, query)
		resolved <- resolution{r, err}
	}()
	early := &earlyDial{} // not started
	var late <-chan time.Time
	waited := false
	for {
		select {
		case r := <-own:
			late = time.After(fileDelay)
			early.result = r
			if r.Step == "address" {
				d.dialEarly(ctx, early)
			}
		case <-late:
			waited = true
			switch {
			case early.conn != nil:
				d.keep(early.result)
				return early.conn, nil
			case early.cancel == nil:
				d.dialEarly(ctx, early)
			}
		case o := <-early.done:
			early.done, early.conn, early.err = nil, o.conn, o.err
			early.cancel()
			// The web server of the domain has the same addresses. If it has
			// not been reached after the two round trips of QUIC, the network
			// drops packets to it.
			if o.err == nil && (waited || !webReached.Load()) {
				d.keep(early.result)
				return o.conn, nil
			}
		case r := <-resolved:
			return d.connectResolved(ctx, r, early)
		}
	}
}

// dialEarly starts e.
func (d *dialer) dialEarly(ctx context.Context, e *earlyDial) {
	ctx, e.cancel = context.WithCancel(ctx)
	done := make(chan earlyOutcome, 1)
	e.done = done
	groups := d.translated(ctx, e.result)
	go func() {
		c, err := d.dialTo(ctx, groups)
		done <- earlyOutcome{c, err}
	}()
}

// stop ends e, and closes its connection.
func (d *dialer) stop(e *earlyDial) {
	if e.done != nil {
		e.cancel()
		o := <-e.done
		e.conn = o.conn
	}
	if e.conn != nil {
		d.closeConn(e.conn)
	}
}

// connectResolved connects to the servers of a finished resolution. If there is
// no delegation file, an early dial has them already.
func (d *dialer) connectResolved(ctx context.Context, r resolution, early *earlyDial) (
	*dial.Conn, error) {
	if r.err == nil && r.result.Delegated == (discovery.Name{}) && early.cancel != nil {
		if early.done != nil {
			o := <-early.done
			early.conn, early.err = o.conn, o.err
		}
		d.keep(r.result)
		d.failed = early.err != nil
		return early.conn, early.err
	}
	d.stop(early)
	result, err := d.resolved(r)
	if err != nil {
		return nil, err
	}
	return d.connectTo(ctx, result)
}

// resolved returns the result of a resolution. If DNS fails, it returns the
// last result.
func (d *dialer) resolved(r resolution) (*discovery.Result, error) {
	if r.err == nil {
		d.keep(r.result)
		return r.result, nil
	}
	var e *discovery.Error
	if !errors.As(r.err, &e) {
		return nil, r.err
	}
	if d.result != nil && (e.Code == discovery.DNSFailure || e.Code == discovery.NoAddresses) {
		d.logger.Info("the proxy's name could not be resolved, trying its last addresses",
			"error", e.Reason)
		return d.result, nil
	}
	return nil, fail(causeName, e, e.Reason, e.Remedy)
}

// keep makes r the result of the next dials.
func (d *dialer) keep(r *discovery.Result) {
	before := d.result
	d.result, d.resolvedAt, d.failed = r, time.Now(), false
	level := slog.LevelDebug
	if before != nil && (before.Step != r.Step || before.Authority != r.Authority) {
		level = slog.LevelInfo
	}
	d.logger.Log(context.Background(), level, "resolved", "step", r.Step, "authority", r.Authority)
	if d.found != nil {
		d.found(r)
	}
}

// connectTo connects to a server of r.
func (d *dialer) connectTo(ctx context.Context, r *discovery.Result) (*dial.Conn, error) {
	c, err := d.dialTo(ctx, d.translated(ctx, r))
	d.failed = err != nil
	return c, err
}

// translated returns the groups of r. If this host has no route to any of their
// addresses, it adds the addresses that the NAT64 of the host's network
// translates to the IPv4 addresses (RFC 7050, RFC 6052). Forged DNS answers do
// no harm here, because the peer has to prove that it is the proxy.
func (d *dialer) translated(ctx context.Context, r *discovery.Result) []discovery.Group {
	addrs := r.Addrs()
	d.lastAddrs = addrs
	d.report("the name %s leads to %v", d.target.host, addrs)
	prefixes := d.translators(ctx, addrs)
	if len(prefixes) == 0 {
		return r.Groups
	}
	var groups []discovery.Group
	for _, g := range r.Groups {
		g.Records = slices.Clone(g.Records)
		for i := range g.Records {
			list := slices.Clone(g.Records[i].Addresses)
			for _, p := range prefixes {
				for _, a := range g.Records[i].Addresses {
					if translated, ok := nat64.Embed(p, a); ok {
						list = append(list, translated)
					}
				}
			}
			g.Records[i].Addresses = discovery.ByTurns(list)
		}
		groups = append(groups, g)
	}
	d.lastAddrs = (&discovery.Result{Groups: groups}).Addrs()
	d.logger.Info("this host has no route to the proxy's IPv4 address, trying the network's NAT64",
		"prefix", prefixes)
	d.report("this host has no route to the proxy's IPv4 address; its network has a NAT64 with %v",
		prefixes)
	return groups
}

// translators returns the prefixes of the NAT64 of the host's network, if this
// host needs it for one of addrs.
func (d *dialer) translators(ctx context.Context, addrs []netip.AddrPort) []netip.Prefix {
	ipv4 := slices.ContainsFunc(addrs, func(a netip.AddrPort) bool { return a.Addr().Is4() })
	if !ipv4 || slices.ContainsFunc(addrs, func(a netip.AddrPort) bool {
		return d.hasRoute(a.Addr())
	}) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, translatorTimeout)
	defer cancel()
	answer, err := d.resolver.DNS.Lookup(ctx, strings.TrimSuffix(nat64.Name, "."),
		discovery.TypeAAAA)
	if err != nil {
		d.logger.Debug("no NAT64 is known in the network of this host", "error", err)
		return nil
	}
	prefixes := nat64.Prefixes(answer.Addrs)
	return prefixes[:min(len(prefixes), maxTranslators)]
}

// newResolver returns a resolver that works outside the tunnel, so that a
// client with a dead tunnel can resolve the proxy.
func (d *dialer) newResolver(c resolver.Config) *discovery.Resolver {
	c.Servers, c.Local, c.Control = d.servers, d.lookupLocal, d.dial.Control
	c.UserAgent, c.Logger = userAgent, d.logger
	return resolver.New(c)
}

// servers returns the nameservers to ask: those of the configuration; while the
// host's resolver asks the tunnel's servers, the upstream ones; else the
// host's.
func (d *dialer) servers() []dnsclient.Server {
	if len(d.trusted) > 0 {
		return resolver.Trusted(d.trusted)()
	}
	list := resolver.HostServers()
	own, all := d.ownServers()
	if !all && (len(own) == 0 || !slices.ContainsFunc(list, func(s dnsclient.Server) bool {
		return s.Addr.Addr().IsLoopback()
	})) {
		return list
	}
	list = nil
	for _, a := range own {
		list = append(list, dnsclient.Server{Addr: a})
	}
	return list
}

// ownServers returns nameservers that replace the host's, and reports whether
// they replace all of them or only a server on this host.
func (d *dialer) ownServers() (servers []netip.AddrPort, all bool) {
	if d.upstream != nil {
		if servers, all = d.upstream(); all {
			return servers, true
		}
	}
	return d.nameservers, false
}

// lookupLocal looks up a name of the local network.
func (d *dialer) lookupLocal(ctx context.Context, name string) ([]netip.Addr, error) {
	servers, all := d.ownServers()
	if all && len(servers) == 0 {
		return nil, errors.New("no nameservers besides those of the tunnel")
	}
	return dnsclient.LookupLocal(ctx, name, servers, all, d.dial.Control)
}

// noteDiscovery updates the status with a result of discovery.
func (c *Client) noteDiscovery(r *discovery.Result) {
	if !c.target.query.Name.Discovers() {
		return
	}
	d := &connectip.DiscoveryStatus{Input: c.target.host, Step: r.Step, Authority: r.Authority,
		WellKnown: r.WellKnown, Secure: r.Secure, Degraded: r.Degraded, Stale: r.Stale}
	for _, g := range r.Groups {
		d.Records += len(g.Records)
	}
	if !r.Until.IsZero() {
		d.Until = &r.Until
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Discovery = d
}

// peerStatus returns the status of the peer that d leads to, or nil if the
// client stands for a user. The server has proved a name that stands for the
// peer's domain: in a certificate, by the delegation file, or by a signed
// record.
func (c *Client) peerStatus(d *dialed) *connectip.PeerStatus {
	if !c.target.isPeer() {
		return nil
	}
	identity := federation.Certificate
	switch r := c.dialer.result; {
	case d.record.Signed && d.name == d.record.Target && d.name != c.target.pair.To:
		identity = federation.DNSSEC
	case r.Delegated != (discovery.Name{}) && d.name != c.target.pair.To:
		identity = federation.WellKnown
	}
	return &connectip.PeerStatus{Domain: c.target.pair.To, Local: c.target.pair.From,
		Identity: identity.String()}
}
