package routing

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"sync"
)

var (
	// ErrInUse is returned by Open if a running process manages the instance.
	ErrInUse = errors.New("instance is in use by another process")

	// ErrIPv6Disabled means that the administrator turned IPv6 off on the
	// interface. Held returns it, or Apply if Config.Mark is 0.
	ErrIPv6Disabled = errors.New("IPv6 is disabled on the interface")

	// ErrTooManyRoutes is returned by Apply if the State needs more than
	// MaxRoutes routes.
	ErrTooManyRoutes = errors.New("too many routes")
)

// Config describes the interface that a Manager configures, and how the kernel
// objects of the Manager are marked.
type Config struct {
	// Instance identifies the Manager on the host. Its nftables table is
	// "masque-INSTANCE". It has 1 to 64 letters, digits, '_', '.' or '-'.
	Instance string

	// Interface is the name of the tunnel's interface. The interface must exist
	// and have no other Manager.
	Interface string

	// Mark is the SO_MARK of the outer sockets, see MarkSocket. It has exactly
	// two bits, see ValidMark; other bits of packet marks are not changed. With
	// a mark, routes are in tables of the tunnel, and policy rules keep packets
	// with the higher bit out of these. Replies to connections from outside the
	// tunnel have the higher bit alone. All tunnels of a host should have the
	// same mark, to prevent loops between them. 0 means that routes are in the
	// main table.
	Mark uint32

	// Journal is the path of the file from which the next process restores the
	// host if this one is killed. Its directory is created. The journals of all
	// instances of a host should be in one directory and have the same
	// extension. If Journal is empty, sysctls stay after a crash, and so do
	// addresses if the interface does, and two processes can manage the same
	// instance.
	Journal string

	// Logger receives a line for each object that a dead process left behind,
	// each sysctl that is set, and each missing kernel feature. Other changes
	// are logged at level debug. nil means that nothing is logged.
	Logger *slog.Logger
}

// State is the desired configuration of the kernel. The zero State is an
// interface that is up and has no addresses or routes.
type State struct {
	// MTU is the MTU of the interface in bytes, at least 1280 for IPv6. 0 means
	// the MTU at Open.
	MTU int

	// Addresses are the addresses of the interface with their prefix lengths.
	// There is no duplicate address detection. With a Config.Mark, an address
	// has no on-link route; list its prefix in Routes if necessary.
	Addresses []netip.Prefix

	// Routes are the prefixes that are reached through the tunnel. The package
	// documentation explains how they compete with the host's routes. The
	// interface need not have an address of the same family, as on an
	// unnumbered link between sites; packets of this host then have an address
	// of another interface.
	Routes []netip.Prefix

	// HostRoutes selects the routes of the host, such as the routes of its LAN,
	// that take precedence over Routes. It is ignored without a Config.Mark.
	HostRoutes HostRoutes

	// Private lists prefixes that HostPrivate handles like private networks,
	// such as networks behind this host.
	Private []netip.Prefix

	// Unreachable are prefixes that compete like Routes; packets to them are
	// refused. They require a Config.Mark. If the interface cannot have IPv6,
	// its IPv6 Routes are unreachable too, so that no packet leaves outside the
	// tunnel.
	Unreachable []netip.Prefix

	// Exclude are prefixes that are reached outside the tunnel. They require a
	// Config.Mark.
	Exclude []netip.Prefix

	// HoldDNS refuses DNS queries (UDP and TCP, also over TLS and QUIC) that
	// would leave through another interface. It applies to queries of the host
	// and to forwarded ones, except from sockets with the mark. It is ignored
	// without a Config.Mark.
	HoldDNS bool

	// Forward makes the host a router for the families of Addresses, Routes and
	// Masquerade.
	Forward bool

	// Reach are the destinations to which new connections out of the tunnel are
	// forwarded. Without a Config.Mark all destinations are reached.
	Reach []netip.Prefix

	// Masquerade are source prefixes that are translated to the host's address
	// when packets leave through another interface. Untranslated packets do not
	// leave, and connections to these prefixes are accepted from the tunnel
	// only.
	Masquerade []netip.Prefix

	// Listen are the UDP ports of this program's servers. With Masquerade,
	// connection tracking ignores their packets, and no translated packet gets
	// one of the ports.
	Listen []uint16
}

// Manager configures the kernel for one tunnel. Its methods may be called
// concurrently, from threads in the network namespace of Open.
type Manager struct {
	mu sync.Mutex // guards the fields below

	// state is the State of the last successful Apply, without IPv6 if the
	// kernel has none. applied is its plan.
	state   State
	applied plan

	held    error // result of Held
	repairs repairs
	bypass  string // last result of bypassed
	closed  bool
	err     error // result of Close
	kernel
}

var validInstance = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// Open returns a Manager for an interface. It undoes the changes of a dead
// process of the same instance, and the changes of any instance whose interface
// is gone. It makes no other changes.
//
// The error matches ErrInUse if a running process manages the instance, and
// os.ErrPermission if CAP_NET_ADMIN is missing.
func Open(c Config) (*Manager, error) {
	return open(c, "/proc/sys")
}

