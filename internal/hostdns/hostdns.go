// Package hostdns makes the resolver of a Linux host use the nameservers of a
// tunnel, and restores it afterwards.
//
// A [Manager] works with one of three backends and chooses it by the state of
// the host:
//
//   - systemd-resolved, over D-Bus, when it runs in this network namespace. It
//     has servers for each interface and supports split DNS: servers for some
//     names only. Its settings disappear with the interface.
//   - resolvconf(8) of openresolv, when it generates /etc/resolv.conf. The
//     tunnel's servers replace all others. Debian's resolvconf has no exclusive
//     servers, so its file is replaced instead.
//   - /etc/resolv.conf itself, which is replaced.
//
// When systemd-resolved runs, but /etc/resolv.conf names other servers,
// programs use both, and so both are configured.
//
// The last two backends do not support split DNS: the tunnel's servers receive
// all queries or none.
//
// # The file
//
// The original stays beside the file as resolv.conf.masque-INSTANCE: the same
// inode under another name, or the same symbolic link, so that a rename
// restores owner, mode and times too. Both steps are atomic. After a process
// was killed, the first line of its file names the tunnel, and the next start
// restores the original. A file that cannot be replaced, for example one that
// is mounted into a container or a network namespace, is written in place and
// keeps the original below the tunnel's lines, as comments.
//
// Tunnels stack: the file of one is the original of the next, and the originals
// are handed on when tunnels end in another order. Files written in place do
// not stack.
//
// When another program changes the file, its version becomes the original. The
// tunnel's servers are installed again, at a limited rate.
package hostdns

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// Config configures a Manager for one tunnel.
type Config struct {
	// Instance is the name of the tunnel: letters, digits and any of ".-_@".
	// Files and entries of the tunnel are marked with it.
	Instance string
	// Interface is the name of the tunnel's network interface.
	Interface string

	Logger *slog.Logger // nil: nothing is logged

	// The fields below are for tests; empty fields take the usual values.
	// ResolvConf is the path of the resolver's file, /etc/resolv.conf.
	ResolvConf string
	// Bus is the address of the D-Bus that systemd-resolved listens on.
	Bus string
	// Resolvconf is the path of openresolv's program.
	Resolvconf string
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.Bus == "" {
		c.Bus = systemBus
	}
	if c.Resolvconf == "" {
		c.Resolvconf = findProgram("resolvconf")
	}
	return c
}

// Root is the domain that contains all names.
const Root = "."

// Settings is the DNS configuration of a tunnel. The zero value configures no
// servers.
type Settings struct {
	// Servers take unencrypted queries. The preferred server is first.
	Servers []netip.AddrPort
	// Search lists the domains to try as suffixes of short names.
	Search []string
	// Domains lists the domains that the servers resolve, each with all names
	// below it. Root stands for all names.
	Domains []string
}

// Full reports whether the servers are for all names.
func (s Settings) Full() bool { return slices.Contains(s.Domains, Root) }

// Equal reports whether s and t are the same.
func (s Settings) Equal(t Settings) bool {
	return slices.Equal(s.Servers, t.Servers) && slices.Equal(s.Search, t.Search) &&
		slices.Equal(s.Domains, t.Domains)
}

// check returns an error unless s can be written to every backend. It is strict
// about names because they become lines of files.
func (s Settings) check() error {
	for _, a := range s.Servers {
		if !a.IsValid() || a.Addr().Zone() != "" || a.Addr().Is4In6() || a.Port() == 0 {
			return fmt.Errorf("%v is not the address of a nameserver", a)
		}
	}
	for _, name := range slices.Concat(s.Search, s.Domains) {
		if name != Root && !isDomain(name) {
			return fmt.Errorf("%.100q is not a domain name", name)
		}
	}
	if slices.Contains(s.Search, Root) {
		return fmt.Errorf("%q is not a search domain", Root)
	}
	return nil
}

// isDomain reports whether s is a domain name without its final dot, in
// letters, digits, "-" and "_".
func isDomain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' ||
			strings.ContainsFunc(label, func(r rune) bool {
				return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' ||
					r == '-' || r == '_')
			}) {
			return false
		}
	}
	return true
}

