package proxy

import (
	"cmp"
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

// Authentication methods, for Config.Methods. If several are configured, any
// one of them suffices.
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

// Config is the configuration of a Server. Name, TLS, Methods and at least one
// of Pool4 and Pool6 are required.
type Config struct {
	// Name is the host name or IP address that clients connect to.
	Name string

	// Listen has the UDP addresses to listen on, as HOST:PORT. The default is
	// [::]:443.
	Listen []string

	// Sockets are served instead of Listen. Run closes them.
	Sockets []*net.UDPConn

	// Template is a URI template that is served besides the default one (RFC
	// 9484 section 3). The default one is https://NAME followed by
	// DefaultTemplatePath.
	Template string

	// TLS has the certificate. MethodMTLS also needs ClientCAs.
	TLS *tls.Config

	// Methods are the accepted authentication methods. MethodNone excludes the
	// others.
	Methods []string

	// Users finds users. It may be nil with MethodNone.
	Users Users

	// TUN describes the device. If its MTU is 0, the device gets an MTU that
	// fits the largest QUIC packet.
	TUN tun.Config

	// Pool4 and Pool6 contain the addresses of clients. The first address of
	// each is the proxy's own. If one is invalid, clients get no addresses of
	// that family.
	Pool4, Pool6 netip.Prefix

	// Delegate4 and Delegate6 are the prefix lengths in bits of the largest
	// block that a client may get. 0 means that a client that asks for a prefix
	// gets a single address.
	Delegate4, Delegate6 int

	// Hold is the time for which an address is held back from others after the
	// session of its last client has ended. The default is DefaultHold.
	Hold time.Duration

	// Advertise has the destinations that clients may reach through the proxy.
	Advertise []netip.Prefix

	// Deny has destinations that clients may not reach, besides those that are
	// always denied.
	Deny []netip.Prefix

	// ClientToClient allows clients to reach each other.
	ClientToClient bool

	// Sites are the users whose clients are gateways to networks.
	Sites []Site

	// Federation and Peers link networks with the proxies of other owners.
	Federation Federation
	Peers      []Peer

	// Masquerade replaces the source of forwarded packets by an address of the
	// proxy's host.
	Masquerade bool

	// Congestion selects the congestion control of tunnels. The default is
	// congestion.Inner if quic-go is built with our patches.
	Congestion congestion.Mode

	// KernelHopLimit leaves decrementing the hop limit of packets to the
	// kernel.
	KernelHopLimit bool

	// DNS is pushed to clients. Server.SetDNS changes it later.
	DNS DNS

	// ConnectUDP also serves UDP proxying (RFC 9298).
	ConnectUDP bool

	// UDPIdleTimeout is the time after which a UDP flow without packets ends.
	// The default is DefaultUDPIdleTimeout.
	UDPIdleTimeout time.Duration

	// MaxSessions and MaxSessionsPerUser limit the tunnels. The defaults are
	// DefaultSessions and DefaultSessionsPerUser.
	MaxSessions        int
	MaxSessionsPerUser int

	// MaxAddressesPerUser limits the leases of all sessions of a user. The
	// default is two for each session that the user may have.
	MaxAddressesPerUser int

	// MaxUDPFlows and MaxUDPFlowsPerUser limit the flows for UDP proxying. The
	// defaults are DefaultUDPFlows and DefaultUDPFlowsPerUser.
	MaxUDPFlows        int
	MaxUDPFlowsPerUser int

	// MaxPending and MaxPendingPerAddress limit the connections without an
	// accepted request, in all and from one IPv4 address or /64 of IPv6. The
	// defaults are DefaultPendingConnections and
	// DefaultPendingConnectionsPerAddress.
	MaxPending, MaxPendingPerAddress int

	// StatelessResetKey lets clients notice a restart of the proxy at once if
	// it stays the same across restarts (RFC 9000 section 10.3). It may be nil.
	StatelessResetKey *[32]byte

	// Journal is the path of a file from which the next start cleans up after a
	// crash. Empty means that there is none.
	Journal string

	// Logger receives the log. nil means that nothing is logged.
	Logger *slog.Logger

	// Tap receives a copy of the packets of all sessions. It may be nil.
	Tap *capture.Tap

	// Tracer is passed to quic.Config, for qlog. It may be nil.
	Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

	// Resolver resolves the names in requests. The default is
	// net.DefaultResolver.
	Resolver Resolver

	// OpenDevice and OpenNetwork replace the TUN device and its configuration
	// in the kernel. With both, a Server needs no privileges.
	OpenDevice  func() (Device, error)
	OpenNetwork func(Device) (Network, error)

	// DialUDP opens a socket to the target of a UDP flow. Packets written to it
	// must not be fragmented. The default is a socket of the kernel.
	DialUDP func(context.Context, netip.AddrPort) (net.Conn, error)

	// LocalNetworks returns the addresses of the host's interfaces except the
	// device, with the prefix lengths of their networks. Clients may not reach
	// the addresses, and sites may not have the networks. The default asks the
	// kernel.
	LocalNetworks func() ([]netip.Prefix, error)
}

// Device is a TUN device. It is implemented by *[tun.Device], which documents
// the methods.
type Device interface {
	Name() string
	MTU() int
	BatchSize() int
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	Close() error
}

// Network is the configuration of a Device in the kernel. It is implemented by
// *[routing.Manager].
type Network interface {
	// Apply makes the kernel have the given state.
	Apply(routing.State) error

	// Maintain restores the changes of other programs to the applied state
	// until ctx is done. It calls report like routing.Manager.Maintain, and
	// returns an error if the device is lost.
	Maintain(ctx context.Context, report func(routing.Health)) error

	// Close restores the host.
	Close() error
}

// User is somebody who may connect.
type User struct {
	Name string

	// TokenHash is the SHA-256 hash of the token. Zero means that the user has
	// none.
	TokenHash [32]byte

	// Certificate is the SHA-256 hash of the only accepted certificate, in DER.
	// Zero means that any valid certificate for Name is accepted.
	Certificate [32]byte

	// Addresses are reserved for the user.
	Addresses []netip.Addr

	// Sessions limits the tunnels of the user. 0 means
	// Config.MaxSessionsPerUser.
	Sessions int

	// MaxAddresses limits the leases of the user. 0 means
	// Config.MaxAddressesPerUser.
	MaxAddresses int

	// Routes limits the destinations of Config.Advertise for the user. nil
	// means no limit, and an empty list that the user reaches none of them.
	Routes []netip.Prefix

	// RateUp and RateDown limit the IP packets from and to all clients of the
	// user together, in bits per second. 0 means no limit.
	RateUp   int64
	RateDown int64

	// Expires is the wall clock time at which access ends. Zero means never.
	Expires time.Time
}

// Users finds users. Its methods are called concurrently and must not block.
type Users interface {
	// ByName returns the user with the given name and whether there is one.
	ByName(name string) (User, bool)

	// ByToken returns the user with the given token and whether there is one.
	// It compares in constant time.
	ByToken(token string) (User, bool)

	// Reserved reports whether p contains an address that is reserved for a
	// user other than name.
	Reserved(p netip.Prefix, name string) bool
}

// Kind classifies an Error. Its values are the exit codes of masque-proxy.
type Kind = fault.Kind

// The kinds of Error.
const (
	KindFailure    = fault.Failure    // failed while running
	KindUsage      = fault.Usage      // the configuration is wrong
	KindPrivileges = fault.Privileges // a privilege is missing
)

// Error is a failure of the Server as a whole, with a remedy. If a field of
// Config is wrong, Key is its configuration key.
type Error = fault.Error

// usage returns an *Error of KindUsage about a configuration key.
func usage(key, format string, args ...any) error {
	return &Error{Kind: KindUsage, Key: key, Reason: fmt.Sprintf(format, args...)}
}

// withDefaults returns c with defaults for empty fields, and checks it.
func (c Config) withDefaults() (Config, error) {
	if len(c.Listen) == 0 {
		c.Listen = []string{"[::]:443"}
	}
	c.Hold = cmp.Or(c.Hold, DefaultHold)
	c.UDPIdleTimeout = cmp.Or(c.UDPIdleTimeout, DefaultUDPIdleTimeout)
	c.MaxSessions = cmp.Or(c.MaxSessions, DefaultSessions)
	c.MaxSessionsPerUser = cmp.Or(c.MaxSessionsPerUser, DefaultSessionsPerUser)
	c.MaxUDPFlows = cmp.Or(c.MaxUDPFlows, DefaultUDPFlows)
	c.MaxUDPFlowsPerUser = cmp.Or(c.MaxUDPFlowsPerUser, DefaultUDPFlowsPerUser)
	c.MaxPending = cmp.Or(c.MaxPending, DefaultPendingConnections)
	c.MaxPendingPerAddress = cmp.Or(c.MaxPendingPerAddress, DefaultPendingConnectionsPerAddress)
	if c.Resolver == nil {
		c.Resolver = net.DefaultResolver
	}
	if c.DialUDP == nil {
		c.DialUDP = dialOther
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if err := c.check(); err != nil {
		return c, err
	}
	if err := c.checkFederation(); err != nil {
		return c, err
	}
	var err error
	if c.Congestion, err = c.Congestion.Check(); err != nil {
		return c, usage("tunnel.congestion", "%v", err)
	}
	return c, nil
}

// check returns an *Error if c is invalid. The defaults are set.
func (c Config) check() error {
	if c.Name == "" {
		return usage("name", "the name that clients dial is missing")
	}
	for _, l := range c.Listen {
		if _, err := net.ResolveUDPAddr("udp", l); err != nil {
			return usage("listen", "%q is not an address and a UDP port, such as [::]:443", l)
		}
	}
	if c.TLS == nil || len(c.TLS.Certificates) == 0 && c.TLS.GetCertificate == nil {
		return usage("tls.cert", "a certificate is needed")
	}
	if err := cmp.Or(c.checkMethods(), c.checkPools()); err != nil {
		return err
	}
	if c.TUN.MTU != 0 && (c.TUN.MTU < minMTU || c.TUN.MTU > maxMTU) {
		return usage("tun.mtu", "%d is not between %d and %d bytes", c.TUN.MTU, minMTU, maxMTU)
	}
	if err := c.DNS.check(); err != nil {
		return err
	}
	if min(c.MaxSessions, c.MaxSessionsPerUser, c.MaxAddressesPerUser, c.MaxUDPFlows,
		c.MaxUDPFlowsPerUser, c.MaxPending, c.MaxPendingPerAddress) < 0 {
		return usage("limits", "a limit cannot be negative")
	}
	if n := c.advertised(); n > routing.MaxRoutes {
		return usage("routes.advertise", "%d networks remain after joining adjacent ones, and "+
			"clients accept %d: advertise fewer and larger networks", n, routing.MaxRoutes)
	}
	if c.UDPIdleTimeout < 0 {
		return usage("connect_udp", "a time span cannot be negative")
	}
	if c.Hold < 0 {
		return usage("pool.hold", "a time span cannot be negative")
	}
	return nil
}

// checkPools checks Pool4, Pool6, Delegate4 and Delegate6.
func (c Config) checkPools() error {
	if !c.Pool4.IsValid() && !c.Pool6.IsValid() {
		return usage("pool", "at least one of ipv4 and ipv6 is needed")
	}
	if c.Pool4.IsValid() && (!c.Pool4.Addr().Is4() || c.Pool4.Bits() > 30) {
		return usage("pool.ipv4", "%v is not an IPv4 prefix of at most 30 bits", c.Pool4)
	}
	if c.Pool6.IsValid() && (!c.Pool6.Addr().Is6() || c.Pool6.Bits() > 126) {
		return usage("pool.ipv6", "%v is not an IPv6 prefix of at most 126 bits", c.Pool6)
	}
	for _, p := range []netip.Prefix{c.Pool4, c.Pool6} {
		if p.IsValid() && p != p.Masked() {
			return usage("pool", "%v has bits set beyond its prefix length; %v is meant", p,
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
			return usage(d.key, "there is no pool of this family to take prefixes from")
		case d.bits <= d.pool.Bits() || d.bits > d.pool.Addr().BitLen():
			return usage(d.key, "%d is not a length from %d to %d, as prefixes within %v have",
				d.bits, d.pool.Bits()+1, d.pool.Addr().BitLen(), d.pool)
		}
	}
	return nil
}

// advertised returns the number of routes that are advertised to every client:
// Advertise and the proxy's own addresses, with adjacent ones joined.
func (c Config) advertised() int {
	all := slices.Clone(c.Advertise)
	for _, p := range []netip.Prefix{c.Pool4, c.Pool6} {
		if p.IsValid() {
			all = append(all, netip.PrefixFrom(p.Addr().Next(), p.Addr().BitLen()))
		}
	}
	return len(setOf(all).Prefixes())
}

// checkMethods checks Methods and the fields that they need.
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

// templates returns the served URI templates: the configured one, if any, and
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

// authority returns a name or an address as the host of a URI.
func authority(name string) string {
	if a, err := netip.ParseAddr(name); err == nil && a.Is6() {
		return "[" + name + "]"
	}
	return name
}
