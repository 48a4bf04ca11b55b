package hostdns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	systemBus = "unix:path=/run/dbus/system_bus_socket"
	// busTimeout limits all calls of one change together.
	busTimeout  = 5 * time.Second
	resolveName = "org.freedesktop.resolve1"
	resolvePath = "/org/freedesktop/resolve1"
	manager     = resolveName + ".Manager."
	dnsPort     = 53
)

// resolved is the backend that configures systemd-resolved, see
// org.freedesktop.resolve1(5).
type resolved struct{ cfg Config }

func newResolved(c Config) *resolved { return &resolved{cfg: c} }

func (r *resolved) name() string { return "systemd-resolved" }

// bus runs f with a connection to the bus.
func (r *resolved) bus(f func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), busTimeout)
	defer cancel()
	conn, err := dbus.Dial(r.cfg.Bus, dbus.WithContext(ctx))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err != nil {
		return err
	}
	if err := conn.Hello(); err != nil {
		return err
	}
	return f(ctx, conn)
}

// running reports whether systemd-resolved runs in this network namespace. A
// namespace made by ip-netns(8) sees the bus of the host, where interface
// indexes differ.
func (r *resolved) running() bool {
	var pid uint32
	err := r.bus(func(ctx context.Context, conn *dbus.Conn) error {
		// This call does not start a stopped service.
		return conn.BusObject().CallWithContext(ctx,
			"org.freedesktop.DBus.GetConnectionUnixProcessID", 0, resolveName).Store(&pid)
	})
	if err != nil {
		return false
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil { // missing permission
		return leadsToResolved(r.cfg)
	}
	ours, err := os.Readlink("/proc/self/ns/net")
	return err == nil && ours == theirs
}

// leadsToResolved reports whether all servers of resolv.conf are addresses of
// systemd-resolved.
func leadsToResolved(c Config) bool {
	content, err := readSmall(c.ResolvConf)
	if err != nil {
		return false
	}
	servers := nameservers(content)
	stub := func(s netip.AddrPort) bool {
		return s.Addr() == netip.AddrFrom4([4]byte{127, 0, 0, 53}) ||
			s.Addr() == netip.AddrFrom4([4]byte{127, 0, 0, 54})
	}
	return len(servers) > 0 && !slices.ContainsFunc(servers, func(s netip.AddrPort) bool {
		return !stub(s)
	})
}

// These types encode D-Bus values.
type (
	linkServer struct {
		Family  int32
		Address []byte
	}
	linkServerPort struct {
		Family  int32
		Address []byte
		Port    uint16
		Name    string // server name for DNS over TLS
	}
	linkDomain struct {
		Name      string
		RouteOnly bool // not a search domain
	}
	server struct {
		Index   int32 // interface index, 0 for global servers
		Family  int32
		Address []byte
	}
)

func family(a netip.Addr) int32 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// domains returns the domains of the tunnel's interface. All names below a
// search domain go to the tunnel too, because systemd-resolved cannot have
// search domains without routing their names.
func (s Settings) domains() []linkDomain {
	var out []linkDomain
	for _, name := range s.Search {
		out = append(out, linkDomain{name, false})
	}
	for _, name := range s.Domains {
		if !slices.Contains(s.Search, name) {
			out = append(out, linkDomain{name, true})
		}
	}
	return out
}

func (r *resolved) set(s Settings) error {
	link, err := net.InterfaceByName(r.cfg.Interface)
	if err != nil {
		return err
	}
	index := int32(link.Index)
	var plain []linkServer
	var withPort []linkServerPort
	for _, a := range s.Servers {
		address := a.Addr().AsSlice()
		plain = append(plain, linkServer{family(a.Addr()), address})
		withPort = append(withPort, linkServerPort{family(a.Addr()), address, a.Port(), ""})
	}
	standardPort := !slices.ContainsFunc(s.Servers, func(a netip.AddrPort) bool {
		return a.Port() != dnsPort
	})
	return r.bus(func(ctx context.Context, conn *dbus.Conn) error {
		object := conn.Object(resolveName, resolvePath)
		call := func(method string, args ...any) error {
			if err := object.CallWithContext(ctx, manager+method, 0, args...).Err; err != nil {
				return fmt.Errorf("%s: %w", method, explain(err))
			}
			return nil
		}
		// The servers are set last: resolved does not query the interface
		// before, and afterwards only for its domains. Encryption is turned off
		// whatever the host's default, because the servers take unencrypted
		// queries. Older versions lack some methods.
		if err := call("SetLinkDomains", index, s.domains()); err != nil {
			return err
		}
		if err := call("SetLinkDefaultRoute", index, s.Full()); err != nil &&
			!isUnknownMethod(err) {
			return err
		}
		if err := call("SetLinkDNSOverTLS", index, "no"); err != nil && !isUnknownMethod(err) {
			return err
		}
		if standardPort {
			err = call("SetLinkDNS", index, plain)
		} else {
			err = call("SetLinkDNSEx", index, withPort)
		}
		if err != nil {
			return err
		}
		// Cached answers about internal names are stale now.
		if err := call("FlushCaches"); err != nil && !isUnknownMethod(err) {
			return err
		}
		return nil
	})
}

func (r *resolved) unset() error {
	link, err := net.InterfaceByName(r.cfg.Interface)
	if err != nil {
		return nil // the settings went with the interface
	}
	return r.bus(func(ctx context.Context, conn *dbus.Conn) error {
		object := conn.Object(resolveName, resolvePath)
		if err := object.CallWithContext(ctx, manager+"RevertLink", 0,
			int32(link.Index)).Err; err != nil {
			return fmt.Errorf("RevertLink: %w", explain(err))
		}
		// Stale cache entries do no harm.
		_ = object.CallWithContext(ctx, manager+"FlushCaches", 0).Err
		return nil
	})
}

// servers returns all servers configured in systemd-resolved.
func (r *resolved) servers() (all []server, err error) {
	err = r.bus(func(ctx context.Context, conn *dbus.Conn) error {
		return conn.Object(resolveName, resolvePath).StoreProperty(manager+"DNS", &all)
	})
	return all, err
}

func (r *resolved) verify(s Settings) error {
	link, err := net.InterfaceByName(r.cfg.Interface)
	if err != nil {
		return err
	}
	all, err := r.servers()
	if err != nil {
		return err
	}
	for _, want := range s.Servers {
		if !slices.ContainsFunc(all, func(have server) bool {
			a, _ := netip.AddrFromSlice(have.Address)
			return int(have.Index) == link.Index && a == want.Addr()
		}) {
			return fmt.Errorf("it has lost %v, possibly by a restart", want.Addr())
		}
	}
	return nil
}

func (r *resolved) upstream() ([]netip.AddrPort, error) {
	var tunnel int // index of its interface, 0 for none
	if r.cfg.Interface != "" {
		link, err := net.InterfaceByName(r.cfg.Interface)
		if err != nil {
			return nil, err
		}
		tunnel = link.Index
	}
	all, err := r.servers()
	var out []netip.AddrPort
	for _, s := range all {
		if a, ok := netip.AddrFromSlice(s.Address); ok && (tunnel == 0 || int(s.Index) != tunnel) {
			if a.IsLinkLocalUnicast() && s.Index > 0 {
				a = a.WithZone(strconv.Itoa(int(s.Index)))
			}
			out = append(out, netip.AddrPortFrom(a, dnsPort))
		}
	}
	return out, err
}

// isUnknownMethod reports whether the service lacks the called method.
func isUnknownMethod(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.DBus.Error.UnknownMethod"
}

// explain makes access errors of the bus match os.ErrPermission.
func explain(err error) error {
	var e dbus.Error
	if errors.As(err, &e) && (e.Name == "org.freedesktop.DBus.Error.AccessDenied" ||
		e.Name == "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired") {
		return fmt.Errorf("%w (%w)", os.ErrPermission, err)
	}
	return err
}
