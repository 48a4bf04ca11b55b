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
	lab.Enter() // for mounts
	os.Exit(m.Run())
}

// original is a resolv.conf with what others would not keep: no final line
// break, and odd lines.
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

// host is the files of a host that has neither systemd-resolved nor openresolv.
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
		h.Fatalf("applied by way of %q, %v", via, err)
	}
}

func (h *host) close(m *Manager) {
	h.Helper()
	if err := m.Close(); err != nil {
		h.Fatal(err)
	}
}

// kill leaves m as a process that is killed does.
func kill(m *Manager) {
	m.file.watch.close()
	m.file.watch = nil
	m.ways = nil
}

// state describes the folder: each file with its inode, mode, owner and
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

// ours checks that the resolver asks the servers of instance.
func (h *host) ours(instance string) {
	h.Helper()
	if got := h.content(); !strings.HasPrefix(got, marker+instance+"\n"+notice) ||
		!strings.Contains(got, "\n"+lines) {
		h.Errorf("not of the tunnel %s:\n%s", instance, got)
	}
}

func (h *host) unchanged(before string) {
	h.Helper()
	if after := h.state(); after != before {
		h.Errorf("before\n%safter\n%s", before, after)
	}
}

func (h *host) eventually(what string, ok func() bool) {
	h.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.Fatalf("%s: not so\n%s", what, h.state())
		}
	}
}

