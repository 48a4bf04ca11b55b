package routing

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"masquevpn/internal/logtest"
)

// Tests run in a process with user, mount and network namespaces of its own, so
// they need no privileges and do not change the machine. Each host of a test is
// another network namespace.

// inNamespaces is an environment variable that marks this process.
const inNamespaces = "ROUTING_TEST_IN_NAMESPACES"

func TestMain(m *testing.M) {
	if os.Getenv(crashChild) != "" {
		crashMain()
	}
	if os.Getenv(inNamespaces) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig applies to the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNamespaces+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "these tests need user and network namespaces:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// host is a network namespace.
type host struct {
	t   *testing.T
	ns  netns.NsHandle
	log *logtest.Buffer // nil unless the test needs it
}

// newHost creates a host with the loopback interface up.
func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, ns: netns.None()}
	h.do(func() {
		var err error
		if h.ns, err = netns.New(); err != nil {
			t.Fatalf("make a network namespace: %v", err)
		}
	})
	t.Cleanup(func() { h.ns.Close() })
	h.ip("link set lo up")
	return h
}

// in returns the host for use in a subtest.
func (h *host) in(t *testing.T) *host {
	return &host{t: t, ns: h.ns}
}

// do runs f in the namespace of the host. f may call t.Fatal.
func (h *host) do(f func()) {
	h.t.Helper()
	finished := false
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
		if h.ns.IsOpen() {
			if err := netns.Set(h.ns); err != nil {
				h.t.Errorf("enter the network namespace: %v", err)
				return
			}
		}
		f()
		finished = true
	})
	wg.Wait()
	if !finished {
		h.t.FailNow()
	}
}

// run runs a program on the host and returns its output.
func (h *host) run(name string, args ...string) string {
	h.t.Helper()
	var out []byte
	h.do(func() {
		var err error
		if out, err = exec.Command(name, args...).CombinedOutput(); err != nil {
			h.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	})
	return string(out)
}

// ip runs ip(8) and returns its output.
func (h *host) ip(args string) string {
	h.t.Helper()
	return h.run("ip", strings.Fields(args)...)
}

// sysctl writes a sysctl, given as a path below /proc/sys.
func (h *host) sysctl(name, value string) {
	h.t.Helper()
	h.do(func() {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			h.t.Fatal(err)
		}
	})
}

func (h *host) readSysctl(name string) (value string) {
	h.t.Helper()
	h.do(func() {
		b, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			h.t.Fatal(err)
		}
		value = strings.TrimSpace(string(b))
	})
	return value
}

// device creates a TUN device, which exists until the file is closed.
func (h *host) device(name string) (f *os.File) {
	h.t.Helper()
	h.do(func() {
		var err error
		if f, err = makeTUN(name); err != nil {
			h.t.Fatalf("make a TUN device: %v", err)
		}
	})
	h.t.Cleanup(func() { f.Close() })
	return f
}

func makeTUN(name string) (*os.File, error) {
	t := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TUN,
		Flags: netlink.TUNTAP_NO_PI, NonPersist: true, Queues: 1,
	}
	if err := netlink.LinkAdd(t); err != nil {
		return nil, err
	}
	return t.Fds[0], nil
}

// tun creates a TUN device for a test that neither reads nor writes packets.
func (h *host) tun(name string) (index int, closeTUN func()) {
	h.t.Helper()
	f := h.device(name)
	return h.index(name), func() { f.Close() }
}

// underlay adds the interface up0 with a LAN and default routes to the host and
// returns its index.
func (h *host) underlay() int {
	h.t.Helper()
	h.ip("link add up0 type veth peer name up1")
	for _, name := range []string{"up0", "up1"} {
		h.ip("link set " + name + " addrgenmode none up")
	}
	h.waitFor("up0", netlink.OperUp)
	h.waitFor("up1", netlink.OperUp)
	h.ip("addr add 192.168.5.2/24 dev up0")
	h.ip("addr add 2001:db8:5::2/64 dev up0 nodad")
	h.ip("route add default via 192.168.5.1")
	h.ip("-6 route add default via 2001:db8:5::1")
	return h.index("up0")
}

func (h *host) index(name string) (index int) {
	h.t.Helper()
	h.do(func() {
		link, err := netlink.LinkByName(name)
		if err != nil {
			h.t.Fatal(err)
		}
		index = link.Attrs().Index
	})
	return index
}

