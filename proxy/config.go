// Package proxy is a CONNECT-IP proxy (RFC 9484): an HTTP/3 server that
// authenticates clients, leases them addresses, advertises routes and forwards
// their packets through one TUN device.
package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlogwriter"

	"masquevpn/internal/capture"
	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/fault"
	"masquevpn/routing"
	"masquevpn/tun"
)

// The ways in which a client can prove who it is. When several are configured,
// any one of them is enough.
const (
	MethodNone  = "none"  // everybody may connect
	MethodToken = "token" // Authorization: Bearer TOKEN (RFC 6750)
	MethodMTLS  = "mtls"  // a client certificate whose common name is the user
)

// Defaults of Config.
const (
	DefaultSessions        = 4096
	DefaultSessionsPerUser = 8
	DefaultUDPFlows        = 4096
	DefaultUDPFlowsPerUser = 256
	DefaultHold            = time.Hour

	DefaultPendingConnections           = 96
	DefaultPendingConnectionsPerAddress = 64

	DefaultTemplatePath = connectip.DefaultPath
)

// Config is the configuration of a Server. The zero value of a field without a
// default is an error in New.
type Config struct {
	Name    string         // what clients dial
	Listen  []string       // UDP addresses, host:port; default [::]:443
	Sockets []*net.UDPConn // sockets to serve instead of Listen; Run closes them
	// URI template served besides the default one; default: https://NAME/ and
	// the default path
	Template string
	TLS      *tls.Config // the certificate; ClientCAs for MethodMTLS

	Methods []string // authentication methods; at least one
	Users   Users    // nil with MethodNone alone

	TUN tun.Config // MTU 0: automatic
	// addresses for clients, the first of each is the proxy's; one may be
	// invalid: no such family
	Pool4, Pool6 netip.Prefix
	// Delegate4 and Delegate6 are the length, in bits, of the largest block
	// that a client gets who asks for a prefix; 0: it gets a single address
	// instead.
	Delegate4, Delegate6 int
	// for which addresses are kept for the client that had them last; default
	// DefaultHold
	Hold           time.Duration
	Advertise      []netip.Prefix
	Deny           []netip.Prefix // destinations, besides the built-in ones
	ClientToClient bool
	Sites          []Site
	Masquerade     bool            // clients appear under the proxy's own addresses elsewhere
	Congestion     congestion.Mode // default congestion.Inner, in builds that can
	KernelHopLimit bool            // the kernel alone decrements hop limits
	DNS            DNS             // see Server.SetDNS for later changes

	ConnectUDP bool // serve UDP proxying (RFC 9298) as well
	// after which a flow without packets ends; default DefaultUDPIdleTimeout
	UDPIdleTimeout time.Duration

	// default DefaultSessions; without those for UDP proxying, as in the next
	MaxSessions        int
	MaxSessionsPerUser int // default DefaultSessionsPerUser
	// leases of all sessions of a user; default: two for each session that the
	// user may have
	MaxAddressesPerUser int
	MaxUDPFlows         int // default DefaultUDPFlows
	MaxUDPFlowsPerUser  int // default DefaultUDPFlowsPerUser
	// MaxPending and MaxPendingPerAddress are how many connections may be
	// without an accepted request, in all and from one IPv4 address or /64 of
	// IPv6; default DefaultPendingConnections and
	// DefaultPendingConnectionsPerAddress.
	MaxPending, MaxPendingPerAddress int

	// kept across restarts, it lets clients notice a restart at once (RFC 9000
	// section 10.3)
	StatelessResetKey *[32]byte
	// path of a file that lets the next start clean up after a crash; "" for
	// none
	Journal string
	Logger  *slog.Logger
	// where packets of the sessions pass; nil for none
	Tap *capture.Tap
	// of quic.Config, for qlog; nil for none
	Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

	// Resolver finds the addresses of the names in requests; default: what the
	// host is configured with.
	Resolver Resolver
	// OpenDevice and OpenNetwork replace the TUN device and the kernel's
	// routing, for use without privileges.
	OpenDevice  func() (Device, error)
	OpenNetwork func(Device) (Network, error)
	// DialUDP opens a socket to the target of a flow, whose packets must not be
	// fragmented; default: one of the kernel's.
	DialUDP func(context.Context, netip.AddrPort) (net.Conn, error)
	// LocalNetworks returns the addresses of the host's interfaces, all but the
	// device, with the lengths of their networks. Clients may not reach the
	// addresses, and no site may have the networks. Default: as the kernel has
	// them.
	LocalNetworks func() ([]netip.Prefix, error)
}