// kinds are what resolv.conf can be.
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
	{"mounted file in a folder that cannot be written", func(h *host) {
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

// mount has resolv.conf be a mount of another file, as `ip netns exec` and
// containers do.
func (h *host) mount(content string) {
	h.Helper()
	h.write("nameserver 192.0.2.99\n") // beneath the mount
	other := filepath.Join(h.TempDir(), "resolv.conf")
	if err := os.WriteFile(other, []byte(content), 0o604); err != nil {
		h.Fatal(err)
	}
	if err := unix.Mount(other, h.path, "", unix.MS_BIND, ""); err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { _ = unix.Unmount(h.path, unix.MNT_DETACH) })
}

// withoutTimes is a state in which a file that was written in place has the
// time of it.
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

// A file that a process which was killed left behind, and that somebody put
// right since, stays.
func TestMendedAfterKill(t *testing.T) {
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

// A process that is killed between keeping the original and putting its own
// there has changed nothing.
func TestKilledBetween(t *testing.T) {
	h := newHost(t)
	h.write(original)
	before := h.state()
	if err := os.Link(h.path, h.path+".masque-home"); err != nil {
		t.Fatal(err)
	}
	h.open("home")
	h.unchanged(before)
}

// What another program writes counts: it is there at the end. Meanwhile the
// tunnel's servers come back.
func TestAnotherProgram(t *testing.T) {
	const theirs = "nameserver 192.0.2.77\n"
	for _, kind := range kinds {
		for _, how := range []string{"replaces", "writes", "removes"} {
			mounted := strings.HasPrefix(kind.name, "mounted")
			if mounted && how != "writes" || kind.name == "dangling link" && how == "writes" {
				continue // not possible
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
					t.Errorf("beside the tunnel's: %v, %v", servers, ok)
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

// What another program wrote just before the end stays, although the tunnel has
// not noticed yet.
func TestAnotherProgramAtTheEnd(t *testing.T) {
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

// Who edits our file has it put right: it says so at its top. The original is
// still the original.
func TestEdited(t *testing.T) {
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

// Two programs that both want the file do not keep each other busy.
func TestPutBackAtARate(t *testing.T) {
	h := newHost(t)
	h.write(original)
	m := h.open("home")
	h.apply(m, settings)
	puts := 0
	for range putBackBurst + 3 {
		if err := replace(h.path, []byte("nameserver 192.0.2.77\n")); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * settleDelay); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if strings.Contains(h.content(), lines) {
				puts++
				break
			}
		}
	}
	if puts > putBackBurst+1 {
		t.Errorf("put back %d times in a row", puts)
	}
	h.close(m)
	if got := h.content(); got != "nameserver 192.0.2.77\n" {
		t.Errorf("now\n%s", got)
	}
}

// Tunnels stack, the last one's servers are asked, and whoever ends first, the
// host's file is there at the end.
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
				t.Errorf("the last one's servers are not asked:\n%s", got)
			}
			for _, m := range []*Manager{one, two} {
				if servers, ok := m.Upstream(); !ok || !slices.Equal(servers, hostServers) {
					t.Errorf("beside the tunnels': %v, %v", servers, ok)
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

// A file that is written in place holds one tunnel.
func TestTwoTunnelsInPlace(t *testing.T) {
	h := newHost(t)
	h.mount(original)
	one, two := h.open("one"), h.open("two")
	h.apply(one, settings)
	if _, err := two.Apply(settings); err == nil ||
		!strings.Contains(err.Error(), "the tunnel one has "+h.path) {
		t.Errorf("the second one: %v", err)
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
	for _, s := range []Settings{
		{Servers: server, Domains: []string{"corp.example"}}, // cannot split
		{Servers: server},
		// no other ports
		{Servers: []netip.AddrPort{netip.MustParseAddrPort("10.77.0.1:5353")},
			Domains: []string{Root}},
		{Servers: []netip.AddrPort{netip.MustParseAddrPort("[fe80::1%lo]:53")},
			Domains: []string{Root}},
		{Servers: []netip.AddrPort{{}}, Domains: []string{Root}},
		{Servers: server, Domains: []string{Root}, Search: []string{"a\nnameserver 192.0.2.1"}},
		{Servers: server, Domains: []string{Root}, Search: []string{"a b"}},
		{Servers: server, Domains: []string{Root}, Search: []string{"-m"}},
		{Servers: server, Domains: []string{Root}, Search: []string{""}},
		{Servers: server, Domains: []string{Root}, Search: []string{Root}},
		{Servers: server, Domains: []string{Root}, Search: []string{strings.Repeat("a", 64)}},
		{Servers: server, Domains: []string{Root, "a..b"}},
	} {
		h := newHost(t)
		h.write(original)
		before := h.state()
		m := h.open("home")
		if via, err := m.Apply(s); err == nil {
			t.Errorf("%+v: applied by way of %s", s, via)
		}
		h.unchanged(before)
		// The resolver is not left with what is no more.
		h.apply(m, settings)
		if _, err := m.Apply(s); err == nil {
			t.Errorf("%+v: applied", s)
		}
		h.unchanged(before)
	}
}

// No more servers than are asked.
func TestManyServers(t *testing.T) {
	h := newHost(t)
	s := Settings{Domains: []string{Root},
		Servers: []netip.AddrPort{netip.MustParseAddrPort("10.77.0.9:853")}}
	for i := range 5 {
		s.Servers = append(s.Servers,
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(i)}), 53))
	}
	h.apply(h.open("home"), s)
	if got := nameservers([]byte(h.content())); !slices.Equal(got, s.Servers[1:4]) {
		t.Errorf("asked: %v", got)
	}
}

func TestInstanceNames(t *testing.T) {
	for _, name := range []string{"", "a/b", "a b", "a\n"} {
		h := newHost(t)
		if _, err := Open(h.config(name)); err == nil {
			t.Errorf("%q: no error", name)
		}
	}
}

// What is kept in a file comes out as it was, whatever it is.
func TestOriginalIsKept(t *testing.T) {
	check := func(t interface{ Errorf(string, ...any) }, b []byte) {
		content := whole("home", []byte(lines), append([]byte{}, b...))
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
	for _, s := range []string{"", "\n", original, "a\r\n", "\x00", kept + "3\n#|abc\n", "#|\n\n",
		string(whole("other", []byte(lines), []byte(original)))} {
		check(t, []byte(s))
	}
	rapid.Check(t, func(t *rapid.T) {
		check(t, []byte(rapid.StringMatching(`[ -~\n#|]*`).Draw(t, "original")))
	})
	for _, cut := range []string{"9999999\n#|a\n", "-1\n", "x\n", ""} { // by others
		if got := originalIn([]byte(marker + "home\n" + kept + cut)); got != nil {
			t.Errorf("%q: %q", cut, got)
		}
	}
}

// Servers that the kernel does not send to by the tunnel's interface are
// outside, and those of a tunnel are not among them.
func TestOutside(t *testing.T) {
	inside, other := netip.MustParseAddrPort("127.0.0.9:53"),
		netip.MustParseAddrPort("127.0.0.1:53")
	for name, tc := range map[string]struct {
		iface   string
		applied bool
		want    []netip.AddrPort
	}{
		"nothing is applied":        {"none", false, []netip.AddrPort{other}},
		"the tunnel's are applied":  {"none", true, []netip.AddrPort{other}},
		"the tunnel leads there":    {"lo", false, nil},
		"it does, and some applied": {"lo", true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.write("nameserver 127.0.0.1\n")
			c := h.config("home")
			c.Interface = tc.iface
			if got := Servers(c); !slices.Equal(got, []netip.AddrPort{other}) {
				t.Errorf("the host asks %v, want %v", got, other)
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
				t.Errorf("outside are %v, want %v", got, tc.want)
			}
		})
	}
}