// waitFor waits for the operational state of an interface.
func (h *host) waitFor(name string, state netlink.LinkOperState) {
	h.t.Helper()
	h.do(func() {
		for {
			link, err := netlink.LinkByName(name)
			if err != nil {
				h.t.Fatal(err)
			}
			if link.Attrs().OperState == state {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// open opens a Manager on the host and closes it at the end of the test.
func (h *host) open(c Config) *Manager {
	h.t.Helper()
	m, err := h.tryOpen(c)
	if err != nil {
		h.t.Fatal(err)
	}
	return m
}

func (h *host) tryOpen(c Config) (m *Manager, err error) {
	h.t.Helper()
	if c.Logger == nil {
		c.Logger = testLogger(h.t)
	}
	h.do(func() { m, err = Open(c) })
	if err == nil {
		h.t.Cleanup(func() { h.do(func() { m.Close() }) })
	}
	return m, err
}

// apply applies s and waits until the kernel accepts packets to its addresses.
// For IPv6 the kernel does that in the background.
func (h *host) apply(m *Manager, s State) {
	h.t.Helper()
	if err := h.tryApply(m, s); err != nil {
		h.t.Fatalf("Apply: %v", err)
	}
	h.do(func() {
		for _, p := range s.Addresses {
			for deadline := time.Now().Add(patience); !isAccepted(p.Addr()); {
				if time.Now().After(deadline) {
					h.t.Fatalf("packets to %v are not accepted", p.Addr())
				}
				time.Sleep(time.Millisecond)
			}
		}
	})
}

// isAccepted reports whether the kernel accepts packets to a, or does not have
// that address.
func isAccepted(a netip.Addr) bool {
	if !hasAddr(a) {
		return true
	}
	routes, err := netlink.RouteGet(a.AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}

func hasAddr(a netip.Addr) bool {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	return err == nil && slices.ContainsFunc(addrs, func(x netlink.Addr) bool {
		ip, _ := netip.AddrFromSlice(x.IP)
		return ip.Unmap() == a
	})
}

func (h *host) tryApply(m *Manager, s State) (err error) {
	h.t.Helper()
	h.do(func() { err = m.Apply(s) })
	return err
}

func (h *host) close(m *Manager) {
	h.t.Helper()
	h.do(func() {
		if err := m.Close(); err != nil {
			h.t.Fatalf("Close: %v", err)
		}
	})
}

// abandon releases a Manager as the end of its process would.
func (h *host) abandon(m *Manager) {
	h.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.release()
}

// volatile matches the queueing discipline, which the kernel attaches when an
// interface is set up for the first time.
var volatile = regexp.MustCompile(` qdisc \S+`)

// settle waits until the kernel has finished adding IPv6 addresses, which it
// does in the background.
func (h *host) settle() {
	h.t.Helper()
	h.do(func() {
		for ; ; time.Sleep(time.Millisecond) {
			addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
			if err != nil {
				h.t.Fatal(err)
			}
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6,
				&netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
			if err != nil {
				h.t.Fatal(err)
			}
			if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
				return a.Flags&unix.IFA_F_TENTATIVE != 0 ||
					!slices.ContainsFunc(routes, func(r netlink.Route) bool {
						return r.Type == unix.RTN_LOCAL && r.Dst.IP.Equal(a.IP)
					})
			}) {
				return
			}
		}
	})
}

// snapshot returns the configuration of the host that package routing may
// change, as text by object.
func (h *host) snapshot() map[string]string {
	h.t.Helper()
	h.settle()
	s := map[string]string{
		"addr":   volatile.ReplaceAllString(h.ip("-d addr"), ""),
		"route":  h.ip("-d route show table all"),
		"route6": h.ip("-6 -d route show table all"),
		// The order of rules with the same priority does not matter.
		"rule":    sortedLines(h.ip("-d rule")),
		"rule6":   sortedLines(h.ip("-6 -d rule")),
		"ruleset": h.run("nft", "list", "ruleset"),
	}
	h.do(func() {
		for _, dir := range []string{"/proc/sys/net/ipv4", "/proc/sys/net/ipv6"} {
			filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					b, _ := os.ReadFile(path)
					s[path] = string(b)
				}
				return nil
			})
		}
	})
	return s
}

func sortedLines(text string) string {
	return strings.Join(slices.Sorted(strings.Lines(text)), "")
}

// wantSnapshot checks that the snapshot of the host is want. It ignores sysctls
// that are not in want.
func (h *host) wantSnapshot(want map[string]string) {
	h.t.Helper()
	got := h.snapshot()
	for object := range got {
		if _, ok := want[object]; !ok && strings.HasPrefix(object, "/proc") {
			delete(got, object)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		h.t.Errorf("the host differs (-want +got):\n%s", diff)
	}
}

// lookup returns the index of the interface to which the kernel routes a
// packet, or 0 if the destination is unreachable.
func (h *host) lookup(dst string, mark uint32) (index int) {
	h.t.Helper()
	h.do(func() {
		routes, err := netlink.RouteGetWithOptions(netip.MustParseAddr(dst).AsSlice(),
			&netlink.RouteGetOptions{Mark: mark})
		switch {
		case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		case err != nil:
			h.t.Fatalf("route get %s: %v", dst, err)
		default:
			index = routes[0].LinkIndex
		}
	})
	return index
}

// wantInterfaces checks lookup without a mark. want contains interface indexes
// by destination.
func (h *host) wantInterfaces(want map[string]int) {
	h.t.Helper()
	for dst, want := range want {
		if got := h.lookup(dst, 0); got != want {
			h.t.Errorf("%s is routed to interface %d, want %d", dst, got, want)
		}
	}
}

func prefixes(list ...string) (ps []netip.Prefix) {
	for _, p := range list {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

func testLogger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}
