package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlogwriter"

	"masquevpn/internal/capture"
	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/fault"
	"masquevpn/internal/federation"
	"masquevpn/internal/hostdns"
	"masquevpn/internal/resolver"
	"masquevpn/routing"
	"masquevpn/tun"
)

// DefaultMaxDelay is the longest wait between two attempts to connect if
// Config.MaxDelay is 0.
const DefaultMaxDelay = 30 * time.Second

// Config configures a Client. Proxy is required. The zero values of the other
// fields are valid, except that InstallRoutes and Reconnect are usually true.
type Config struct {
	// Name is the name of the tunnel. It appears in the status and the log, and
	// it identifies the client's rules and tables in the kernel.
	Name string

	// Proxy is the name of a domain, a host:port, an address, or a URI template
	// (RFC 9484 section 3). The proxy of a domain is discovered.
	Proxy string

	// TLS has the RootCAs that sign the proxy's certificate (nil: the host's),
	// the client's Certificates, and the ServerName that the certificate must
	// have (empty: the host of Proxy). Other fields apply too, except for those
	// that HTTP/3 determines. nil means the zero tls.Config.
	TLS *tls.Config

	// Token is the bearer token. Empty means that none is sent.
	Token string

	// Instance is a token that no other client uses at the same time. When a
	// client connects, the proxy ends an older session of the same user with
	// the same Instance, for example of a killed client, and passes its
	// addresses on. Empty means a random token.
	Instance string

	// Installation is a token that distinguishes the devices of a user, so that
	// a device gets the same addresses after a restart. It should be hard to
	// guess. Empty means that none is sent.
	Installation string

	// Target and IPProto are the scope of the request (RFC 9484 section 4.6).
	// Empty and "*" mean any.
	Target  string
	IPProto string

	// TUN configures the device. If MTU is 0, the device follows the path.
	TUN tun.Config

	// Request lists the addresses to request; 0.0.0.0/32 and ::/128 request any
	// address of their family. nil means one of each family. If the list is
	// empty but not nil, the client requests none and accepts the addresses
	// that the proxy assigns unprompted.
	Request []netip.Prefix

	// Static lists addresses to use. If it is not empty, the client requests
	// none.
	Static []netip.Prefix

	// InstallRoutes installs the accepted routes in the kernel.
	InstallRoutes bool

	// Accept limits the advertised routes that the client accepts. nil means no
	// limit.
	Accept []netip.Prefix

	// Exclude lists the destinations that bypass the tunnel.
	Exclude []netip.Prefix

	// HostRoutes selects the routes of the host that take precedence over the
	// tunnel's.
	HostRoutes routing.HostRoutes

	// Mark has the two bits of packet and connection marks that identify this
	// tunnel's own packets, see routing.Config. 0 means routing.DefaultMark.
	Mark uint32

	// KillSwitch is closed before the client sends anything and stays closed
	// when Run returns: the caller opens it. nil means that there is none.
	KillSwitch KillSwitch

	// Nameservers resolve the name of the proxy in place of a resolver on this
	// host, whose own queries a kill switch would drop. Empty means the host's
	// nameservers.
	Nameservers []netip.AddrPort

	// Discovery says which sources lead from a domain to its proxy.
	Discovery Discovery

	// Federation makes the client a gateway that links a domain with the domain
	// of another owner.
	Federation Federation

	// AdvertiseRoutes lists the networks behind this host that the proxy may
	// send to. They make this host a gateway that forwards packets (RFC 9484
	// section 8.2).
	AdvertiseRoutes []netip.Prefix

	// AssignPeer lists single addresses to assign to the proxy, usually from
	// AdvertiseRoutes.
	AssignPeer []netip.Prefix

	// DNS configures the host's resolver.
	DNS DNS

	// Congestion selects the congestion control of the connection. The zero
	// value is congestion.Inner in builds that support it.
	Congestion congestion.Mode

	// Reconnect makes the client retry after failures that may pass.
	Reconnect bool

	// MaxDelay limits the wait between two attempts to connect. 0 means
	// DefaultMaxDelay.
	MaxDelay time.Duration

	// Service means that nobody waits for the first connection. Fewer failures
	// are final then, see docs/failures.md.
	Service bool

	// Journal is the path of a file from which the next start cleans up after a
	// crash. Empty means that there is none.
	Journal string

	// Logger receives the log. nil means that nothing is logged.
	Logger *slog.Logger

	// Tap receives copies of the tunnel's packets. nil means that there is
	// none.
	Tap *capture.Tap

	// Tracer is the Tracer of quic.Config, for qlog. It may be nil.
	Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

	// OpenDevice, OpenNetwork and OpenResolver replace the TUN device, the
	// kernel's routing and the host's resolver. With both OpenDevice and
	// OpenNetwork the client needs no privileges. If OpenNetwork is set and one
	// of OpenResolver, OpenUnderlay and HostNetworks is nil, the client does
	// without that one.
	OpenDevice   func() (Device, error)
	OpenNetwork  func(Device) (Network, error)
	OpenResolver func(Device) (Resolver, error)

	// OpenUnderlay replaces the kernel's knowledge of the next hop to the
	// proxy.
	OpenUnderlay func() (Underlay, error)

	// HostNetworks replaces the kernel's knowledge of the addresses of this
	// host. It leaves out the addresses of the interface except.
	HostNetworks func(except string) ([]routing.HostNetwork, error)

	// Suspended replaces the clocks of the host. It returns the total time that
	// this host has been suspended since it booted.
	Suspended func() time.Duration
}