// Device is what the proxy forwards through; *tun.Device is one.
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
	// Maintain restores the changes of other programs to the applied state
	// until ctx is done. It calls report like routing.Manager.Maintain, and
	// returns an error if the device is lost.
	Maintain(ctx context.Context, report func(routing.Health)) error
	Close() error
}

// User is somebody who may connect.
type User struct {
	Name      string
	TokenHash [32]byte // SHA-256 of the token; zero: none
	// SHA-256 of the only certificate (DER) that is accepted; zero: any that is
	// for the name
	Certificate  [32]byte
	Addresses    []netip.Addr // reserved for this user
	Sessions     int          // simultaneous; 0: Config.MaxSessionsPerUser
	MaxAddresses int          // leased at once; 0: Config.MaxAddressesPerUser

	Routes []netip.Prefix // what may be reached of Config.Advertise; nil: all, empty: nothing
	// bits per second from all clients of the user together, IP packets without
	// what is around them; 0: no limit
	RateUp   int64
	RateDown int64     // and to them
	Expires  time.Time // end of the user's access, wall clock; zero: never
}

// Users finds users. Its methods are called from several goroutines and answer
// at once.
type Users interface {
	ByName(name string) (User, bool)
	ByToken(token string) (User, bool) // compares in constant time
	// Reserved reports whether an address of p is reserved for somebody else
	// than the user called name.
	Reserved(p netip.Prefix, name string) bool
}

// Kind classifies an Error. Its values are the exit codes of masque-proxy.
type Kind = fault.Kind

// The kinds of Error.
const (
	KindFailure    = fault.Failure    // it failed while running
	KindUsage      = fault.Usage      // the configuration is wrong
	KindPrivileges = fault.Privileges // a privilege is missing
)

// Error is a failure of the Server as a whole, with a remedy. If a field of
// Config is wrong, Key is its configuration key.
type Error = fault.Error

func usage(key, format string, args ...any) error {
	return &Error{Kind: KindUsage, Key: key, Reason: fmt.Sprintf(format, args...)}
}

