package hostdns

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"masquevpn/internal/lab"
)

func TestMain(m *testing.M) {
	lab.Enter() // permits mounts
	os.Exit(m.Run())
}

// original is a resolv.conf that a parser would not preserve: it has odd lines
// and no final line break.
const original = "# by hand\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n\noptions edns0\n#|tricky\nsearch home.example"

var (
	settings = Settings{
		Servers: []netip.AddrPort{netip.MustParseAddrPort("10.77.0.1:53"),
			netip.MustParseAddrPort("[fd77::1]:53")},
		Search: []string{"corp.example", "example"}, Domains: []string{Root},
	}
	hostServers = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53"),
		netip.MustParseAddrPort("[2001:db8::53]:53")}
)

const lines = "nameserver 10.77.0.1\nnameserver fd77::1\nsearch corp.example example\n"

// host has a resolv.conf, but neither systemd-resolved nor openresolv.
type host struct {
	*testing.T
	path string
}

func newHost(t *testing.T) *host {
	return &host{T: t, path: filepath.Join(t.TempDir(), "resolv.conf")}
}

func (h *host) config(instance string) Config {
	return Config{Instance: instance, Interface: "lo",
		Logger:     slog.New(slog.NewTextHandler(h.Output(), nil)),
		ResolvConf: h.path, Bus: "unix:path=" + h.path + ".nobus",
		Resolvconf: h.path + ".noprogram"}
}

func (h *host) write(content string) {
	h.Helper()
	if err := os.WriteFile(h.path, []byte(content), 0o640); err != nil {
		h.Fatal(err)
	}
}

func (h *host) open(instance string) *Manager {
	h.Helper()
	m, err := Open(h.config(instance))
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { _ = m.Close() })
	return m
}

func (h *host) apply(m *Manager, s Settings) {
	h.Helper()
	if via, err := m.Apply(s); err != nil || via != h.path {
		h.Fatalf("applied by %q, %v", via, err)
	}
}

func (h *host) close(m *Manager) {
	h.Helper()
	if err := m.Close(); err != nil {
		h.Fatal(err)
	}
}

// kill abandons m as if its process had been killed.
func kill(m *Manager) {
	m.file.watch.close()
	m.file.watch = nil
	m.backends = nil
}

// state describes the directory: each file with its inode, mode, owner and
// content.
func (h *host) state() string {
	h.Helper()
	var b strings.Builder
	entries, err := os.ReadDir(filepath.Dir(h.path))
	if err != nil {
		h.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(filepath.Dir(h.path), e.Name())
		info, err := os.Lstat(path)
		if err != nil {
			h.Fatal(err)
		}
		content, _ := os.ReadFile(path)
		to, _ := os.Readlink(path)
		st := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s %v inode %d links %d owner %d:%d changed %v -> %q\n%q\n", e.Name(),
			info.Mode(), st.Ino, st.Nlink, st.Uid, st.Gid, info.ModTime(), to, content)
	}
	return b.String()
}

func (h *host) content() string {
	h.Helper()
	b, err := os.ReadFile(h.path)
	if err != nil {
		h.Fatal(err)
	}
	return string(b)
}

// ours checks that resolv.conf is the file of instance.
func (h *host) ours(instance string) {
	h.Helper()
	if got := h.content(); !strings.HasPrefix(got, marker+instance+"\n"+notice) ||
		!strings.Contains(got, "\n"+lines) {
		h.Errorf("resolv.conf does not belong to tunnel %s:\n%s", instance, got)
	}
}

func (h *host) unchanged(before string) {
	h.Helper()
	if after := h.state(); after != before {
		h.Errorf("before\n%safter\n%s", before, after)
	}
}

func (h *host) eventually(condition string, ok func() bool) {
	h.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.Fatalf("not reached: %s\n%s", condition, h.state())
		}
	}
}

// kinds are the states of resolv.conf before a tunnel.
var kinds = []struct {
	name  string
	setUp func(*host)
}{
	{"file", func(h *host) { h.write(original) }},
	{"empty file", func(h *host) { h.write("") }},
	{"no file", func(*host) {}},
	{"link", func(h *host) {
		if err := os.WriteFile(h.path+".real", []byte(original), 0o600); err != nil {
			h.Fatal(err)
		}
		if err := os.Symlink("resolv.conf.real", h.path); err != nil {
			h.Fatal(err)
		}
	}},
	{"dangling link", func(h *host) {
		if err := os.Symlink("/none/resolv.conf", h.path); err != nil {
			h.Fatal(err)
		}
	}},
	{"mounted file", func(h *host) { h.mount(original) }},
	{"mounted empty file", func(h *host) { h.mount("") }},
	{"mounted file in a read-only directory", func(h *host) {
		h.mount(original)
		dir := filepath.Dir(h.path)
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			h.Fatal(err)
		}
		h.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY,
			""); err != nil {
			h.Fatal(err)
		}
	}},
}