// Device exchanges packets with the host. *tun.Device implements it and
// documents the methods.
type Device interface {
	Name() string
	MTU() int
	BatchSize() int
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	Close() error
}

// Network configures the kernel for a Device. *routing.Manager implements it.
type Network interface {
	// Apply replaces the applied state.
	Apply(routing.State) error

	// FollowHost adapts the applied state to the host's networks and routes. It
	// returns texts about networks and routes of the host that use addresses of
	// the tunnel.
	FollowHost() (conflicts []string, err error)

	// Held returns the reason why the interface cannot have IPv6, so that the
	// kernel rejects IPv6 packets for the tunnel. It returns nil if it can.
	Held() error

	// Maintain restores the changes of other programs to the applied state
	// until ctx is done. It calls report like routing.Manager.Maintain, and
	// returns an error if the device is lost.
	Maintain(ctx context.Context, report func(routing.Health)) error

	// Close removes the applied state.
	Close() error
}

// KillSwitch drops packets that would leave this host outside a tunnel.
// *routing.KillSwitch implements it.
type KillSwitch interface {
	// Close drops all packets that leave through other interfaces than iface
	// ("": through any). It may be called repeatedly.
	Close(iface string) error

	// Maintain closes the kill switch again when another program opens it,
	// until ctx is done. It calls report with each change.
	Maintain(ctx context.Context, report func(routing.KillSwitchHealth)) error
}

// Federation configures a gateway that stands for a domain instead of a user.
// The zero value is a client of a user.
type Federation struct {
	// Domain is the gateway's own domain, which its certificate proves. Empty
	// means that the client stands for a user.
	Domain string

	// Peer is the domain of the other owner. Empty means the name in Proxy.
	Peer string
}

// Discovery configures how the proxy of a domain is found; see package
// internal/discovery. The zero value asks for everything that the domain's
// owner may publish, and believes no signature.
type Discovery struct {
	Method discovery.Method
	DNSSEC discovery.DNSSEC

	// Nameservers are asked in place of all others, and trusted to validate
	// signatures. Empty means those of Config.Nameservers or of the host.
	Nameservers []netip.AddrPort

	// CA holds the authorities of the domain's web server. nil means those of
	// the host.
	CA *x509.CertPool
}

// Kind classifies an Error. Its values are the exit codes of masque-client.
type Kind = fault.Kind

// The kinds of Error.
const (
	KindFailure      = fault.Failure      // any other failure
	KindUsage        = fault.Usage        // wrong configuration
	KindNotConnected = fault.NotConnected // used by masque-client alone
	KindCredentials  = fault.Credentials  // the proxy rejected the client's credentials
	KindUnreachable  = fault.Unreachable  // the proxy does not answer
	KindIdentity     = fault.Identity     // the peer did not prove to be the proxy
	KindPrivileges   = fault.Privileges   // missing privilege
	KindRefused      = fault.Refused      // addresses or routes not granted
)

// Error explains why there is no tunnel. Error returns one line with the Reason
// and the Remedy. If a field of Config is wrong, Key is its configuration key.
type Error = fault.Error

// usage returns an Error about the configuration key.
func usage(key, format string, args ...any) error {
	e := fail(causeConfiguration, nil, fmt.Sprintf(format, args...), "")
	e.Key = key
	return e
}

// target is the proxy that a Config names, and the request for it.
type target struct {
	query    discovery.Query
	template *connectip.Template // nil: the default one, where discovery leads
	scope    connectip.Scope
	host     string         // name or address, as configured
	port     string         // "443" if none is configured
	roots    *x509.CertPool // authorities of the certificate; nil: the host's
	clock    clock          // verifies certificates

	// pair are the domains that the request links; the zero Pair for a user.
	pair federation.Pair

	// names are the names that the certificate may have. server is the text for
	// the far end in messages, and mayChange is set if records of a domain
	// lead there, which its owner may change.
	names     []string
	server    string
	mayChange bool
}

