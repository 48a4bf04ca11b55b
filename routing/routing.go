package routing

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	// ErrInUse is returned by Open when a live process manages the same
	// instance.
	ErrInUse = errors.New("instance is in use by another process")

	// ErrIPv6Disabled says that the administrator turned IPv6 off on the
	// interface: it is what Held returns, and with Mark 0 Apply.
	ErrIPv6Disabled = errors.New("IPv6 is disabled on the interface")

	// ErrTooManyRoutes is returned by Apply for a state that needs more than
	// MaxRoutes routes.
	ErrTooManyRoutes = errors.New("too many routes")
)

// Config says what a Manager looks after and how it is told from others.
type Config struct {
	// Instance names what is ours: the nftables table is
	// "masque-INSTANCE". 1 to 64 letters, digits, '_', '.' or '-'.
	Instance string

	// Interface is the name of the tunnel's interface. It must exist, and no
	// other Manager may look after it.
	Interface string

	// Mark is the SO_MARK of our own outer sockets, see MarkSocket: two bits,
	// see ValidMark. Other bits of marks are left alone. Routes then go into
	// tables of their own, by policy rules that packets with the higher bit
	// pass by; connections that came in from outside have that bit alone.
	// Tunnels of one host should use the same mark, or they might run through
	// each other in a circle. 0: routes go into the main table.
	Mark uint32

	// Journal is the path of a file that tells the next process what to put
	// back if this one is killed; its directory is created. Instances of one
	// host should have their journals in one directory, with the same
	// extension. "": no journal; sysctls and, on an interface that outlives
	// the process, addresses then stay after a crash, and nothing keeps two
	// processes from managing the same instance.
	Journal string

	// Logger receives a line for every thing removed that a dead process left
	// behind, for sysctls turned on, and for features that the kernel lacks.
	// Single changes are logged at debug level. nil: nothing is logged.
	Logger *slog.Logger
}

// State is what the kernel shall have. The zero State is a tunnel interface
// that is up and has nothing.
type State struct {
	// MTU of the interface in bytes, at least 1280 with IPv6. 0: as it was at
	// Open.
	MTU int

	// Addresses of the interface with their prefix lengths. IPv6 addresses do
	// not go through duplicate address detection. With a Config.Mark no
	// route comes with a prefix; list it in Routes where it is wanted.
	Addresses []netip.Prefix

	// Routes are the prefixes that the tunnel leads to; see the package comment
	// for how they compete with the host's. A route of a family of which the
	// interface has no address is installed all the same: that is what an
	// unnumbered link between sites is. Packets that the host itself sends
	// there have an address of another interface.
	Routes []netip.Prefix

	// HostRoutes are the routes of the host, its LAN among them, that go before
	// Routes. Only with a Config.Mark.
	HostRoutes HostRoutes

	// Private are prefixes besides the private ones to which HostPrivate lets the
	// host's routes count, such as networks behind this host.
	Private []netip.Prefix

	// Unreachable are prefixes that lead nowhere: they compete as Routes do,
	// and packets to them are refused. Only with a Config.Mark. Where the
	// interface cannot have IPv6, the IPv6 part of Routes counts as listed
	// here: nothing of it leaves beside the tunnel.
	Unreachable []netip.Prefix

	// Exclude are prefixes that go around the tunnel. Only with a Config.Mark.
	Exclude []netip.Prefix

	// HoldDNS refuses queries for names that would leave through another
	// interface than the tunnel's, in the clear or over TLS or QUIC, be they of
	// the host or forwarded by it. Sockets with the mark pass. Only with a
	// Config.Mark.
	HoldDNS bool

	// Forward makes the host a router, for the families that Addresses, Routes
	// and Masquerade name.
	Forward bool

	// Reach are the destinations to which packets out of the tunnel are
	// forwarded, besides those of connections that came from there. With a
	// Config.Mark only; without, everything is reached.
	Reach []netip.Prefix

	// Masquerade are prefixes whose packets get the host's own address when
	// they leave through another interface than the tunnel's. They do not leave
	// without, and nobody begins a connection to them from there.
	Masquerade []netip.Prefix

	// Listen are the UDP ports of this program's own servers on this host. With
	// Masquerade their packets are not tracked, and none of the ports is given
	// to a packet of the tunnel.
	Listen []uint16
}