// mount mounts another file on resolv.conf, as `ip netns exec` and containers
// do.
func (h *host) mount(content string) {
	h.Helper()
	h.write("nameserver 192.0.2.99\n") // hidden by the mount
	other := filepath.Join(h.TempDir(), "resolv.conf")
	if err := os.WriteFile(other, []byte(content), 0o604); err != nil {
		h.Fatal(err)
	}
	if err := unix.Mount(other, h.path, "", unix.MS_BIND, ""); err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { _ = unix.Unmount(h.path, unix.MNT_DETACH) })
}

// withoutTimes removes the times from a state, because writing in place changes
// them.
func withoutTimes(state string) string {
	out := strings.Split(state, "\n")
	for i, line := range out {
		if before, rest, ok := strings.Cut(line, " changed "); ok {
			_, to, _ := strings.Cut(rest, " -> ")
			out[i] = before + to
		}
	}
	return strings.Join(out, "\n")
}

func TestFileIsRestored(t *testing.T) {
	for _, kind := range kinds {
		for _, end := range []string{"closed", "without servers", "killed"} {
			t.Run(kind.name+" "+end, func(t *testing.T) {
				h := newHost(t)
				kind.setUp(h)
				before := h.state()
				if strings.HasPrefix(kind.name, "mounted") {
					before = withoutTimes(before)
				}
				m := h.open("home")
				h.apply(m, settings)
				h.ours("home")
				changed := settings
				changed.Search = []string{"other.example"}
				h.apply(m, changed)
				if got := h.content(); !strings.Contains(got, "search other.example\n") ||
					strings.Contains(got, "search corp.example") {
					t.Errorf("after a change:\n%s", got)
				}
				switch end {
				case "closed":
					h.close(m)
				case "without servers":
					if via, err := m.Apply(Settings{}); via != "" || err != nil {
						t.Errorf("%q, %v", via, err)
					}
				case "killed":
					kill(m)
					h.open("home")
				}
				after := h.state()
				if strings.HasPrefix(kind.name, "mounted") {
					after = withoutTimes(after)
				}
				if after != before {
					t.Errorf("before\n%safter\n%s", before, after)
				}
			})
		}
	}
}

// A file of a killed process that someone has replaced since is not touched.
func TestReplacedAfterKill(t *testing.T) {
	h := newHost(t)
	h.write(original)
	m := h.open("home")
	h.apply(m, settings)
	kill(m)
	if err := os.Remove(h.path); err != nil {
		t.Fatal(err)
	}
	h.write("nameserver 192.0.2.1\n")
	h.open("home")
	if got := h.content(); got != "nameserver 192.0.2.1\n" {
		t.Errorf("now\n%s", got)
	}
	if state := h.state(); strings.Contains(state, ".masque-") {
		t.Errorf("left behind:\n%s", state)
	}
}

// A process that is killed between backup and installation has changed nothing.
func TestKilledAfterBackup(t *testing.T) {
	h := newHost(t)
	h.write(original)
	before := h.state()
	if err := os.Link(h.path, h.path+".masque-home"); err != nil {
		t.Fatal(err)
	}
	h.open("home")
	h.unchanged(before)
}

// Another program's version of the file is restored at the end. Until then the
// tunnel's servers are installed again.
func TestChangesOfAnotherProgram(t *testing.T) {
	const theirs = "nameserver 192.0.2.77\n"
	for _, kind := range kinds {
		for _, how := range []string{"replaces", "writes", "removes"} {
			mounted := strings.HasPrefix(kind.name, "mounted")
			if mounted && how != "writes" || kind.name == "dangling link" && how == "writes" {
				continue // impossible combination
			}
			t.Run(kind.name+" "+how, func(t *testing.T) {
				h := newHost(t)
				kind.setUp(h)
				m := h.open("home")
				h.apply(m, settings)
				switch how {
				case "replaces":
					if err := replace(h.path, []byte(theirs)); err != nil {
						t.Fatal(err)
					}
				case "writes":
					h.write(theirs)
				case "removes":
					if err := os.Remove(h.path); err != nil {
						t.Fatal(err)
					}
				}
				h.eventually("the tunnel's servers are back", func() bool {
					content, _ := os.ReadFile(h.path)
					return bytes.Contains(content, []byte(lines))
				})
				h.ours("home")
				if servers, ok := m.Upstream(); how != "removes" &&
					(!ok || !slices.Equal(servers,
						[]netip.AddrPort{netip.MustParseAddrPort("192.0.2.77:53")})) {
					t.Errorf("upstream servers: %v, %v", servers, ok)
				}
				h.close(m)
				got, err := os.ReadFile(h.path)
				if how == "removes" {
					if !os.IsNotExist(err) {
						t.Errorf("now\n%s", got)
					}
				} else if string(got) != theirs {
					t.Errorf("now\n%s", got)
				}
				if state := h.state(); strings.Contains(state, ".masque-") {
					t.Errorf("left behind:\n%s", state)
				}
			})
		}
	}
}