// parseProxy parses raw, a Config.Proxy. A ServerName in config takes
// precedence over the host of raw.
func parseProxy(raw string, config *tls.Config) (target, error) {
	if raw == "" {
		return target{}, usage("proxy", "the name of the proxy is missing")
	}
	to := target{port: "443", clock: newClock(config)}
	name := raw
	if strings.Contains(raw, "/") {
		t, err := connectip.ParseTemplate(raw)
		if err != nil {
			return target{}, usage("proxy", "%v", err)
		}
		to.template, name = t, t.Host()
		if _, _, err := net.SplitHostPort(name); err != nil {
			name = net.JoinHostPort(strings.Trim(name, "[]"), to.port) // is never discovered
		}
	}
	n, err := discovery.ParseInput(name)
	if err != nil {
		return target{}, usageOf("proxy", err)
	}
	to.host = n.Host()
	if n.Addr().IsValid() {
		to.host = n.Addr().String()
	}
	if n.Port() != 0 {
		to.port = strconv.Itoa(int(n.Port()))
	}
	to.query = discovery.Query{Name: n, Transports: []discovery.Transport{discovery.H3},
		Private: true}
	if config != nil {
		to.query.ServerName, to.roots = config.ServerName, config.RootCAs
	}
	to.names, to.server = []string{cmp.Or(to.query.ServerName, to.host)}, to.host
	return to, nil
}

// usageOf returns an Error about the configuration key for a name that cannot
// be parsed.
func usageOf(key string, err error) error {
	var e *discovery.Error
	if !errors.As(err, &e) {
		return usage(key, "%v", err)
	}
	failure := fail(causeConfiguration, nil, e.Reason, e.Remedy)
	failure.Key = key
	return failure
}

// at returns to as a record of r found it.
func (to target) at(r *discovery.Result, record *discovery.Record) target {
	to.names, to.server, to.port = record.Verify, to.host, strconv.Itoa(int(record.Port))
	_, step, delegated := strings.Cut(r.Step, "/")
	if !delegated {
		step = r.Step
	}
	switch step {
	case "srv", "srv-fed", "https":
		kind := "SRV"
		if step == "https" {
			kind = "HTTPS"
		}
		to.server = fmt.Sprintf("%s (from %s of %s)", record.Target, kind, r.Authority)
		to.mayChange = true
	default:
		if delegated {
			to.server = fmt.Sprintf("%s (from the delegation file of %s)", record.Target, to.host)
		}
		to.mayChange = delegated || r.Degraded
	}
	return to
}

// resolverConfig returns the configuration of the resolver.
func (c *Config) resolverConfig() resolver.Config { return resolver.Config{CA: c.Discovery.CA} }

// isPeer reports whether the target is the server of a peer.
func (to *target) isPeer() bool { return to.pair != federation.Pair{} }

// pair returns the pair that c links. host is the name in c.Proxy.
func (c *Config) pair(host string) (p federation.Pair, err error) {
	if c.Federation.Domain == "" {
		if c.Federation.Peer != "" {
			return p, usage("federation.domain", "it is missing")
		}
		return p, nil
	}
	var ok bool
	if p.From, ok = federation.ParseDomain(c.Federation.Domain); !ok {
		return p, usage("federation.domain", "%q is not the name of a domain", c.Federation.Domain)
	}
	if p.To, ok = federation.ParseDomain(cmp.Or(c.Federation.Peer, host)); !ok {
		return p, usage("federation.peer", "%q is not the name of a domain",
			cmp.Or(c.Federation.Peer, host))
	}
	switch {
	case c.TLS == nil || len(c.TLS.Certificates) == 0 && c.TLS.GetClientCertificate == nil:
		return p, usage("federation.domain",
			"a domain is proved by tls.cert and tls.key, which are missing")
	case c.Token != "":
		return p, usage("auth.token", "a peer has no token")
	case len(c.AdvertiseRoutes) == 0:
		return p, usage("routes.advertise",
			"a gateway needs it: it names the networks that the peer may reach")
	case c.Accept == nil || slices.ContainsFunc(c.Accept, func(p netip.Prefix) bool {
		return p.Bits() == 0
	}):
		return p, usage("routes.accept",
			"routes of another owner are not taken unseen: name the peer's networks")
	}
	return p, nil
}

