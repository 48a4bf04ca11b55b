package hostdns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// busConfig configures a private dbus-daemon.
const busConfig = `<busconfig>
<type>custom</type><listen>unix:path=%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>
</busconfig>`

// fakeResolved is a systemd-resolved that records its calls.
type fakeResolved struct {
	mu    sync.Mutex
	calls []string
	old   bool     // lacks methods of later versions
	deny  string   // name of a method to refuse
	own   []server // servers set by calls
}

// restart makes f forget its servers.
func (f *fakeResolved) restart() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.own = nil
}

func (f *fakeResolved) note(method, format string, args ...any) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.deny == method {
		return dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"not you"})
	}
	if f.old && (method == "SetLinkDefaultRoute" || method == "FlushCaches") {
		return dbus.NewError("org.freedesktop.DBus.Error.UnknownMethod", []any{"what?"})
	}
	f.calls = append(f.calls, strings.TrimSpace(fmt.Sprintf(method+" "+format, args...)))
	return nil
}

func (f *fakeResolved) SetLinkDNS(link int32, servers []linkServer) *dbus.Error {
	if err := f.note("SetLinkDNS", "%d %v", link, servers); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.own = nil
	for _, s := range servers {
		f.own = append(f.own, server{link, s.Family, s.Address})
	}
	return nil
}

func (f *fakeResolved) SetLinkDNSEx(link int32, servers []linkServerPort) *dbus.Error {
	return f.note("SetLinkDNSEx", "%d %v", link, servers)
}

func (f *fakeResolved) SetLinkDomains(link int32, domains []linkDomain) *dbus.Error {
	return f.note("SetLinkDomains", "%d %v", link, domains)
}

func (f *fakeResolved) SetLinkDefaultRoute(link int32, on bool) *dbus.Error {
	return f.note("SetLinkDefaultRoute", "%d %v", link, on)
}

func (f *fakeResolved) SetLinkDNSOverTLS(link int32, mode string) *dbus.Error {
	return f.note("SetLinkDNSOverTLS", "%d %s", link, mode)
}

func (f *fakeResolved) RevertLink(link int32) *dbus.Error {
	return f.note("RevertLink", "%d", link)
}

func (f *fakeResolved) FlushCaches() *dbus.Error { return f.note("FlushCaches", "") }

// change sets the version and the refused method.
func (f *fakeResolved) change(old bool, deny string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.old, f.deny = old, deny
}

// take returns the calls since the last take.
func (f *fakeResolved) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// properties answers with the servers of all interfaces.
type properties struct {
	f       *fakeResolved
	servers []server // servers of other interfaces
}

func (p properties) Get(_, name string) (dbus.Variant, *dbus.Error) {
	if name != "DNS" {
		return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", nil)
	}
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	return dbus.MakeVariant(slices.Concat(p.servers, p.f.own)), nil
}