// Another program's version written just before the end stays, although the
// watcher has not noticed it yet.
func TestChangeBeforeClose(t *testing.T) {
	h := newHost(t)
	h.write(original)
	m := h.open("home")
	h.apply(m, settings)
	m.file.watch.close()
	m.file.watch = nil
	if err := replace(h.path, []byte("nameserver 192.0.2.77\n")); err != nil {
		t.Fatal(err)
	}
	before := h.content()
	h.close(m)
	if got := h.content(); got != before {
		t.Errorf("now\n%s", got)
	}
	if state := h.state(); strings.Contains(state, ".masque-") {
		t.Errorf("left behind:\n%s", state)
	}
}

// An edited file is restored, as its notice warns, and keeps the original.
func TestEditedFileIsRestored(t *testing.T) {
	h := newHost(t)
	h.write(original)
	before := h.state()
	m := h.open("home")
	h.apply(m, settings)
	whole := h.content()
	f, err := os.OpenFile(h.path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "nameserver 192.0.2.9\n")
	f.Close()
	h.eventually("the edit is undone", func() bool { return h.content() == whole })
	h.close(m)
	h.unchanged(before)
}

// Two programs that fight over the file are limited by a rate.
func TestRestoreIsRateLimited(t *testing.T) {
	h := newHost(t)
	h.write(original)
	m := h.open("home")
	h.apply(m, settings)
	restores := 0
	for range restoreBurst + 3 {
		if err := replace(h.path, []byte("nameserver 192.0.2.77\n")); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * settleDelay); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if strings.Contains(h.content(), lines) {
				restores++
				break
			}
		}
	}
	if restores > restoreBurst+1 {
		t.Errorf("installed again %d times in a row", restores)
	}
	h.close(m)
	if got := h.content(); got != "nameserver 192.0.2.77\n" {
		t.Errorf("now\n%s", got)
	}
}

// Tunnels stack: the servers of the last one are used, and in whatever order
// the tunnels end, the original is restored.
func TestTwoTunnels(t *testing.T) {
	other := settings
	other.Search = []string{"other.example"}
	for _, order := range []string{"last ends first", "first ends first", "first is killed",
		"first changes"} {
		t.Run(order, func(t *testing.T) {
			h := newHost(t)
			h.write(original)
			before := h.state()
			one, two := h.open("one"), h.open("two")
			h.apply(one, settings)
			h.apply(two, other)
			if got := h.content(); !strings.HasPrefix(got, marker+"two\n") {
				t.Errorf("the servers of the last tunnel are not in use:\n%s", got)
			}
			for _, m := range []*Manager{one, two} {
				if servers, ok := m.Upstream(); !ok || !slices.Equal(servers, hostServers) {
					t.Errorf("upstream servers: %v, %v", servers, ok)
				}
			}
			switch order {
			case "last ends first":
				h.close(two)
				h.ours("one")
				h.close(one)
			case "first ends first":
				h.close(one)
				if got := h.content(); !strings.HasPrefix(got, marker+"two\n") {
					t.Errorf("after the end of the first:\n%s", got)
				}
				h.close(two)
			case "first is killed":
				kill(one)
				h.close(two)
				h.ours("one")
				h.open("one")
			case "first changes":
				changed := settings
				changed.Search = []string{"new.example"}
				h.apply(one, changed)
				if got := h.content(); !strings.HasPrefix(got, marker+"two\n") {
					t.Errorf("after a change of the first:\n%s", got)
				}
				h.close(two)
				if got := h.content(); !strings.Contains(got, "search new.example\n") {
					t.Errorf("after the end of the second:\n%s", got)
				}
				h.close(one)
			}
			h.unchanged(before)
		})
	}
}

// A file that is written in place serves one tunnel only.
func TestTwoTunnelsInPlace(t *testing.T) {
	h := newHost(t)
	h.mount(original)
	one, two := h.open("one"), h.open("two")
	h.apply(one, settings)
	if _, err := two.Apply(settings); err == nil ||
		!strings.Contains(err.Error(), "the tunnel one has "+h.path) {
		t.Errorf("second tunnel: %v", err)
	}
	h.ours("one")
	h.close(two)
	h.ours("one")
	h.close(one)
	if got := h.content(); got != original {
		t.Errorf("now\n%s", got)
	}
}

