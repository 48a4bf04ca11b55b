// Package hostdns has the resolver of a Linux host use the nameservers of a
// tunnel, and puts it back as it was.
//
// There are three ways, and the host decides which of them is taken:
//
//   - systemd-resolved, over D-Bus, when it runs in this network namespace. It knows servers for each interface and can ask
//     some of them about some names only (split DNS). When the interface goes, so does what it was told about it.
//   - resolvconf(8) of openresolv, when that makes /etc/resolv.conf. The tunnel's servers are the only ones while they are
//     there. The resolvconf of Debian cannot have it that way, so its file is replaced, as follows.
//   - /etc/resolv.conf itself is replaced, see [Manager.Apply].
//
// When systemd-resolved runs, but /etc/resolv.conf does not lead to it,
// programs ask both, and both are told.
//
// The last two know no names: all queries go to the tunnel's servers, or none.
//
// # The file
//
// The original is kept beside the file as resolv.conf.masque-INSTANCE: the same
// inode under another name, a symbolic link as such, so that a rename puts back
// all that it was. Both steps are atomic, and what a killed process left behind
// explains itself: the first line of our file says which tunnel it is of. A
// file that cannot be replaced, as one that is mounted into a container or a
// network namespace, is written in place, and holds the original as comments
// below what is ours.
//
// Tunnels stack: the file of one is the original of the next, and when they end
// in another order the originals are handed on. What is written in place does
// not stack.
//
// When another program changes the file meanwhile, what it wrote is the
// original from then on, so that it is there when the tunnel ends; the tunnel's
// servers are put back at once, at a rate.
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

// Config says whose resolver a Manager looks after.
type Config struct {
	// of the tunnel: what is ours is marked with it. Letters, digits and any of
	// ".-_@"
	Instance  string
	Interface string // name of the tunnel's

	Logger *slog.Logger // nil: nothing is logged

	// Where things are, for tests; "" for the usual.
	ResolvConf string // /etc/resolv.conf
	Bus        string // address of the D-Bus that systemd-resolved is on
	Resolvconf string // the program of openresolv
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

// Root is the domain of all names.
const Root = "."

// Settings are what a resolver is told about a tunnel. The zero value is
// nothing.
type Settings struct {
	Servers []netip.AddrPort // of unencrypted DNS, the preferred one first
	Search  []string         // domains that are tried behind short names
	Domains []string         // what the servers resolve, with all names below; Root for all names
}

// Full reports whether the servers are for all names.
func (s Settings) Full() bool { return slices.Contains(s.Domains, Root) }

// Equal reports whether s and t are the same.
func (s Settings) Equal(t Settings) bool {
	return slices.Equal(s.Servers, t.Servers) && slices.Equal(s.Search, t.Search) &&
		slices.Equal(s.Domains, t.Domains)
}

// check returns what keeps s from being written anywhere. Names become lines of
// files.
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

// ErrSplit is returned by Apply for settings of some names only on a host whose
// resolver knows no such thing.
var ErrSplit = errors.New("this host's resolver cannot ask servers about some names only; systemd-resolved can, with " +
	"/etc/resolv.conf a link to /run/systemd/resolve/stub-resolv.conf")

// way is one of the ways to tell a resolver.
type way interface {
	name() string
	set(Settings) error
	// unset takes back what set did, or a dead process. It may be called at any
	// time.
	unset() error
	// holds returns nil while what set did is in effect, and otherwise what is
	// not.
	holds(Settings) error
	// upstream returns the servers that the host has besides the tunnel's.
	upstream() ([]netip.AddrPort, error)
}

// Manager looks after what the host's resolver knows of one tunnel. Its methods
// may be called concurrently.
type Manager struct {
	cfg     Config
	file    *file
	program *resolvconf

	mu      sync.Mutex
	ways    []way    // that are in use, nil when none is
	applied Settings // by them
}

// Open removes what a dead process of the same instance left behind, and
// changes nothing else. The caller must close the Manager. The error says what
// could not be restored.
func Open(c Config) (*Manager, error) {
	m, _, err := open(c)
	return m, err
}

// Clean removes what a dead process of the same instance left behind, as Open
// does. found reports whether it left a file.
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
	found = m.file.left()
	if err := m.restore(); err != nil {
		return nil, found, fmt.Errorf("hostdns: %w", err)
	}
	if found {
		c.Logger.Info("removed what a dead process left behind", "file", c.ResolvConf)
	}
	return m, found, nil
}

// restore undoes what this process or a dead one did to files.
func (m *Manager) restore() error {
	err := m.file.unset()
	if madeByOpenresolv(m.cfg) {
		err = errors.Join(err, m.program.unset())
	}
	return err
}

// detect returns the ways that this host's resolver needs. At most the first of
// them can split.
func detect(c Config, f *file, program *resolvconf) []way {
	var ways []way
	if r := newResolved(c); r.running() {
		ways = append(ways, r)
		if leadsToResolved(c) {
			return ways
		}
	}
	if madeByOpenresolv(c) {
		return append(ways, program)
	}
	return append(ways, f)
}