// startBus starts a D-Bus daemon and returns its address. A non-nil f is its
// systemd-resolved.
func startBus(t *testing.T, f *fakeResolved, servers ...server) string {
	t.Helper()
	dir := t.TempDir()
	socket, config := dir+"/bus", dir+"/bus.conf"
	if err := os.WriteFile(config, []byte(fmt.Sprintf(busConfig, socket)), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("dbus-daemon", "--nofork", "--config-file="+config, "--print-address=1")
	daemon.Stderr = t.Output()
	out, err := daemon.StdoutPipe()
	if err == nil {
		err = daemon.Start()
	}
	if err != nil {
		t.Fatalf("%v; `make tools` installs it", err)
	}
	t.Cleanup(func() {
		_ = daemon.Process.Kill()
		_ = daemon.Wait()
	})
	if _, err := out.Read(make([]byte, 256)); err != nil { // the daemon listens now
		t.Fatal(err)
	}
	address := "unix:path=" + socket
	if f == nil {
		return address
	}
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	err = errors.Join(conn.Export(f, resolvePath, resolveName+".Manager"),
		conn.Export(properties{f, servers}, resolvePath, "org.freedesktop.DBus.Properties"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName(resolveName, dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	return address
}

const stub = "# systemd\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n"

func wantCalls(t *testing.T, f *fakeResolved, want ...string) {
	t.Helper()
	if got := f.take(); !slices.Equal(got, want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// lo returns the index of the loopback interface, which stands for the
// tunnel's.
func lo(t *testing.T) int {
	t.Helper()
	link, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	return link.Index
}

func TestResolved(t *testing.T) {
	h := newHost(t)
	h.write(stub)
	before := h.state()
	f := &fakeResolved{}
	n := lo(t)
	cfg := h.config("home")
	cfg.Bus = startBus(t, f,
		server{int32(n), unix.AF_INET, []byte{10, 77, 0, 1}},
		server{int32(n) + 1, unix.AF_INET, []byte{192, 0, 2, 53}},
		// systemd-resolved reads these from resolv.conf.
		server{0, unix.AF_INET, []byte{10, 77, 0, 1}},
		server{0, unix.AF_INET6, netip.MustParseAddr("2001:db8::53").AsSlice()},
		server{int32(n) + 1, unix.AF_INET6, netip.MustParseAddr("fe80::1").AsSlice()})
	if via, splits := Detect(cfg); via != "systemd-resolved" || !splits {
		t.Errorf("detected %q, %v", via, splits)
	}
	m, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if servers, ok := m.Upstream(); ok {
		t.Errorf("before Apply: upstream servers %v", servers)
	}
	wantCalls(t, f)

	apply := func(s Settings) {
		t.Helper()
		if via, err := m.Apply(s); via != "systemd-resolved" || err != nil {
			t.Fatalf("%q, %v", via, err)
		}
	}
	apply(settings)
	link := fmt.Sprint(n)
	servers := fmt.Sprintf("SetLinkDNS %d [{2 [10 77 0 1]} {10 %v}]", n,
		netip.MustParseAddr("fd77::1").AsSlice())
	wantCalls(t, f, "SetLinkDomains "+link+" [{corp.example false} {example false} {. true}]",
		"SetLinkDefaultRoute "+link+" true", "SetLinkDNSOverTLS "+link+" no", servers,
		"FlushCaches")
	apply(settings)
	wantCalls(t, f)
	want := slices.Clone(hostServers)
	zoned := netip.MustParseAddr("fe80::1").WithZone(fmt.Sprint(n + 1))
	want = append(want, netip.AddrPortFrom(zoned, 53))
	if servers, ok := m.Upstream(); !ok || !slices.Equal(servers, want) {
		t.Errorf("upstream servers: %v, %v", servers, ok)
	}

	// Split DNS: only names of the tunnel.
	split := settings
	split.Domains = []string{"corp.example", "internal.example"}
	apply(split)
	wantCalls(t, f, "SetLinkDomains "+link+
		" [{corp.example false} {example false} {internal.example true}]",
		"SetLinkDefaultRoute "+link+" false", "SetLinkDNSOverTLS "+link+" no", servers,
		"FlushCaches")

	// Another port and an older version.
	f.change(true, "")
	split.Servers = []netip.AddrPort{netip.MustParseAddrPort("10.77.0.1:5353")}
	apply(split)
	wantCalls(t, f, "SetLinkDomains "+link+
		" [{corp.example false} {example false} {internal.example true}]",
		"SetLinkDNSOverTLS "+link+" no", "SetLinkDNSEx "+link+" [{2 [10 77 0 1] 5353 }]")

	// A refusal leaves no settings.
	f.change(true, "SetLinkDNS")
	if _, err := m.Apply(settings); !errors.Is(err, os.ErrPermission) ||
		!strings.Contains(err.Error(), "SetLinkDNS") {
		t.Errorf("refused: %v", err)
	}
	if got := f.take(); len(got) == 0 || got[len(got)-1] != "RevertLink "+link {
		t.Errorf("after the refusal: %v", got)
	}
	f.change(true, "")
	apply(settings)
	f.take()
	h.close(m)
	wantCalls(t, f, "RevertLink "+link)
	h.unchanged(before)
}

// When resolv.conf does not name systemd-resolved, both are configured.
func TestResolvedAndFile(t *testing.T) {
	h := newHost(t)
	h.write(original)
	before := h.state()
	f := &fakeResolved{}
	cfg := h.config("home")
	cfg.Bus = startBus(t, f)
	m, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if via, err := m.Apply(settings); via != "systemd-resolved and "+h.path || err != nil {
		t.Errorf("%q, %v", via, err)
	}
	h.ours("home")
	if len(f.take()) == 0 {
		t.Error("systemd-resolved received no calls")
	}
	split := settings
	split.Domains = []string{"corp.example"}
	if _, err := m.Apply(split); !errors.Is(err, ErrSplit) {
		t.Errorf("split: %v", err)
	}
	h.unchanged(before)
	h.close(m)
	wantCalls(t, f, fmt.Sprint("RevertLink ", lo(t)), "FlushCaches")
}

// A bus without systemd-resolved does not count.
func TestBusWithoutResolved(t *testing.T) {
	h := newHost(t)
	h.write(original)
	cfg := h.config("home")
	cfg.Bus = startBus(t, nil)
	if via, _ := Detect(cfg); via != h.path {
		t.Errorf("without systemd-resolved: %q", via)
	}
}