// resolveTarget returns the target of c, with its scope.
func (c *Config) resolveTarget() (target, error) {
	to, err := parseProxy(c.Proxy, c.TLS)
	if err != nil {
		return target{}, err
	}
	to.query.Method, to.query.DNSSEC = c.Discovery.Method, c.Discovery.DNSSEC
	if to.pair, err = c.pair(to.host); err != nil {
		return target{}, err
	}
	if to.isPeer() {
		to.query.Purpose, to.query.Private = discovery.Peer, false
	}
	orAny := func(s string) string {
		if s == "" {
			return "*"
		}
		return s
	}
	if _, err := connectip.ParseScope(orAny(c.Target), "*"); err != nil {
		return target{}, usage("scope.target", "%v", err)
	}
	if to.scope, err = connectip.ParseScope(orAny(c.Target), orAny(c.IPProto)); err != nil {
		return target{}, usage("scope.ipproto", "%v", err)
	}
	if to.template != nil {
		if _, err := to.template.Expand(to.scope); err != nil {
			return target{}, usage("proxy", "%v", err)
		}
	}
	return to, nil
}

// maxToken limits the bearer token, in bytes. Proxies accept requests of 16
// KiB, and the rest of the request needs room too.
const maxToken = 8 << 10

// withDefaults checks c and returns it with defaults for empty fields.
func (c Config) withDefaults() (Config, error) {
	if c.Request == nil && len(c.Static) == 0 {
		c.Request = []netip.Prefix{
			netip.PrefixFrom(netip.IPv4Unspecified(), 32),
			netip.PrefixFrom(netip.IPv6Unspecified(), 128),
		}
	}
	if n := len(c.Request); n > connectip.MaxAssigned {
		return c, usage("addresses.request", "%d addresses are too many, at most %d are possible",
			n, connectip.MaxAssigned)
	}
	if n := len(c.Token); n > maxToken {
		return c, usage("auth.token", "%d bytes are too long for a proxy, at most %d are possible",
			n, maxToken)
	}
	for _, p := range c.Request {
		if !p.IsValid() || p != p.Masked() {
			return c, usage("addresses.request",
				"%v is not an address prefix without bits beyond its length", p)
		}
	}
	for _, token := range []string{c.Instance, c.Installation} {
		if token != "" && !connectip.IsToken(token) {
			return c, fail(causeConfiguration, nil,
				"Instance and Installation must have 1 to 64 letters, digits or any of -._~+/=", "")
		}
	}
	if err := c.checkSite(); err != nil {
		return c, err
	}
	if c.TUN.MTU != 0 && (c.TUN.MTU < minMTU || c.TUN.MTU > maxMTU) {
		return c, usage("tun.mtu", "%d is not between %d and %d bytes", c.TUN.MTU, minMTU, maxMTU)
	}
	if c.Accept == nil {
		c.Accept = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	}
	if c.MaxDelay == 0 {
		c.MaxDelay = DefaultMaxDelay
	}
	if c.MaxDelay < 0 {
		return c, usage("reconnect.max_delay", "a time span cannot be negative")
	}
	if c.Mark == 0 {
		c.Mark = routing.DefaultMark
	}
	if !routing.ValidMark(c.Mark) {
		return c, usage("routes.mark", "%#x is not two bits", c.Mark)
	}
	var err error
	if c.Congestion, err = c.Congestion.Check(); err != nil {
		return c, usage("tunnel.congestion", "%v", err)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.setHost()
	return c, nil
}

// setHost sets the nil functions of c to the functions of this host.
func (c *Config) setHost() {
	if c.OpenDevice == nil {
		c.OpenDevice = func() (Device, error) {
			t := c.TUN
			t.Logger = c.Logger
			if t.MTU == 0 {
				t.MTU = minMTU // until the MTU of the path is known
			}
			return tun.Open(t)
		}
	}
	if c.OpenResolver == nil && c.OpenNetwork == nil {
		c.OpenResolver = func(d Device) (Resolver, error) {
			return hostdns.Open(hostdns.Config{Instance: c.Name, Interface: d.Name(),
				Logger: c.Logger})
		}
	}
	if c.OpenUnderlay == nil && c.OpenNetwork == nil {
		c.OpenUnderlay = func() (Underlay, error) { return routing.Watch(c.Mark) }
	}
	if c.Suspended == nil {
		c.Suspended = suspended
	}
	if c.HostNetworks == nil {
		c.HostNetworks = func(except string) ([]routing.HostNetwork, error) { return nil, nil }
		if c.OpenNetwork == nil {
			c.HostNetworks = routing.HostNetworks
		}
	}
	if c.OpenNetwork == nil {
		c.OpenNetwork = func(d Device) (Network, error) {
			return routing.Open(routing.Config{
				Instance: c.Name, Interface: d.Name(), Mark: c.Mark, Journal: c.Journal,
				Logger: c.Logger,
			})
		}
	}
}
