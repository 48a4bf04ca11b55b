// Package client is a CONNECT-IP client (RFC 9484): it dials a proxy over
// HTTP/3, asks for addresses, applies them and the advertised routes to the
// host, carries packets, and comes back when the connection is lost.
package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlogwriter"

	"masquevpn/internal/capture"
	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/hostdns"
	"masquevpn/routing"
	"masquevpn/tun"
)

// DefaultMaxDelay is the longest wait between two attempts to reconnect.
const DefaultMaxDelay = 30 * time.Second

// Config is the configuration of a Client.
type Config struct {
	Name  string      // the tunnel's name, for status, logs and our objects on the host
	Proxy string      // a name, host:port, or a URI template (RFC 9484 section 3)
	TLS   *tls.Config // RootCAs (nil: the system's), Certificates, ServerName ("": from Proxy)
	Token string      // bearer token, "" for none

	// Instance is a token that no other client uses at the same time: a proxy
	// ends a session of the same user that had it before, as when its client
	// was killed, and hands its addresses over. Default: a random one.
	Instance string
	// Installation is a token that tells this device from others of the same
	// user, so that it has its former addresses when the program is started
	// anew. It should be hard to guess. "" for none.
	Installation string

	Target  string // request scope (RFC 9484 section 4.6), "" and "*" for any
	IPProto string

	TUN tun.Config // MTU 0: what the path carries
	// Request are the addresses to ask for, 0.0.0.0/32 and ::/128 for any. Nil
	// stands for any of each family; an empty list asks for none and takes what
	// the proxy assigns unprompted.
	Request []netip.Prefix
	Static  []netip.Prefix // addresses to use instead of asking

	InstallRoutes bool
	Accept        []netip.Prefix     // limits the advertised routes that are taken; nil: no limit
	Exclude       []netip.Prefix     // goes around the tunnel
	HostRoutes    routing.HostRoutes // routes of the host that go before the tunnel's

	// Mark is the two bits of packet and connection marks that are of this
	// tunnel, see routing.Config. Default: routing.DefaultMark.
	Mark uint32

	// KillSwitch, if there is one, is closed before anything is sent, kept
	// closed, and left closed: to lift it is up to the caller, when Run has
	// returned.
	KillSwitch KillSwitch
	// Nameservers (host:port) are asked for the proxy's name instead of a
	// resolver on this host, whose own questions a kill switch would stop.
	// Without them that one is asked.
	Nameservers []string

	// AdvertiseRoutes are networks behind this host that the proxy may send to,
	// which makes this host a gateway and a router (RFC 9484 section 8.2).
	// AssignPeer are single addresses that the proxy is given, usually out of
	// those networks.
	AdvertiseRoutes []netip.Prefix
	AssignPeer      []netip.Prefix

	DNS DNS // what the host's resolver is told

	Congestion congestion.Mode // default congestion.Inner, in builds that can

	Reconnect bool
	MaxDelay  time.Duration // default DefaultMaxDelay
	// Service says that nobody waits for the outcome of the start: only the
	// proxy itself, once it has proved who it is, can end a client for good.
	Service bool

	Journal string // path of a file that lets the next start clean up after a crash; "" for none
	Logger  *slog.Logger
	// where packets of the tunnel pass; nil for none
	Tap *capture.Tap
	// of quic.Config, for qlog; nil for none
	Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

	// OpenDevice, OpenNetwork and OpenResolver replace the TUN device, the
	// kernel's routing and the host's resolver, for use without privileges.
	// With the routing replaced, and no OpenResolver, no resolver is told
	// anything.
	OpenDevice   func() (Device, error)
	OpenNetwork  func(Device) (Network, error)
	OpenResolver func(Device) (Resolver, error)

	// OpenUplink replaces the kernel's knowledge of how packets get to the
	// proxy. With the routing replaced, and no OpenUplink, nothing is known of
	// it. Suspended replaces the clocks that tell for how long in all this host
	// has been suspended since it booted.
	OpenUnderlay func() (Underlay, error)
	Suspended    func() time.Duration

	// HostNetworks replaces the kernel's knowledge of the addresses of this
	// host, without those of an interface. With the routing replaced, and no
	// HostNetworks, none are known.
	HostNetworks func(except string) ([]routing.HostNetwork, error)
}

// Device is where packets come from and go to; *tun.Device is one.
type Device interface {
	Name() string
	MTU() int
	BatchSize() int
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	Close() error
}

// Network is the kernel's side of a Device; *routing.Manager is one.
type Network interface {
	Apply(routing.State) error
	// FollowHost has the state applied fit the host's networks and routes, and
	// returns where these have the same addresses as that.
	FollowHost() (conflicts []string, err error)
	Held() error // why the state applied has its IPv6 routes leading nowhere, nil if it has not
	// Maintain restores the changes of other programs to the applied state until
	// ctx is done. It calls report like routing.Manager.Maintain, and returns an
	// error if the device is lost.
	Maintain(ctx context.Context, report func(routing.Health)) error
	Close() error
}

