package lab

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	Enter()
	if os.Getenv(helperVar) != "" {
		helper()
		return
	}
	goleak.VerifyTestMain(m)
}

// patience limits waits that usually take milliseconds.
const patience = 20 * time.Second

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func newLab(t *testing.T, opts ...Option) *Lab {
	t.Helper()
	l, err := New(t.Context(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func newTopology(t *testing.T, o TopologyOptions) *Topology {
	t.Helper()
	if o.Impair != nil {
		needTUN(t)
	}
	topo, err := NewTopology(newLab(t), o)
	if err != nil {
		t.Fatal(err)
	}
	return topo
}

func newHost(t *testing.T, l *Lab, name string) *Host {
	t.Helper()
	h, err := l.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func needTUN(t *testing.T) {
	t.Helper()
	if err := CheckTUN(); err != nil {
		t.Skip(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTopologyReaches(t *testing.T) {
	topo := newTopology(t, TopologyOptions{Clients: 2})
	ctx := testContext(t)
	for _, c := range topo.Clients {
		for _, to := range []netip.Addr{ProxyIPv4, ProxyIPv6} {
			if _, err := c.Ping(ctx, to); err != nil {
				t.Error(err)
			}
		}
	}
	for _, to := range []netip.Addr{TargetIPv4, TargetIPv6} {
		if _, err := topo.Proxy.Ping(ctx, to); err != nil {
			t.Error(err)
		}
		// The proxy does not forward, and the router has no route.
		a, err := topo.Client.Probe(ctx, Probe{To: to})
		if err != nil {
			t.Error(err)
		} else if a.Echo {
			t.Errorf("the client reaches %s without a tunnel", to)
		}
	}
}

func TestTraceroute(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	for to, want := range map[netip.Addr][]string{
		ProxyIPv4: {"198.51.100.1", "203.0.113.5"},
		ProxyIPv6: {"2001:db8:1::1", "2001:db8:2::5"},
	} {
		hops, err := topo.Client.Traceroute(testContext(t), to, 8, patience)
		must(t, err)
		var got []string
		for _, h := range hops {
			got = append(got, h.From.String())
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("to %s: got %v, want %v", to, got, want)
		}
	}
}

func TestProbeReportsICMPErrors(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	must(t, topo.Router.SetMTU("proxy", 1300))
	for _, tt := range []struct {
		to         netip.Addr
		typ, code  int
		routerAddr string
	}{
		{ProxyIPv4, 3, 4, "198.51.100.1"},
		{ProxyIPv6, 2, 0, "2001:db8:1::1"},
	} {
		a, err := topo.Client.Probe(testContext(t),
			Probe{To: tt.to, Size: 1400, DontFragment: true})
		must(t, err)
		a.RTT = 0
		want := Answer{From: netip.MustParseAddr(tt.routerAddr), Type: tt.typ, Code: tt.code,
			MTU: 1300}
		if a != want {
			t.Errorf("got %v, want %v", a, want)
		}
		a, err = topo.Client.Probe(testContext(t), Probe{To: tt.to, Size: 1300, DontFragment: true})
		must(t, err)
		if !a.Echo {
			t.Errorf("1300 bytes: got %v, want an echo", a)
		}
	}
}

func TestPingFails(t *testing.T) {
	l := newLab(t)
	h := newHost(t, l, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := h.Ping(ctx, netip.MustParseAddr("192.0.2.1"))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("got %v, want network unreachable", err)
	}
}

func TestBridge(t *testing.T) {
	l := newLab(t)
	var hosts []*Host
	var ends []End
	for _, s := range []string{"1", "2", "3"} {
		h := newHost(t, l, "h"+s)
		hosts = append(hosts, h)
		ends = append(ends, End{h, "eth0", Prefixes("192.0.2." + s + "/24")})
	}
	_, err := l.Bridge("switch", LinkOptions{}, ends...)
	must(t, err)
	for _, to := range []string{"192.0.2.2", "192.0.2.3"} {
		if _, err := hosts[0].Ping(testContext(t), netip.MustParseAddr(to)); err != nil {
			t.Error(err)
		}
	}
}

func TestLinkRate(t *testing.T) {
	l := newLab(t)
	a, b := newHost(t, l, "a"), newHost(t, l, "b")
	must(t, l.Connect(End{a, "eth0", Prefixes("192.0.2.1/24")},
		End{b, "eth0", Prefixes("192.0.2.2/24")},
		LinkOptions{MTU: 1400, Rate: 50_000_000}))
	if _, err := a.Ping(testContext(t), netip.MustParseAddr("192.0.2.2")); err != nil {
		t.Error(err)
	}
	link, err := b.nl.LinkByName("eth0")
	must(t, err)
	qdiscs, err := b.nl.QdiscList(link)
	must(t, err)
	if link.Attrs().MTU != 1400 || len(qdiscs) != 1 || qdiscs[0].Type() != "tbf" {
		t.Errorf("got MTU %d and %v, want 1400 and tbf", link.Attrs().MTU, qdiscs)
	}
}

func TestHostFiles(t *testing.T) {
	before, err := os.ReadFile("/etc/hosts")
	must(t, err)
	l := newLab(t)
	a, b := newHost(t, l, "a"), newHost(t, l, "b")
	must(t, a.Resolve("proxy.example", ProxyIPv4))

	out, err := a.Command(testContext(t), "getent", "hosts", "proxy.example").Output()
	must(t, err)
	if !strings.HasPrefix(string(out), ProxyIPv4.String()) {
		t.Errorf("a resolves proxy.example to %q", out)
	}
	if out, err := b.Command(testContext(t), "getent", "hosts",
		"proxy.example").Output(); err == nil {
		t.Errorf("b resolves proxy.example to %q", out)
	}
	must(t, a.Do(func() error {
		return errors.Join(
			os.WriteFile("/run/x", nil, 0o600), os.WriteFile("/var/lib/x", nil, 0o600),
			os.WriteFile("/etc/resolv.conf", []byte("nameserver 192.0.2.53\n"), 0o600))
	}))
	must(t, b.Do(func() error {
		for _, f := range []string{"/run/x", "/var/lib/x"} {
			if _, err := os.Stat(f); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("b sees %s of a: %v", f, err)
			}
		}
		return nil
	}))
	after, err := os.ReadFile("/etc/hosts")
	must(t, err)
	if string(after) != string(before) {
		t.Errorf("the machine's /etc/hosts changed to %q", after)
	}
}

func TestCommandLogAndFailure(t *testing.T) {
	dir := t.TempDir()
	l := newLab(t, WithArtifacts(dir))
	h := newHost(t, l, "a")
	c := h.Command(testContext(t), "sh", "-c", "hostname; echo oops >&2; exit 3")
	err := c.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || c.ExitCode() != 3 {
		t.Errorf("got %v and %d, want exit code 3", err, c.ExitCode())
	}
	if want := filepath.Join(dir, "a-1-sh.log"); c.LogFile() != want {
		t.Errorf("log file %s, want %s", c.LogFile(), want)
	}
	log, err := c.Log()
	must(t, err)
	if log != "a\noops\n" {
		t.Errorf("log: %q", log)
	}
	if err := h.Command(testContext(t), "/does/not/exist").Run(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
	must(t, l.Close())
	files, err := os.ReadDir(dir)
	must(t, err)
	if len(files) != 1 {
		t.Errorf("artifacts: %v, want only the log with output", files)
	}
}

func TestCommandStop(t *testing.T) {
	h := newHost(t, newLab(t), "a")
	c := h.Command(t.Context(), "sh", "-c",
		"trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done")
	r, w := io.Pipe()
	defer r.Close()
	c.Stdout = w
	must(t, c.Start())
	if _, err := io.ReadFull(r, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, r)
	if err := c.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestCommandEndsWithContext(t *testing.T) {
	h := newHost(t, newLab(t), "a")
	ctx, cancel := context.WithCancel(t.Context())
	c := h.Command(ctx, "sleep", "1000")
	must(t, c.Start())
	cancel()
	if err := c.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestListenAndDial(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	ln, err := topo.Proxy.Listen("tcp", ":80")
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "hello "+r.RemoteAddr)
	})}
	go server.Serve(ln)
	defer server.Close()

	transport := &http.Transport{DialContext: topo.Client.DialContext, DisableKeepAlives: true}
	for url, want := range map[string]string{
		"http://203.0.113.5/":      "hello 198.51.100.2:",
		"http://[2001:db8:2::5]/x": "hello [2001:db8:1::2]:",
	} {
		t.Run(url, func(t *testing.T) {
			resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get(url)
			must(t, err)
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			must(t, err)
			if !strings.HasPrefix(string(body), want) {
				t.Errorf("got %q, want %q", body, want)
			}
		})
	}
	if _, err := topo.Client.DialContext(t.Context(), "tcp", "localhost:80"); err == nil {
		t.Error("a name was dialled")
	}
}

func TestDoSurvivesGoexit(t *testing.T) {
	h := newHost(t, newLab(t), "a")
	done := make(chan error, 1)
	go func() {
		done <- h.Do(func() error {
			runtime.Goexit() // as t.Fatal does
			return nil
		})
	}()
	if err := <-done; !errors.Is(err, errGoexit) {
		t.Errorf("got %v, want %v", err, errGoexit)
	}
}

func TestSysctlAndMTU(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	must(t, topo.Client.Sysctl("net.ipv4.ip_forward", "1"))
	must(t, topo.Client.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
		if string(b) != "1\n" {
			t.Errorf("ip_forward is %q", b)
		}
		return err
	}))
	if err := topo.Client.Sysctl("net.ipv4.no_such_key", "1"); err == nil {
		t.Error("Sysctl of a missing parameter succeeded")
	}
	if err := topo.Client.SetMTU("eth7", 1400); err == nil {
		t.Error("SetMTU on a missing interface succeeded")
	}
}

func TestNames(t *testing.T) {
	l := newLab(t)
	newHost(t, l, "a")
	for row, name := range map[string]string{
		"taken": "a", "empty": "", "slash": "a/b", "reserved": "artifacts",
	} {
		t.Run(row, func(t *testing.T) {
			if _, err := l.Host(name); err == nil {
				t.Errorf("host %q was made", name)
			}
		})
	}
	l.Close()
	if _, err := l.Host("b"); err == nil {
		t.Error("a host was made in a closed lab")
	}
}

func TestNameNamespaces(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	must(t, topo.Client.NameNamespaces())
	out, err := topo.Client.Command(testContext(t), "ip", "netns", "exec", "proxy", "ip", "-4",
		"-br", "addr", "show", "eth1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "192.0.2.1/24") {
		t.Errorf("got %q, %v", out, err)
	}
}