func TestRefused(t *testing.T) {
	server := settings.Servers[:1]
	root := []string{Root}
	searching := func(domain string) Settings {
		return Settings{Servers: server, Domains: root, Search: []string{domain}}
	}
	asking := func(address string) Settings {
		return Settings{Servers: []netip.AddrPort{netip.MustParseAddrPort(address)}, Domains: root}
	}
	for name, s := range map[string]Settings{
		"split DNS":                   {Servers: server, Domains: []string{"corp.example"}},
		"no domains":                  {Servers: server},
		"port 5353":                   asking("10.77.0.1:5353"),
		"address with a zone":         asking("[fe80::1%lo]:53"),
		"zero address":                {Servers: []netip.AddrPort{{}}, Domains: root},
		"line break in search domain": searching("a\nnameserver 192.0.2.1"),
		"space in search domain":      searching("a b"),
		"option as search domain":     searching("-m"),
		"empty search domain":         searching(""),
		"root as search domain":       searching(Root),
		"long label":                  searching(strings.Repeat("a", 64)),
		"empty label":                 {Servers: server, Domains: []string{Root, "a..b"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.write(original)
			before := h.state()
			m := h.open("home")
			if via, err := m.Apply(s); err == nil {
				t.Errorf("%+v: applied by %s", s, via)
			}
			h.unchanged(before)
			// Settings that are refused also end earlier ones.
			h.apply(m, settings)
			if _, err := m.Apply(s); err == nil {
				t.Errorf("%+v: applied", s)
			}
			h.unchanged(before)
		})
	}
}

// resolv.conf lists only as many servers as resolvers read.
func TestServersAreLimited(t *testing.T) {
	h := newHost(t)
	s := Settings{Domains: []string{Root},
		Servers: []netip.AddrPort{netip.MustParseAddrPort("10.77.0.9:853")}}
	for i := range 5 {
		s.Servers = append(s.Servers,
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(i)}), 53))
	}
	h.apply(h.open("home"), s)
	if got := nameservers([]byte(h.content())); !slices.Equal(got, s.Servers[1:4]) {
		t.Errorf("servers %v, want %v", got, s.Servers[1:4])
	}
}

func TestInstanceNames(t *testing.T) {
	for row, name := range map[string]string{
		"empty": "", "slash": "a/b", "space": "a b", "line break": "a\n",
	} {
		t.Run(row, func(t *testing.T) {
			h := newHost(t)
			if _, err := Open(h.config(name)); err == nil {
				t.Errorf("%q: no error", name)
			}
		})
	}
}

// An original with any content survives in the file.
func TestOriginalSurvives(t *testing.T) {
	check := func(t interface{ Errorf(string, ...any) }, b []byte) {
		content := render("home", []byte(lines), append([]byte{}, b...))
		if got := originalIn(content); !bytes.Equal(got, b) || got == nil {
			t.Errorf("kept %q, got %q", b, got)
		}
		if owner, ok := ownerOf(content); !ok || owner != "home" {
			t.Errorf("owner %q", owner)
		}
		if got := nameservers(content); !slices.Equal(got, settings.Servers) {
			t.Errorf("servers %v", got)
		}
	}
	for _, s := range []string{"", "\n", original, "a\r\n", "\x00", originalHeader + "3\n#|abc\n",
		"#|\n\n",
		string(render("other", []byte(lines), []byte(original)))} {
		check(t, []byte(s))
	}
	rapid.Check(t, func(t *rapid.T) {
		check(t, []byte(rapid.StringMatching(`[ -~\n#|]*`).Draw(t, "original")))
	})
	for _, damaged := range []string{"9999999\n#|a\n", "-1\n", "x\n", ""} {
		if got := originalIn([]byte(marker + "home\n" + originalHeader + damaged)); got != nil {
			t.Errorf("%q: %q", damaged, got)
		}
	}
}

// Outside returns the servers that the kernel does not reach through the
// tunnel's interface, without the tunnel's own.
func TestOutside(t *testing.T) {
	inside, other := netip.MustParseAddrPort("127.0.0.9:53"),
		netip.MustParseAddrPort("127.0.0.1:53")
	for name, tc := range map[string]struct {
		iface   string
		applied bool
		want    []netip.AddrPort
	}{
		"not applied, other interface":    {"none", false, []netip.AddrPort{other}},
		"applied, other interface":        {"none", true, []netip.AddrPort{other}},
		"not applied, through the tunnel": {"lo", false, nil},
		"applied, through the tunnel":     {"lo", true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.write("nameserver 127.0.0.1\n")
			c := h.config("home")
			c.Interface = tc.iface
			if got := Servers(c); !slices.Equal(got, []netip.AddrPort{other}) {
				t.Errorf("servers of the host %v, want %v", got, other)
			}
			m, err := Open(c)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = m.Close() })
			if tc.applied {
				h.apply(m, Settings{Servers: []netip.AddrPort{inside}, Domains: []string{Root}})
			}
			if got := m.Outside(); !slices.Equal(got, tc.want) {
				t.Errorf("servers outside %v, want %v", got, tc.want)
			}
		})
	}
}
