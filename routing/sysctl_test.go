package routing

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"masquevpn/internal/logtest"
)

// forwardState returns the State of a proxy without address translation.
func forwardState() State {
	return State{
		Addresses: prefixes("10.77.0.1/32", "fd77::1/128"),
		Routes:    prefixes("10.77.0.0/24", "fd77::/64"),
		Forward:   true,
	}
}

// Close restores the sysctls of each interface, because turning forwarding on
// for all interfaces changes them.
func TestForwardRestoresEachInterface(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	for name, value := range map[string]string{
		"net/ipv4/conf/up0/forwarding":              "1",
		"net/ipv4/conf/all/accept_redirects":        "0",
		"net/ipv6/conf/up1/forwarding":              "1",
		"net/ipv6/conf/up1/accept_ra":               "1",
		"net/ipv6/conf/up0/accept_ra":               "1",
		"net/ipv6/conf/default/forwarding":          "0",
		"net/ipv4/conf/default/forwarding":          "1",
		"net/ipv6/conf/all/accept_redirects":        "0",
		"net/ipv4/conf/up1/accept_redirects":        "0",
		"net/ipv4/conf/all/secure_redirects":        "0",
		"net/ipv4/conf/masque0/forwarding":          "0",
		"net/ipv6/conf/default/accept_ra":           "1",
		"net/ipv6/conf/masque0/accept_ra":           "1",
		"net/ipv4/conf/up1/send_redirects":          "0",
		"net/ipv6/conf/masque0/disable_ipv6":        "0",
		"net/ipv6/conf/masque0/accept_source_route": "0",
	} {
		h.sysctl(name, value)
	}
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, forwardState())
	for name, want := range map[string]string{
		"net/ipv4/ip_forward":          "1",
		"net/ipv6/conf/all/forwarding": "1",
		// keeps its default route from router advertisements
		"net/ipv6/conf/up0/accept_ra":     "2",
		"net/ipv6/conf/up1/accept_ra":     "1", // forwarded before, so it had no such route
		"net/ipv6/conf/default/accept_ra": "2",
		"net/ipv6/conf/masque0/accept_ra": "1",
	} {
		t.Run(name, func(t *testing.T) {
			if got := h.in(t).readSysctl(name); got != want {
				t.Errorf("got %s while forwarding, want %s", got, want)
			}
		})
	}
	h.close(m)
	h.wantSnapshot(before)
}

func TestForwardFollowsState(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	check := func(want4, want6 string) {
		t.Helper()
		if got := h.readSysctl("net/ipv4/ip_forward"); got != want4 {
			t.Errorf("IPv4 forwarding is %s, want %s", got, want4)
		}
		if got := h.readSysctl("net/ipv6/conf/all/forwarding"); got != want6 {
			t.Errorf("IPv6 forwarding is %s, want %s", got, want6)
		}
	}
	h.apply(m, State{Forward: true, Routes: prefixes("fd77::/64")})
	check("0", "1")
	h.apply(m, State{Forward: true, Routes: prefixes("10.77.0.0/24")})
	check("1", "0")
	h.apply(m, State{})
	check("0", "0")

	// Close restores the previous value, but not if another program changed it.
	h.sysctl("net/ipv4/ip_forward", "1")
	h.apply(m, forwardState())
	check("1", "1")
	h.sysctl("net/ipv6/conf/all/forwarding", "0")
	h.close(m)
	check("1", "0")
}

// The last instance restores a shared sysctl.
func TestSharedSysctls(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(h *host, first *Manager, c Config) // ends the first instance
	}{
		{"closed", func(h *host, first *Manager, _ Config) { h.close(first) }},
		{"killed", func(h *host, first *Manager, _ Config) { h.abandon(first) }},
		{"killed and opened again", func(h *host, first *Manager, c Config) {
			h.abandon(first)
			h.close(h.open(c))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			dir := t.TempDir()
			h.tun("masque0")
			h.tun("masque1")
			before := h.snapshot()
			c := Config{Instance: "one", Interface: "masque0",
				Journal: filepath.Join(dir, "one.json")}
			first := h.open(c)
			second := h.open(Config{Instance: "two", Interface: "masque1",
				Journal: filepath.Join(dir, "two.json")})
			h.apply(first, forwardState())
			other := forwardState()
			other.Routes = prefixes("10.78.0.0/24", "fd78::/64")
			h.apply(second, other)
			h.apply(second, other)
			tt.end(h, first, c)
			for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
				if got := h.readSysctl(name); got != "1" {
					t.Errorf("%s with one instance left: %s, want 1", name, got)
				}
			}
			h.close(second)
			for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
				if got := h.readSysctl(name); got != "0" {
					t.Errorf("%s after the last instance: %s, want 0", name, got)
				}
			}
			h.close(h.open(c))
			h.wantSnapshot(before)
		})
	}
}

// onReadOnlySysctls calls f with a read-only /proc/sys, as in a container.
func (h *host) onReadOnlySysctls(f func()) {
	h.t.Helper()
	h.do(func() {
		const path = "/proc/sys"
		for _, err := range []error{
			unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount(path, path, "", unix.MS_BIND, ""),
			unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
		} {
			if err != nil {
				h.t.Fatalf("make /proc/sys read-only: %v", err)
			}
		}
		f()
	})
}

func TestReadOnlySysctls(t *testing.T) {
	h := newHost(t)
	h.underlay()
	tunnel, _ := h.tun("masque0")
	before := h.snapshot()
	h.onReadOnlySysctls(func() {
		m, err := Open(Config{Instance: "one", Interface: "masque0", Logger: testLogger(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		err = m.Apply(forwardState())
		if !errors.Is(err, unix.EROFS) ||
			!strings.Contains(err.Error(), "sysctl -w net.ipv4.ip_forward=1") {
			t.Errorf("Apply: %v, want read-only file system, with the command", err)
		}
	})
	h.wantSnapshot(before)

	// The administrator set the sysctls, so Apply need not write them.
	h.sysctl("net/ipv4/ip_forward", "1")
	h.sysctl("net/ipv6/conf/all/forwarding", "1")
	h.onReadOnlySysctls(func() {
		m, err := Open(Config{Instance: "one", Interface: "masque0", Logger: testLogger(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if err := m.Apply(forwardState()); err != nil {
			t.Error(err)
		}
	})

	// The sysctls of a client are optional.
	var log logtest.Buffer
	h.onReadOnlySysctls(func() {
		m, err := Open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
			Logger: log.Logger()})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		for range 2 {
			if err := m.Apply(fullState()); err != nil {
				t.Fatal(err)
			}
		}
		if got := h.lookup("203.0.113.1", 0); got != tunnel {
			t.Errorf("203.0.113.1 is routed to interface %d, want %d", got, tunnel)
		}
	})
	for _, name := range []string{"all/src_valid_mark", "masque0/accept_local"} {
		if got := strings.Count(log.String(), "missing=net/ipv4/conf/"+name); got != 1 {
			t.Errorf("%d warnings about %s, want one:\n%s", got, name, log.String())
		}
	}
}

func TestJournalCannotBeWritten(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	before := h.snapshot()
	dir := t.TempDir()
	m := h.open(Config{Instance: "one", Interface: "masque0",
		Journal: filepath.Join(dir, "j", "one.json")})
	// As if the disk had failed.
	if err := os.RemoveAll(filepath.Join(dir, "j")); err != nil {
		t.Fatal(err)
	}
	if err := h.tryApply(m, forwardState()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Apply: %v, want no such file", err)
	}
	h.wantSnapshot(before)
}
