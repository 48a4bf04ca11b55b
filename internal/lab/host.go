package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is one host of a lab: a network namespace, and files of its own in /etc,
// /run and /var/lib.
type Host struct {
	lab  *Lab
	name string
	// dir holds the directories that the host sees as /run, /etc and /var/lib.
	dir     string
	netFD   int    // network namespace
	mountFD int    // mount namespace
	netName string // name of the network namespace in /proc
	nl      *netlink.Handle

	jobs     chan func() // functions to run on the host's thread
	quit     chan struct{}
	closing  sync.Once
	hostsMu  sync.Mutex // guards /etc/hosts
	closeErr error
}

// Host makes a host. It has a loopback interface, which is up, and no others.
// Its /etc/hosts lists only localhost. Duplicate address detection is off. The
// name must be new, and becomes part of file names.
func (l *Lab) Host(name string) (*Host, error) {
	h := &Host{lab: l, name: name, dir: filepath.Join(l.dir, name), netFD: -1, mountFD: -1,
		jobs: make(chan func()), quit: make(chan struct{})}
	l.mu.Lock()
	_, taken := l.hosts[name]
	if l.closed || taken || name == "" || name == "artifacts" || strings.Contains(name, "/") {
		l.mu.Unlock()
		return nil, fmt.Errorf("lab: host %q: the name is taken or invalid, or the lab is closed", name)
	}
	l.hosts[name] = nil // taken
	l.mu.Unlock()

	ready := make(chan error)
	onThread(func() { h.serve(ready) })
	err := <-ready
	if err == nil {
		err = h.setUp()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && l.closed {
		err = errClosed
	}
	if err != nil {
		delete(l.hosts, name)
		h.close()
		return nil, fmt.Errorf("lab: host %q: %w", name, err)
	}
	l.hosts[name] = h
	return h, nil
}

var errClosed = errors.New("the lab is closed")

// Name returns the host's name.
func (h *Host) Name() string { return h.name }

// serve makes the calling thread the host's and runs jobs on it. Programs are
// started from this thread, because the kernel kills them when it ends.
func (h *Host) serve(ready chan<- error) {
	err := h.makeNamespaces()
	ready <- err
	for err == nil {
		select {
		case f := <-h.jobs:
			f()
		case <-h.quit:
			return
		}
	}
}

// run runs f on the host's thread.
func (h *Host) run(f func() error) error {
	done := make(chan error, 1)
	select {
	case h.jobs <- func() { done <- f() }:
		return <-done
	case <-h.quit:
		return errClosed
	}
}

// makeNamespaces moves the calling thread into new namespaces.
func (h *Host) makeNamespaces() error {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Sethostname([]byte(h.name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := h.mountFiles(); err != nil {
		return err
	}
	var err error
	if h.netFD, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC,
		0); err != nil {
		return fmt.Errorf("open the network namespace: %w", err)
	}
	if h.mountFD, err = unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC,
		0); err != nil {
		return fmt.Errorf("open the mount namespace: %w", err)
	}
	if h.netName, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	h.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	return err
}

// mountFiles gives the host an empty /run and /var/lib, and a writable overlay
// of /etc.
func (h *Host) mountFiles() error {
	run, lib := filepath.Join(h.dir, "run"), filepath.Join(h.dir, "lib")
	etc, work := filepath.Join(h.dir, "etc"), filepath.Join(h.dir, "work")
	for _, d := range []string{run, lib, etc, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// /run is mounted last: the other directories are below it.
	if err := unix.Mount("overlay", "/etc", "overlay", 0,
		"lowerdir=/etc,upperdir="+etc+",workdir="+work); err != nil {
		return fmt.Errorf("mount an overlay on /etc: %w: the kernel must have overlayfs, and be 5.11 or newer when not root", err)
	}
	if err := unix.Mount(lib, "/var/lib", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /var/lib: %w", err)
	}
	if err := unix.Mount(run, "/run", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// Some containers forbid this mount, which is optional.
	unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")

	for name, content := range map[string]string{
		"/etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 " + h.name + "\n",
		"/etc/hostname":    h.name + "\n",
		"/etc/resolv.conf": "# no name servers\n",
	} {
		// Some of these files are symbolic links into the machine's resolver.
		if err := removeIfExists(name); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// setUp prepares the new network namespace.
func (h *Host) setUp() error {
	lo, err := h.nl.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetUp(lo); err != nil {
		return err
	}
	return h.Sysctl("net.ipv6.conf.default.accept_dad", "0")
}

// Do calls f in the host's network and mount namespaces, on a thread of its
// own, and returns its error. Goroutines that f starts run outside. Sockets and
// files that f opens stay in the host. The host's network files are in
// /proc/thread-self/net, because /proc/net belongs to the main thread.
func (h *Host) Do(f func() error) error {
	return call(func() error {
		if err := h.enter(); err != nil {
			return fmt.Errorf("lab: enter host %s: %w", h.name, err)
		}
		return f()
	})
}

// enter moves the calling thread into the host's namespaces.
func (h *Host) enter() error {
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(h.netFD, unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := unix.Setns(h.mountFD, unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Chdir(cwd) // entering a mount namespace goes to its root
}

// Sysctl sets a kernel parameter in the host, such as "net.ipv4.ip_forward". A
// key with a dotted interface name uses slashes as separators, as in sysctl(8).
func (h *Host) Sysctl(key, value string) error {
	err := h.Do(func() error { return os.WriteFile(sysctlPath(key), []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("lab: host %s: sysctl %s=%s: %w", h.name, key, value, err)
	}
	return nil
}

func sysctlPath(key string) string {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return "/proc/sys/" + key
}

// Forward makes the host a router for both families.
func (h *Host) Forward() error {
	return errors.Join(
		h.Sysctl("net.ipv4.ip_forward", "1"),
		h.Sysctl("net.ipv6.conf.all.forwarding", "1"))
}

// Resolve adds name to the host's /etc/hosts.
func (h *Host) Resolve(name string, addrs ...netip.Addr) error {
	h.hostsMu.Lock()
	defer h.hostsMu.Unlock()
	return h.Do(func() error {
		f, err := os.OpenFile("/etc/hosts", os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return fmt.Errorf("lab: host %s: %w", h.name, err)
		}
		defer f.Close()
		for _, a := range addrs {
			if _, err := fmt.Fprintf(f, "%s %s\n", a, name); err != nil {
				return fmt.Errorf("lab: host %s: %w", h.name, err)
			}
		}
		return nil
	})
}

// close ends the host's thread and closes its namespaces.
func (h *Host) close() error {
	h.closing.Do(func() {
		close(h.quit)
		if h.nl != nil {
			h.nl.Close()
		}
		for _, fd := range []int{h.netFD, h.mountFD} {
			if fd >= 0 {
				h.closeErr = errors.Join(h.closeErr, unix.Close(fd))
			}
		}
	})
	return h.closeErr
}