// withDefaults returns c complete and checked.
func (c Config) withDefaults() (Config, error) {
	if c.Name == "" {
		return c, usage("name", "the name that clients dial is missing")
	}
	if len(c.Listen) == 0 {
		c.Listen = []string{"[::]:443"}
	}
	for _, l := range c.Listen {
		if _, err := net.ResolveUDPAddr("udp", l); err != nil {
			return c, usage("listen", "%q is not an address and a UDP port, such as [::]:443", l)
		}
	}
	if c.TLS == nil || len(c.TLS.Certificates) == 0 && c.TLS.GetCertificate == nil {
		return c, usage("tls.cert", "a certificate is needed")
	}
	if err := c.checkMethods(); err != nil {
		return c, err
	}
	if !c.Pool4.IsValid() && !c.Pool6.IsValid() {
		return c, usage("pool", "at least one of ipv4 and ipv6 is needed")
	}
	if c.Pool4.IsValid() && (!c.Pool4.Addr().Is4() || c.Pool4.Bits() > 30) {
		return c, usage("pool.ipv4", "%v is not an IPv4 prefix of at most 30 bits", c.Pool4)
	}
	if c.Pool6.IsValid() && (!c.Pool6.Addr().Is6() || c.Pool6.Bits() > 126) {
		return c, usage("pool.ipv6", "%v is not an IPv6 prefix of at most 126 bits", c.Pool6)
	}
	for _, p := range []netip.Prefix{c.Pool4, c.Pool6} {
		if p.IsValid() && p != p.Masked() {
			return c, usage("pool", "%v has bits set beyond its prefix length; %v is meant", p,
				p.Masked())
		}
	}
	for _, d := range []struct {
		key  string
		bits int
		pool netip.Prefix
	}{{"pool.delegate_ipv4", c.Delegate4, c.Pool4}, {"pool.delegate_ipv6", c.Delegate6, c.Pool6}} {
		switch {
		case d.bits == 0:
		case !d.pool.IsValid():
			return c, usage(d.key, "there is no pool of this family to take prefixes from")
		case d.bits <= d.pool.Bits() || d.bits > d.pool.Addr().BitLen():
			return c, usage(d.key, "%d is not a length from %d to %d, as prefixes within %v have",
				d.bits, d.pool.Bits()+1, d.pool.Addr().BitLen(), d.pool)
		}
	}
	if c.TUN.MTU != 0 && (c.TUN.MTU < minMTU || c.TUN.MTU > maxMTU) {
		return c, usage("tun.mtu", "%d is not between %d and %d bytes", c.TUN.MTU, minMTU, maxMTU)
	}
	if err := c.DNS.check(); err != nil {
		return c, err
	}
	if min(c.MaxSessions, c.MaxSessionsPerUser, c.MaxAddressesPerUser, c.MaxUDPFlows,
		c.MaxUDPFlowsPerUser, c.MaxPending, c.MaxPendingPerAddress) < 0 {
		return c, usage("limits", "a limit cannot be negative")
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = DefaultSessions
	}
	if c.MaxSessionsPerUser == 0 {
		c.MaxSessionsPerUser = DefaultSessionsPerUser
	}
	if c.MaxUDPFlows == 0 {
		c.MaxUDPFlows = DefaultUDPFlows
	}
	if c.MaxUDPFlowsPerUser == 0 {
		c.MaxUDPFlowsPerUser = DefaultUDPFlowsPerUser
	}
	if c.MaxPending == 0 {
		c.MaxPending = DefaultPendingConnections
	}
	if c.MaxPendingPerAddress == 0 {
		c.MaxPendingPerAddress = DefaultPendingConnectionsPerAddress
	}
	if n := c.advertised(); n > routing.MaxRoutes {
		return c, usage("routes.advertise",
			"%d networks are left when those that touch are joined, and clients take %d: advertise fewer and larger ones", n, routing.MaxRoutes)
	}
	if c.Resolver == nil {
		c.Resolver = net.DefaultResolver
	}
	if c.UDPIdleTimeout < 0 {
		return c, usage("connect_udp", "a time span cannot be negative")
	}
	if c.Hold < 0 {
		return c, usage("pool.hold", "a time span cannot be negative")
	}
	if c.Hold == 0 {
		c.Hold = DefaultHold
	}
	if c.UDPIdleTimeout == 0 {
		c.UDPIdleTimeout = DefaultUDPIdleTimeout
	}
	if c.DialUDP == nil {
		c.DialUDP = dialOther
	}
	var err error
	if c.Congestion, err = c.Congestion.Check(); err != nil {
		return c, usage("tunnel.congestion", "%v", err)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// advertised returns how many routes a client needs for what is advertised to
// all, the proxy's own addresses included.
func (c Config) advertised() int {
	all := slices.Clone(c.Advertise)
	for _, p := range []netip.Prefix{c.Pool4, c.Pool6} {
		if p.IsValid() {
			all = append(all, netip.PrefixFrom(p.Addr().Next(), p.Addr().BitLen()))
		}
	}
	return len(setOf(all).Prefixes())
}

func (c Config) checkMethods() error {
	if len(c.Methods) == 0 {
		return usage("auth.methods", "at least one of %q, %q and %q is needed", MethodMTLS,
			MethodToken, MethodNone)
	}
	for _, m := range c.Methods {
		switch m {
		case MethodNone:
			if len(c.Methods) > 1 {
				return usage("auth.methods", "%q excludes the others", MethodNone)
			}
		case MethodToken:
		case MethodMTLS:
			if c.TLS.ClientCAs == nil {
				return usage("tls.client_ca", "it is needed for the method %q", MethodMTLS)
			}
		default:
			return usage("auth.methods", "%q is none of %q, %q and %q", m, MethodMTLS, MethodToken,
				MethodNone)
		}
	}
	if !slices.Contains(c.Methods, MethodNone) && c.Users == nil {
		return usage("auth.users", "users are needed for the methods %q", c.Methods)
	}
	return nil
}

// templates returns the URI templates that are served: the configured one and
// the default one.
func (c Config) templates() ([]*connectip.Template, error) {
	def, err := connectip.ParseTemplate("https://" + authority(c.Name) + connectip.DefaultPath)
	if err != nil {
		return nil, usage("name", "%v", err)
	}
	if c.Template == "" || c.Template == def.String() {
		return []*connectip.Template{def}, nil
	}
	own, err := connectip.ParseTemplate(c.Template)
	if err != nil {
		return nil, usage("template", "%v", err)
	}
	return []*connectip.Template{own, def}, nil
}

// authority writes a name or an address as the host of a URI.
func authority(name string) string {
	if a, err := netip.ParseAddr(name); err == nil && a.Is6() {
		return "[" + name + "]"
	}
	return name
}