func open(c Config, procSys string) (_ *Manager, err error) {
	m := &Manager{repairs: repairs{backoffs: make(map[string]*backoff),
		counts: make(map[string]uint64)}}
	defer func() {
		if err != nil {
			m.release()
		}
	}()
	if err := m.init(c, procSys); err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	link, err := m.nl.LinkByName(c.Interface)
	if err != nil {
		return nil, fmt.Errorf("routing: interface %q: %w", c.Interface, explain(err))
	}
	m.index = link.Attrs().Index
	if _, err := m.takeOver(); err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	if err := m.journal.save(m.rec); err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	return m, nil
}

// Clean undoes the changes of a dead process, like Open, and reports whether it
// found any. c.Interface is not used. It returns the same errors as Open.
func Clean(c Config) (found bool, err error) {
	var k kernel
	defer k.release()
	if err := k.init(c, "/proc/sys"); err != nil {
		return false, fmt.Errorf("routing: %w", err)
	}
	_, hadTable, err := readTable(k.tableName())
	if err != nil && !noNFTables(err) {
		return false, fmt.Errorf("routing: %w", err)
	}
	hadJournal, err := k.takeOver()
	if err == nil {
		err = k.journal.remove()
	}
	if err != nil {
		err = fmt.Errorf("routing: %w", err)
	}
	return hadTable || hadJournal, err
}

func errInstance(name string) error {
	return fmt.Errorf("instance name %q: want 1 to 64 letters, digits, '_', '.' or '-'", name)
}

// Apply makes the kernel match s. It makes the necessary changes only, and
// restores changes of other programs. If the interface cannot have IPv6, s is
// applied without it, see Held.
//
// If Apply fails, it restores the State of the last successful Apply; the error
// includes a failure to do so. The error matches ErrTooManyRoutes,
// ErrInterfaceGone, os.ErrPermission if CAP_NET_ADMIN is missing, or
// os.ErrClosed after Close. Errors of the kernel name the object and a remedy.
func (m *Manager) Apply(s State) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return fmt.Errorf("routing: %w", os.ErrClosed)
	}
	if !m.ipv6 && s.hasIPv6() {
		s = s.ipv4Only()
		m.reportMissing("IPv6", "the kernel has no IPv6: IPv4 alone goes through the tunnel", nil)
	}
	if link, err := m.findLink(); err == nil && link == nil {
		return fmt.Errorf("routing: %s: %w", m.Interface, ErrInterfaceGone)
	}
	asked := s
	s, held, err := m.holdIPv6(s)
	if err != nil {
		return fmt.Errorf("routing: %w", err)
	}
	want, err := m.planFor(s)
	if err != nil {
		return fmt.Errorf("routing: %w", err)
	}
	if err := m.converge(want, false); err != nil {
		if back := m.converge(m.applied, true); back != nil {
			err = errors.Join(err, fmt.Errorf("restore the previous state: %w", back))
		}
		return fmt.Errorf("routing: %w", err)
	}
	m.state, m.applied, m.held = asked, want, held
	m.repairs.lostIPv6 = m.repairs.lostIPv6 && held != nil
	return nil
}

// FollowHost adapts the applied State to changed networks and routes of the
// host. The caller calls it after each such change. It returns conflicts in a
// stable order, one sentence each: networks with the same addresses as the
// tunnel, routes to public addresses, and rules of other programs that take
// packets out of the tunnel.
func (m *Manager) FollowHost() (conflicting []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.Mark == 0 || !m.applied.up {
		return nil, nil
	}
	state, _, err := m.feasible()
	if err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	if want, err := m.planFor(state); err == nil &&
		!(slices.Equal(want.sysctls, m.applied.sysctls) &&
			slices.EqualFunc(want.chains, m.applied.chains, chain.same)) {
		m.applied.sysctls, m.applied.chains = want.sysctls, want.chains
		if err := m.converge(m.applied, true); err != nil {
			return nil, fmt.Errorf("routing: %w", err)
		}
	}
	networks, err := m.hostNetworks()
	if err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	routes, err := m.hostRoutes()
	if err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	selective, err := m.selectiveRules()
	if err != nil {
		return nil, fmt.Errorf("routing: %w", err)
	}
	return slices.Concat(networkConflicts(m.state, networks), publicRoutes(m.state, routes),
		selective), nil
}

// Close restores the host as it was before Open, except for values that other
// programs have changed meanwhile. The interface may be gone. If something
// cannot be restored, the error lists it, and the journal stays for the next
// Open. Further calls do nothing and return the same error.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return m.err
	}
	m.closed = true
	if err := m.converge(plan{}, true); err != nil {
		m.err = fmt.Errorf("routing: restore the host: %w", err)
	} else if err := m.journal.remove(); err != nil {
		m.err = fmt.Errorf("routing: %w", err)
	}
	m.release()
	return m.err
}