// Manager keeps the kernel's side of one tunnel. Its methods may be called
// concurrently, from threads in the network namespace in which it was opened.
type Manager struct {
	mu      sync.Mutex
	state   State // state of the last successful Apply; a kernel without IPv6 leaves that out
	applied plan  // what it asked for
	held    error // why its IPv6 leads nowhere, see Held
	repairs repairs
	bypass  string // which packets for the tunnel went elsewhere at the last look
	closed  bool
	err     error // result of Close
	kernel
}

// kernel is one interface of one instance: what a plan is applied to.
type kernel struct {
	Config
	index   int
	ipv6    bool            // the kernel has it
	procSys string          // where sysctls are
	nl      *netlink.Handle // lenient about dump requests, as old kernels are
	dump    *netlink.Handle // strict, so that the kernel filters routes
	journal *journal
	// the journal lists what was undone; said once
	journalStale bool
	rec          record // what Close has to put back
	// the first that the kernel gives to connections of this host
	firstLocalPort uint16
	// ports on which this host listened when they were first asked for
	cachedPorts func() []portRange
	// optional features that the kernel was found to lack
	missingFeatures map[string]bool
	// our table when it was as it shall be; nil: not known
	verified []kernelChain
	commit   func(table string, replace bool, chains []chain) error // commitTable
	// the routes of the last comparison with a plan
	plannedRoutes map[route]struct{}
	afterCrash    bool // the process that made rec is dead: say what is undone
}

var validInstance = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// Open starts to manage an interface, and removes what a dead process of the
// same instance, or the interface of a dead process, left behind. It changes
// nothing else. Errors: ErrInUse, os.ErrPermission without CAP_NET_ADMIN, an
// interface that does not exist, a journal that cannot be written.
func Open(c Config) (*Manager, error) {
	return open(c, "/proc/sys")
}

func open(c Config, procSys string) (_ *Manager, err error) {
	m := &Manager{repairs: repairs{backoffs: make(map[string]*backoff), counts: make(map[string]uint64)}}
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

// Clean does for an instance that does not run what its next Open would: it
// removes what a dead process left behind. It says whether there was anything.
// The Interface of c is not needed. Errors are those of Open.
func Clean(c Config) (found bool, err error) {
	var k kernel
	defer k.release()
	if err := k.init(c, "/proc/sys"); err != nil {
		return false, fmt.Errorf("routing: %w", err)
	}
	_, table, err := readTable(k.tableName())
	if err != nil && !noNFTables(err) {
		return false, fmt.Errorf("routing: %w", err)
	}
	journal, err := k.takeOver()
	if err == nil {
		err = k.journal.remove()
	}
	if err != nil {
		err = fmt.Errorf("routing: %w", err)
	}
	return table || journal, err
}

// init makes s ready to talk to the kernel.
func (k *kernel) init(c Config, procSys string) (err error) {
	if !validInstance.MatchString(c.Instance) {
		return errInstance(c.Instance)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("instance", c.Instance)
	if c.Mark != 0 && !ValidMark(c.Mark) {
		return fmt.Errorf("mark %#x: want two bits", c.Mark)
	}
	*k = kernel{Config: c, procSys: procSys, missingFeatures: make(map[string]bool), commit: commitTable}
	// Once, as the range stays the same for as long as the chains do; and only
	// when it is needed, as it takes some milliseconds.
	k.firstLocalPort, k.cachedPorts = k.firstPort(), sync.OnceValue(k.usedPorts)
	if _, err := os.Stat(filepath.Join(procSys, "net/ipv6")); err == nil {
		k.ipv6 = true
	}
	if k.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open a netlink socket: %w", explain(err))
	}
	if k.dump, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open a netlink socket: %w", explain(err))
	}
	// Kernels before 4.20 do not know strict checking: they send every route,
	// and the rest is filtered here.
	_ = k.dump.SetStrictCheck(true)
	return nil
}

// takeOver takes the journal and removes what a dead process left behind. It
// says whether there was a journal.
func (k *kernel) takeOver() (found bool, err error) {
	fresh := record{Boot: bootID(k.procSys), Instance: k.Instance, Interface: k.Interface,
		Index: k.index}
	j, old, why, err := openJournal(k.Journal, fresh)
	if err != nil {
		return false, err
	}
	k.journal = j
	switch {
	case errors.Is(why, errStale):
		k.Logger.Info("journal ignored", "reason", why)
	case why != nil:
		k.Logger.Warn("journal ignored: what is recognised as ours is removed; sysctls stay as they are", "reason", why)
	}
	found = old != nil || why != nil
	if err := k.clean(old); err != nil {
		return found, fmt.Errorf("remove what a dead process left behind: %w", err)
	}
	k.rec = fresh
	return found, nil
}