// ErrSplit is returned by Apply for settings that cover some names only, on a
// host whose resolver cannot split DNS.
var ErrSplit = errors.New("this host's resolver cannot ask servers about some names only; systemd-resolved can, with " +
	"/etc/resolv.conf a link to /run/systemd/resolve/stub-resolv.conf")

// backend configures one kind of resolver.
type backend interface {
	name() string
	set(Settings) error
	// unset reverts set, also when a process that died called it. It may be
	// called at any time.
	unset() error
	// verify returns nil while s is in effect, and otherwise an error that
	// names the missing part.
	verify(s Settings) error
	// upstream returns the host's servers other than the tunnel's.
	upstream() ([]netip.AddrPort, error)
}

// Manager configures the host's resolver for one tunnel. Its methods may be
// called concurrently.
type Manager struct {
	cfg     Config
	file    *file
	program *resolvconf

	mu sync.Mutex // guards the fields below
	// backends are in use; nil when the tunnel configures no resolver.
	backends []backend
	// applied was accepted by all backends; zero when none are in use.
	applied Settings
}

// Open reverts the changes of a dead process of the same instance and makes no
// others. The caller must close the Manager. An error names the part that could
// not be restored.
func Open(c Config) (*Manager, error) {
	m, _, err := open(c)
	return m, err
}

// Clean reverts the changes of a dead process of the same instance, as Open
// does. It reports whether that process left a file.
func Clean(c Config) (found bool, err error) {
	_, found, err = open(c)
	return found, err
}

func open(c Config) (m *Manager, found bool, err error) {
	c = c.withDefaults()
	if c.Instance == "" || strings.ContainsFunc(c.Instance, func(r rune) bool {
		return r == '/' || r <= ' '
	}) {
		return nil, false, fmt.Errorf("hostdns: instance name %q: want letters, digits, '.', '-', '_' or '@'", c.Instance)
	}
	m = &Manager{cfg: c, file: newFile(c), program: newResolvconf(c)}
	found = m.file.leftBehind()
	if err := m.restore(); err != nil {
		return nil, found, fmt.Errorf("hostdns: %w", err)
	}
	if found {
		c.Logger.Info("restored the resolver after a process that died", "file", c.ResolvConf)
	}
	return m, found, nil
}

// restore reverts changes to files by this process or a dead one.
func (m *Manager) restore() error {
	err := m.file.unset()
	if madeByOpenresolv(m.cfg) {
		err = errors.Join(err, m.program.unset())
	}
	return err
}

// detect returns the backends that reach this host's resolver. At most the
// first of them supports split DNS.
func detect(c Config, f *file, program *resolvconf) []backend {
	var backends []backend
	if r := newResolved(c); r.running() {
		backends = append(backends, r)
		if leadsToResolved(c) {
			return backends
		}
	}
	if madeByOpenresolv(c) {
		return append(backends, program)
	}
	return append(backends, f)
}

// Detect returns the name of the backend that Apply would use on this host,
// such as "systemd-resolved", and whether it supports split DNS.
func Detect(c Config) (via string, splits bool) {
	c = c.withDefaults()
	backends := detect(c, newFile(c), newResolvconf(c))
	return names(backends), canSplit(backends)
}

func names(backends []backend) string {
	list := make([]string, len(backends))
	for i, b := range backends {
		list[i] = b.name()
	}
	return strings.Join(list, " and ")
}

func canSplit(backends []backend) bool {
	_, ok := backends[0].(*resolved)
	return ok && len(backends) == 1
}

// Apply makes the host's resolver use s in place of earlier settings and
// returns the name of the backend, as Detect does. Without servers, and after
// an error, the resolver is restored. Errors match ErrSplit, os.ErrPermission
// or an error of the backend.
func (m *Manager) Apply(s Settings) (via string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(s.Servers) == 0 {
		return "", m.unset()
	}
	if err := s.check(); err != nil {
		return "", errors.Join(fmt.Errorf("hostdns: %w", err), m.unset())
	}
	if m.backends != nil && s.Equal(m.applied) {
		return names(m.backends), nil
	}
	backends := m.backends
	if backends == nil {
		backends = detect(m.cfg, m.file, m.program)
	}
	if !s.Full() && !canSplit(backends) {
		return "", errors.Join(ErrSplit, m.unset())
	}
	m.backends = backends
	for _, b := range backends {
		if err := b.set(s); err != nil {
			return "", errors.Join(fmt.Errorf("hostdns: %s: %w", b.name(), err), m.unset())
		}
	}
	m.applied = s
	return names(backends), nil
}

