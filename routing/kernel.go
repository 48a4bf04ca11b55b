package routing

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernel makes the kernel match a plan for one interface of one instance.
type kernel struct {
	Config
	index   int    // interface index
	ipv6    bool   // the kernel has IPv6
	procSys string // directory of the sysctls

	// nl accepts dump requests of old kernels. dump requires that the kernel
	// filters routes, if it can.
	nl, dump *netlink.Handle

	journal      *journal
	journalStale bool   // a failure to shorten the journal was logged
	rec          record // changes to undo in Close

	// firstLocalPort is the lowest port that the kernel chooses for connections
	// of this host.
	firstLocalPort uint16

	// cachedPorts returns the ports on which this host listened when it was
	// first called.
	cachedPorts func() []portRange

	// missingFeatures are the optional features that the kernel lacks.
	missingFeatures map[string]bool

	// verified is the nftables table when it last matched the plan, nil if
	// unknown.
	verified []kernelChain

	// commit is commitTable, or a replacement in tests.
	commit func(table string, replace bool, chains []chain) error

	// plannedRoutes are the routes of the last plan.
	plannedRoutes map[route]struct{}

	// afterCrash means that rec is the record of a dead process, and that
	// changes are logged at level info.
	afterCrash bool
}

// init checks c and opens the netlink sockets.
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
	*k = kernel{Config: c, procSys: procSys, missingFeatures: make(map[string]bool),
		commit: commitTable}
	// The used ports are read once, so that the chains stay the same, and only
	// if necessary, because that takes some milliseconds.
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
	// Kernels before 4.20 do not have strict checking. They send all routes,
	// which are filtered here.
	_ = k.dump.SetStrictCheck(true)
	return nil
}

// takeOver opens the journal and undoes the changes of a dead process. It
// reports whether there was a journal.
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
		k.Logger.Warn("journal ignored: marked objects are removed; sysctls and addresses stay",
			"reason", why)
	}
	found = old != nil || why != nil
	if err := k.clean(old); err != nil {
		return found, fmt.Errorf("undo the changes of a dead process: %w", err)
	}
	k.rec = fresh
	return found, nil
}

// release closes the netlink sockets and the journal.
func (k *kernel) release() {
	for _, h := range []*netlink.Handle{k.nl, k.dump} {
		if h != nil {
			h.Close()
		}
	}
	k.journal.close()
}

// noteUndo is called with the result of writing the journal after a change was
// undone. A failure, as on a full disk, is logged once and does not stop the
// restoration: the journal then lists a change that no longer exists, which the
// next process ignores.
func (k *kernel) noteUndo(err error) {
	if err != nil && !k.journalStale {
		k.journalStale = true
		k.Logger.Warn("cannot shorten the journal", "error", err)
	}
}

// reportMissing records that the kernel lacks an optional feature, and logs the
// consequence once. err may be nil.
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

func (k *kernel) families() []int {
	if k.ipv6 {
		return []int{unix.AF_INET, unix.AF_INET6}
	}
	return []int{unix.AF_INET}
}

// repeat repeats a dump while it is interrupted by changes.
func repeat[T any](dump func() (T, error)) (T, error) {
	for range 9 {
		if v, err := dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}

// explain adds the remedy, if there is one, to an error of the kernel.
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
		remedy = "another program has created the same object: remove it"
	case errors.Is(err, unix.ENODEV):
		remedy = "the interface is gone: start again"
	case errors.Is(err, unix.ENETDOWN):
		remedy = "the interface was set down: set it up"
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
		remedy = "the kernel is out of memory: free some, or use fewer routes"
	case errors.Is(err, unix.EROFS):
		remedy = "the file system is mounted read-only"
	default:
		return err
	}
	return fmt.Errorf("%w (%s)", err, remedy)
}

// unlessGone explains the error of a removal. It returns nil if the object did
// not exist.
func unlessGone(err error) error {
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return explain(err)
}