func errInstance(name string) error {
	return fmt.Errorf("instance name %q: want 1 to 64 letters, digits, '_', '.' or '-'", name)
}

// Apply makes the kernel's state the one wanted. It returns when that is so, or
// with an error and the state that the last successful Apply had asked for; the
// error says when that could not be put back either. With the state that the
// kernel has already it changes nothing; what others removed of ours it puts
// back. Where the interface cannot have IPv6, the state is applied without it,
// see Held. Errors: ErrTooManyRoutes, ErrInterfaceGone, os.ErrPermission
// without CAP_NET_ADMIN, os.ErrClosed after Close, and those of the kernel,
// each with the object and what can be done about it.
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
			err = errors.Join(err, fmt.Errorf("and the state before could not be put back: %w", back))
		}
		return fmt.Errorf("routing: %w", err)
	}
	m.state, m.applied, m.held = asked, want, held
	m.repairs.lostIPv6 = m.repairs.lostIPv6 && held != nil
	return nil
}

// Held returns why the state of the last Apply was applied without IPv6, with
// its IPv6 routes leading nowhere: an ErrIPv6Disabled with its remedy. It
// returns nil where nothing was held.
func (m *Manager) Held() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// planFor is newPlan with what depends on the host's networks as they are now.
func (k *kernel) planFor(want State) (plan, error) {
	p, err := newPlan(want, k)
	if err == nil {
		p.sysctls = append(p.sysctls, k.looseFilters(want)...)
	}
	return p, err
}

// FollowHost is to be called when networks or routes of the host have changed.
// It has the state applied fit them, and returns where they have the same
// addresses as that, what becomes of it, and which rules of other programs take
// packets out of the tunnel; one sentence each, in a stable order.
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
	return slices.Concat(networkConflicts(m.state, networks), publicRoutes(m.state, routes), selective), nil
}

// Close puts the host back as it was before Open, as far as nobody else changed
// it meanwhile. The interface may be gone already. The error lists what could
// not be restored; the journal then stays, and the next Open of the instance
// tries again. Further calls do nothing and return the same error.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return m.err
	}
	m.closed = true
	if err := m.converge(plan{}, true); err != nil {
		m.err = fmt.Errorf("routing: not restored: %w", err)
	} else if err := m.journal.remove(); err != nil {
		m.err = fmt.Errorf("routing: %w", err)
	}
	m.release()
	return m.err
}

// release gives back what the process holds, and leaves the kernel alone.
func (k *kernel) release() {
	for _, h := range []*netlink.Handle{k.nl, k.dump} {
		if h != nil {
			h.Close()
		}
	}
	k.journal.close()
}

// undone takes note of how the journal was written after something was undone.
// Where that failed, as on a full disk, the file lists what is not there any
// more, and the next process passes over it: no reason to leave the rest of the
// host as it is.
func (k *kernel) noteUndo(err error) {
	if err != nil && !k.journalStale {
		k.journalStale = true
		k.Logger.Warn("what was undone stays in the journal", "error", err)
	}
}

// lack notes, and says once, that something optional is not to be had here.
func (k *kernel) reportMissing(feature, consequence string, err error) {
	if k.missingFeatures[feature] {
		return
	}
	k.missingFeatures[feature] = true
	logger := k.Logger.With("missing", feature)
	if err != nil {
		logger = logger.With("error", err)
	}
	logger.Warn(consequence)
}

// explain adds a remedy to errors of the kernel that have one.
func explain(err error) error {
	remedy := ""
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		remedy = "run as root or with CAP_NET_ADMIN"
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, unix.EPROTONOSUPPORT):
		remedy = "the running kernel lacks this feature or its module"
	case errors.Is(err, unix.EEXIST):
		remedy = "another program has put the same there: remove it"
	case errors.Is(err, unix.ENODEV):
		remedy = "the interface is gone: start again"
	case errors.Is(err, unix.ENETDOWN):
		remedy = "the interface was set down: set it up"
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
		remedy = "the kernel is out of memory for it: free some, or use fewer routes"
	case errors.Is(err, unix.EROFS):
		remedy = "the file system is mounted read-only"
	default:
		return err
	}
	return fmt.Errorf("%w (%s)", err, remedy)
}