// Detect says which way Apply would take on this host, such as
// "systemd-resolved", and whether it can split.
func Detect(c Config) (via string, splits bool) {
	c = c.withDefaults()
	ways := detect(c, newFile(c), newResolvconf(c))
	return join(ways), splitting(ways)
}

func join(ways []way) string {
	names := make([]string, len(ways))
	for i, w := range ways {
		names[i] = w.name()
	}
	return strings.Join(names, " and ")
}

func splitting(ways []way) bool {
	_, ok := ways[0].(*resolved)
	return ok && len(ways) == 1
}

// Apply has the host's resolver use s, in place of what the last Apply gave it,
// and returns by which way, as Detect. Without servers, the resolver is as if
// there were no tunnel. After an error it is as well. Errors: ErrSplit,
// os.ErrPermission, and those of the way taken.
func (m *Manager) Apply(s Settings) (via string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(s.Servers) == 0 {
		return "", m.unset()
	}
	if err := s.check(); err != nil {
		return "", errors.Join(fmt.Errorf("hostdns: %w", err), m.unset())
	}
	if m.ways != nil && s.Equal(m.applied) {
		return join(m.ways), nil
	}
	ways := m.ways
	if ways == nil {
		ways = detect(m.cfg, m.file, m.program)
	}
	if !s.Full() && !splitting(ways) {
		return "", errors.Join(ErrSplit, m.unset())
	}
	m.ways = ways
	for _, w := range ways {
		if err := w.set(s); err != nil {
			return "", errors.Join(fmt.Errorf("hostdns: %s: %w", w.name(), err), m.unset())
		}
	}
	m.applied = s
	return join(ways), nil
}

// Check looks whether the resolver still has what Apply gave it, and gives it
// that again if it has not: restored says what was not there, "" when all was.
// The error says why it does not have it now. It may be called at any time.
func (m *Manager) Check() (restored string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.applied.Servers) == 0 {
		return "", nil
	}
	for _, w := range m.ways {
		lost := w.holds(m.applied)
		if lost == nil {
			continue
		}
		if err := w.set(m.applied); err != nil {
			return "", fmt.Errorf("hostdns: %s: %w: %w", w.name(), lost, err)
		}
		restored = fmt.Sprintf("%s: %v", w.name(), lost)
	}
	return restored, nil
}

// unset takes back what Apply did. m.mu is held.
func (m *Manager) unset() error {
	var errs []error
	for _, w := range slices.Backward(m.ways) {
		if err := w.unset(); err != nil {
			errs = append(errs, fmt.Errorf("hostdns: %s: not restored: %w", w.name(), err))
		}
	}
	if m.applied = (Settings{}); len(errs) == 0 { // otherwise Close tries again
		m.ways = nil
	}
	return errors.Join(errs...)
}

// Close puts the host's resolver back as it was, as far as nobody else changed
// it meanwhile. It may be called more than once.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unset()
}

// Upstream returns the servers that the host would ask if there were no
// tunnels, for look-ups that must not depend on one. ok is false when its
// resolver is as it is without tunnels, and can be asked itself.
func (m *Manager) Upstream() (servers []netip.AddrPort, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ways == nil {
		return m.file.beneath()
	}
	servers, err := m.ways[0].upstream()
	if err != nil {
		m.cfg.Logger.Debug("servers beside the tunnel's are not known", "error", err)
	}
	// What systemd-resolved finds in resolv.conf may be the tunnel's too.
	return slices.DeleteFunc(servers, func(a netip.AddrPort) bool {
		return slices.Contains(m.applied.Servers, a)
	}), true
}

// Outside returns the servers that the host asks besides those of the tunnel,
// and that the kernel sends queries to by another way than the tunnel. A server
// on this host is one of them, because whom that asks is not known.
func (m *Manager) Outside() []netip.AddrPort {
	m.mu.Lock()
	ways, applied := m.ways, m.applied.Servers
	if ways == nil {
		ways = detect(m.cfg, m.file, m.program)
	}
	servers := beneath(ways, m.file, m.cfg.Logger)
	m.mu.Unlock()
	return slices.DeleteFunc(servers, func(a netip.AddrPort) bool {
		_, err := source(a)
		return err != nil || slices.Contains(applied, a) || m.Reaches(a)
	})
}

// Servers returns the servers that this host asks when it is told of no tunnel.
func Servers(c Config) []netip.AddrPort {
	c = c.withDefaults()
	f := newFile(c)
	return beneath(detect(c, f, newResolvconf(c)), f, c.Logger)
}

// beneath returns the servers that a host with these ways asks besides those of
// tunnels.
func beneath(ways []way, f *file, logger *slog.Logger) []netip.AddrPort {
	r, ok := ways[0].(*resolved)
	if !ok {
		servers, _ := f.beneath()
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
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server)) // which sends nothing
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