// Check verifies that the resolver still has the applied settings and applies
// them again if not. restored describes the settings that were missing, "" when
// none were. An error explains why they are still missing. Check may be called
// at any time.
func (m *Manager) Check() (restored string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.applied.Servers) == 0 {
		return "", nil
	}
	for _, b := range m.backends {
		lost := b.verify(m.applied)
		if lost == nil {
			continue
		}
		if err := b.set(m.applied); err != nil {
			return "", fmt.Errorf("hostdns: %s: %w: %w", b.name(), lost, err)
		}
		restored = fmt.Sprintf("%s: %v", b.name(), lost)
	}
	return restored, nil
}

// unset reverts Apply. It is called with m.mu held.
func (m *Manager) unset() error {
	var errs []error
	for _, b := range slices.Backward(m.backends) {
		if err := b.unset(); err != nil {
			errs = append(errs, fmt.Errorf("hostdns: %s: not restored: %w", b.name(), err))
		}
	}
	m.applied = Settings{}
	if len(errs) == 0 { // otherwise Close tries again
		m.backends = nil
	}
	return errors.Join(errs...)
}

// Close restores the host's resolver, except for changes that another program
// made meanwhile. It may be called more than once.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unset()
}

// Upstream returns the servers that the host would ask without tunnels, for
// look-ups that must not depend on one. ok is false when no tunnel changed the
// resolver, which can then be asked itself.
func (m *Manager) Upstream() (servers []netip.AddrPort, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.backends == nil {
		return m.file.upstreamServers()
	}
	servers, err := m.backends[0].upstream()
	if err != nil {
		m.cfg.Logger.Debug("servers beside the tunnel's are not known", "error", err)
	}
	// systemd-resolved reads resolv.conf too, which may name the tunnel's
	// servers.
	return slices.DeleteFunc(servers, func(a netip.AddrPort) bool {
		return slices.Contains(m.applied.Servers, a)
	}), true
}

// Outside returns the host's other servers that the kernel routes outside the
// tunnel. They include servers on this host, because the destination of their
// own queries is unknown.
func (m *Manager) Outside() []netip.AddrPort {
	m.mu.Lock()
	backends, applied := m.backends, m.applied.Servers
	if backends == nil {
		backends = detect(m.cfg, m.file, m.program)
	}
	servers := upstreamServers(backends, m.file, m.cfg.Logger)
	m.mu.Unlock()
	return slices.DeleteFunc(servers, func(a netip.AddrPort) bool {
		_, err := source(a)
		return err != nil || slices.Contains(applied, a) || m.Reaches(a)
	})
}

// Servers returns the servers that this host asks without a tunnel.
func Servers(c Config) []netip.AddrPort {
	c = c.withDefaults()
	f := newFile(c)
	return upstreamServers(detect(c, f, newResolvconf(c)), f, c.Logger)
}

// upstreamServers returns the servers that a host with these backends asks
// besides the servers of tunnels.
func upstreamServers(backends []backend, f *file, logger *slog.Logger) []netip.AddrPort {
	r, ok := backends[0].(*resolved)
	if !ok {
		servers, _ := f.upstreamServers()
		return servers
	}
	servers, err := r.upstream()
	if err != nil {
		logger.Debug("servers beside the tunnel's are not known", "error", err)
	}
	return servers
}

// source returns the address from which the kernel sends packets to a server.
func source(server netip.AddrPort) (netip.Addr, error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server)) // sends nothing
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// Reaches reports whether the kernel sends packets for a server into the
// tunnel: it chooses one of the tunnel's addresses as their source.
func (m *Manager) Reaches(server netip.AddrPort) bool {
	source, err := source(server)
	if err != nil {
		return false
	}
	link, err := net.InterfaceByName(m.cfg.Interface)
	if err != nil {
		return false
	}
	addrs, err := link.Addrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr() == source
	})
}