// KillSwitch keeps packets from leaving this host but through a tunnel;
// *routing.KillSwitch is one.
type KillSwitch interface {
	// Close lets packets leave through the interface of that name only, "" for
	// none. It may be called again and again.
	Close(iface string) error
	// Maintain closes it again when another program opens it, until ctx is done.
	Maintain(ctx context.Context, report func(routing.KillSwitchHealth)) error
}

// Kind classifies an Error. Its values are the exit codes of masque-client.
type Kind int

// The kinds of Error.
const (
	KindFailure      Kind = 1 // it failed while running
	KindUsage        Kind = 2 // the configuration is wrong
	KindNotConnected Kind = 3
	KindCredentials  Kind = 4 // the proxy refused who we are
	KindUnreachable  Kind = 5 // the proxy does not answer
	KindIdentity     Kind = 6 // the proxy could not prove who it is
	KindPrivileges   Kind = 7 // a privilege is missing
	KindRefused      Kind = 8 // no address, or no route, was granted
)

// Error is why a tunnel is not there: one line that says what is wrong and what
// to do.
type Error struct {
	Kind   Kind
	Reason string
	Remedy string // "" when there is none
	Err    error  // cause, may be nil

	cause cause          // what follows from it
	from  netip.AddrPort // who answered, where somebody did
}

func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Reason
	}
	return e.Reason + ": " + e.Remedy
}

func (e *Error) Unwrap() error { return e.Err }

func usage(key, format string, args ...any) error {
	return fail(causeConfiguration, nil, key+": "+fmt.Sprintf(format, args...), "")
}

// target is what Config.Proxy stands for.
type target struct {
	template *connectip.Template
	scope    connectip.Scope
	host     string // the host to resolve
	port     string
	verify   string         // the name that the certificate has to carry
	roots    *x509.CertPool // who may have signed it; nil: the system's
	clock    clock          // verifies certificates
}

// parseProxy checks where raw, a Config.Proxy, leads. What config says of the
// name to verify goes before that in raw.
func parseProxy(raw string, config *tls.Config) (target, error) {
	if raw == "" {
		return target{}, usage("proxy", "the name of the proxy is missing")
	}
	if !strings.Contains(raw, "/") {
		host := raw
		if a, err := netip.ParseAddr(raw); err == nil && a.Is6() {
			host = "[" + raw + "]"
		}
		raw = "https://" + host + connectip.DefaultPath
	}
	t, err := connectip.ParseTemplate(raw)
	if err != nil {
		return target{}, usage("proxy", "%v", err)
	}
	to := target{template: t, host: t.Host(), port: "443", clock: newClock(config)}
	if host, port, err := net.SplitHostPort(t.Host()); err == nil {
		to.host, to.port = host, port
	}
	to.host = strings.Trim(to.host, "[]")
	to.verify = to.host
	if config != nil {
		to.verify, to.roots = cmp.Or(config.ServerName, to.host), config.RootCAs
	}
	return to, nil
}

// resolveTarget checks where c leads, and with which scope.
func (c *Config) resolveTarget() (target, error) {
	to, err := parseProxy(c.Proxy, c.TLS)
	if err != nil {
		return target{}, err
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
	if _, err := to.template.Expand(to.scope); err != nil {
		return target{}, usage("proxy", "%v", err)
	}
	return to, nil
}

// maxToken is how many bytes of a bearer token leave room for the rest of a
// request, of which proxies take 16 KiB.
const maxToken = 8 << 10

// withDefaults returns c complete and checked.
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
				"a token of the client is not 1 to 64 letters, digits and any of -._~+/=", "")
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
		return c, usage("reconnect.max_delay", "it cannot be negative")
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
	if c.OpenDevice == nil {
		c.OpenDevice = func() (Device, error) {
			t := c.TUN
			t.Logger = c.Logger
			if t.MTU == 0 {
				t.MTU = minMTU // until the path's is known
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
	return c, nil
}

// resolver asks DNS outside the tunnel, so that a dead tunnel can be dialed
// again by name. In place of a resolver on this host it asks nameservers, if
// there are any, each time the next one.
func resolver(control controlFunc, nameservers []string) *net.Resolver {
	d := &net.Dialer{Control: control}
	var asked atomic.Uint32
	return &net.Resolver{PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().IsLoopback() &&
				len(nameservers) > 0 {
				address = nameservers[int(asked.Add(1)-1)%len(nameservers)]
			}
			return d.DialContext(ctx, network, address)
		}}
}
