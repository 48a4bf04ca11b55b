package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"masquevpn/client"
	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// dropVar makes the test binary a program that runs its arguments without
// CAP_NET_ADMIN.
const dropVar = "MASQUE_TEST_DROP"

// bin holds the programs under test.
var bin string

func TestMain(m *testing.M) {
	if os.Getenv(dropVar) != "" {
		fmt.Fprintln(os.Stderr, withoutNetAdmin(os.Args[1:]))
		os.Exit(99)
	}
	lab.Enter()
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	var err error
	if bin, err = os.MkdirTemp("", "masque-bin-"); err == nil {
		defer os.RemoveAll(bin)
		var out []byte
		if out, err = exec.Command("go", "build", "-o", bin, "masquevpn/cmd/masque-client",
			"masquevpn/cmd/masque-proxy").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "building the programs:", err)
		return 1
	}
	return m.Run()
}

// withoutNetAdmin becomes the program in args. It only returns on failure.
func withoutNetAdmin(args []string) error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0); err != nil {
		return err
	}
	return unix.Exec(args[0], args, slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, dropVar)
	}))
}

// patience limits waits for events that take milliseconds to seconds.
const patience = 60 * time.Second

// vpn is a proxy with a client host, and an installation for both.
type vpn struct {
	*testing.T
	*lab.Topology
	ctx                context.Context
	dir                string // folder of the installation
	config             string // proxy.toml
	clientRun, proxRun string // run directories
	proxy              *lab.Cmd
}

func newVPN(t *testing.T) *vpn {
	t.Helper()
	if err := lab.CheckTUN(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	t.Cleanup(cancel)
	l, err := lab.New(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	topology, err := lab.NewTopology(l, lab.TopologyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	v := &vpn{
		T: t, Topology: topology, ctx: ctx, dir: filepath.Join(dir, "etc"),
		clientRun: filepath.Join(dir, "client-run"), proxRun: filepath.Join(dir, "proxy-run"),
	}
	v.config = filepath.Join(v.dir, "proxy.toml")
	v.proxyDo(0, "init", "--name", lab.ProxyName, v.dir)
	return v
}

// result is the result of a command.
type result struct {
	code        int
	out, errOut string
	last        string // line of standard error
}

// do runs a program in a host and checks its exit code.
func (v *vpn) do(h *lab.Host, want int, name string, args ...string) result {
	v.Helper()
	c := h.Command(v.ctx, filepath.Join(bin, name), args...)
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	runErr := c.Run()
	r := result{code: c.ExitCode(), out: out.String(), errOut: errOut.String()}
	lines := strings.Split(strings.TrimSpace(r.errOut), "\n")
	r.last = lines[len(lines)-1]
	if r.code != want {
		v.Fatalf("%s %s: exit code %d (%v), want %d\n%s%s", name, strings.Join(args, " "), r.code,
			runErr, want, r.out, r.errOut)
	}
	if want != 0 && !strings.HasPrefix(r.last, name+": ") {
		v.Errorf("%s %s: the last line on standard error is %q", name,
			strings.Join(args, " "), r.last)
	}
	return r
}

func (v *vpn) clientDo(want int, args ...string) result {
	v.Helper()
	return v.do(v.Client, want, "masque-client",
		append(args, "--run-dir", v.clientRun, "--config-dir", v.dir)...)
}

func (v *vpn) proxyDo(want int, args ...string) result {
	v.Helper()
	return v.do(v.Proxy, want, "masque-proxy", append(args, "--run-dir", v.proxRun)...)
}

// startProxy runs the proxy until the test ends.
func (v *vpn) startProxy() {
	v.Helper()
	v.proxy = v.Proxy.Command(v.ctx, filepath.Join(bin, "masque-proxy"), "run", "-c", v.config,
		"--run-dir", v.proxRun)
	if err := v.proxy.Start(); err != nil {
		v.Fatal(err)
	}
	v.until("the proxy answers", func() bool {
		select {
		case <-v.proxy.Done():
			v.Fatalf("the proxy ended:\n%s", v.proxyLog())
		default:
		}
		c := v.Proxy.Command(v.ctx, filepath.Join(bin, "masque-proxy"), "status", "--run-dir",
			v.proxRun)
		return c.Run() == nil
	})
}

func (v *vpn) stopProxy() {
	v.Helper()
	if err := v.proxy.Stop(v.ctx); err != nil {
		v.Fatalf("stopping the proxy: %v\n%s", err, v.proxyLog())
	}
}

func (v *vpn) proxyLog() string {
	log, err := v.proxy.Log()
	if err != nil {
		return err.Error()
	}
	return log
}

// invite makes the file of a user in the installation.
func (v *vpn) invite(name string) {
	v.Helper()
	v.proxyDo(0, "invite", name, "-c", v.config, "-o", filepath.Join(v.dir, name+".toml"))
}

func (v *vpn) until(what string, ok func() bool) {
	v.Helper()
	deadline, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	for !ok() {
		select {
		case <-deadline.Done():
			v.Fatalf("%s: not in time", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (v *vpn) status(name string) client.Status {
	v.Helper()
	var s client.Status
	if err := json.Unmarshal([]byte(v.clientDo(0, "status", name, "--json").out), &s); err != nil {
		v.Fatal(err)
	}
	return s
}

func (v *vpn) snapshot(h *lab.Host) string {
	v.Helper()
	s, err := h.Snapshot()
	if err != nil {
		v.Fatal(err)
	}
	return s
}

// sameAs checks that a host is in the same state as before.
func (v *vpn) sameAs(h *lab.Host, before string) {
	v.Helper()
	if diff := lab.Diff(before, v.snapshot(h)); diff != "" {
		v.Errorf("the host %s has changed:\n%s", h.Name(), diff)
	}
}

// leftInRunDir lists the client's run directory without the files that remain:
// logs, and the lock of the host's network that all tunnels share.
func (v *vpn) leftInRunDir() []string {
	v.Helper()
	entries, err := os.ReadDir(v.clientRun)
	if err != nil {
		v.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".log") && e.Name() != ".routing.lock" {
			names = append(names, e.Name())
		}
	}
	return names
}

var targetIPv4 = netip.MustParseAddr("192.0.2.2")

func TestUpAndDown(t *testing.T) {
	v := newVPN(t)
	clientBefore, proxyBefore := v.snapshot(v.Client), v.snapshot(v.Proxy)
	v.startProxy()
	v.invite("alice")

	v.clientDo(0, "up", "alice", "--wait")
	if s := v.status("alice"); s.State != client.StateConnected || s.Name != "alice" ||
		len(s.Addresses) != 2 {
		t.Errorf("status %+v", s)
	}
	if _, err := v.Client.Ping(v.ctx, targetIPv4); err != nil {
		t.Errorf("through the tunnel: %v", err)
	}
	if info, err := os.Stat(filepath.Join(v.clientRun, "alice.log")); err != nil ||
		info.Mode().Perm() != 0o600 || info.Size() == 0 {
		t.Errorf("log: %v, %v", info, err)
	}
	if r := v.clientDo(1, "up", "alice"); !strings.Contains(r.last, "already running") {
		t.Errorf("a second up: %s", r.last)
	}
	if r := v.clientDo(1, "run", "-c",
		filepath.Join(v.dir, "alice.toml")); !strings.Contains(r.last, "already running") {
		t.Errorf("a second run: %s", r.last)
	}
	for _, args := range [][]string{{"status"}, {"status", "alice"},
		{"wait", "alice", "--for", "connected"}} {
		v.clientDo(0, args...)
	}
	if out := v.clientDo(0, "check", "-c",
		filepath.Join(v.dir, "alice.toml")).out; !strings.Contains(out,
		"ok    proxy: "+lab.ProxyName+
			":443 is [2001:db8:2::5 203.0.113.5], found by the addresses of the name; it has to prove "+
			lab.ProxyName+"\n") {
		t.Errorf("check printed\n%s", out)
	}
	if r := v.clientDo(5, "wait", "alice", "--for", "disconnected", "--timeout",
		"1s"); !strings.Contains(r.last, "not disconnected in time") {
		t.Errorf("waiting in vain: %s", r.last)
	}

	var sessions []struct{ ID, User, State string }
	if err := json.Unmarshal([]byte(v.proxyDo(0, "sessions", "--json").out),
		&sessions); err != nil || len(sessions) != 1 || sessions[0].User != "alice" {
		t.Fatalf("sessions %+v, %v", sessions, err)
	}
	if out := v.proxyDo(0, "sessions").out; !strings.Contains(out, "alice") {
		t.Errorf("sessions:\n%s", out)
	}
	v.proxyDo(3, "kick", "no-such-session")

	v.clientDo(0, "down", "alice")
	v.sameAs(v.Client, clientBefore)
	if left := v.leftInRunDir(); len(left) > 0 {
		t.Errorf("left in the run directory: %v", left)
	}
	if r := v.clientDo(3, "down", "alice"); !strings.Contains(r.last, "not running") {
		t.Errorf("a second down: %s", r.last)
	}
	v.clientDo(3, "status")
	v.clientDo(3, "status", "alice", "--json")
	v.clientDo(0, "wait", "alice", "--for", "disconnected")
	v.clientDo(3, "wait", "alice", "--for", "connected", "--timeout", "50ms")

	v.stopProxy()
	v.sameAs(v.Proxy, proxyBefore)
	v.proxyDo(3, "status")
}

func TestKickedClientComesBack(t *testing.T) {
	v := newVPN(t)
	v.startProxy()
	v.invite("alice")
	v.clientDo(0, "up", "alice", "--wait")
	var sessions []struct{ ID string }
	if err := json.Unmarshal([]byte(v.proxyDo(0, "sessions", "--json").out),
		&sessions); err != nil || len(sessions) != 1 {
		t.Fatalf("sessions %+v, %v", sessions, err)
	}
	v.proxyDo(0, "kick", sessions[0].ID)
	v.until("the client comes back", func() bool {
		var now []struct{ ID string }
		err := json.Unmarshal([]byte(v.proxyDo(0, "sessions", "--json").out), &now)
		return err == nil && len(now) == 1 && now[0].ID != sessions[0].ID
	})
	v.clientDo(0, "wait", "alice", "--for", "connected")
	v.clientDo(0, "down", "alice")
}

func TestRemovedUser(t *testing.T) {
	v := newVPN(t)
	before := v.snapshot(v.Client)
	v.startProxy()
	v.invite("alice")
	v.invite("bob")
	v.proxyDo(0, "user", "remove", "bob", "-c", v.config)
	if r := v.clientDo(4, "up", "bob", "--wait"); r.last == "" {
		t.Error("no reason is given")
	}
	v.sameAs(v.Client, before)

	v.clientDo(0, "up", "alice", "--wait")
	v.proxyDo(0, "user", "remove", "alice", "-c", v.config)
	v.clientDo(0, "wait", "alice", "--for", "disconnected", "--timeout", patience.String())
	v.until("the tunnel has ended", func() bool { return len(v.leftInRunDir()) == 0 })
	v.sameAs(v.Client, before)

	// The old file stays useless after a second invitation of the same name.
	v.proxyDo(0, "invite", "alice", "-c", v.config, "-o", filepath.Join(v.dir, "again.toml"))
	v.clientDo(4, "up", "alice", "--wait")
	v.clientDo(0, "up", "again", "--wait")
	v.clientDo(0, "down", "again")
}

func TestUnreachable(t *testing.T) {
	v := newVPN(t)
	v.invite("alice")
	before := v.snapshot(v.Client)
	r := v.clientDo(5, "up", "alice", "--wait", "--timeout", "1s")
	if !strings.Contains(r.last, "taken down again") {
		t.Errorf("the last line is %s", r.last)
	}
	v.sameAs(v.Client, before)
	if left := v.leftInRunDir(); len(left) > 0 {
		t.Errorf("left in the run directory: %v", left)
	}

	// Without --wait, the tunnel keeps trying and connects when the proxy
	// starts.
	v.clientDo(0, "up", "alice")
	v.clientDo(3, "status", "alice")
	v.clientDo(5, "wait", "alice", "--for", "connected", "--timeout", "1s")
	v.startProxy()
	v.clientDo(0, "wait", "alice", "--for", "connected", "--timeout", patience.String())
	v.clientDo(0, "down", "alice")
	v.sameAs(v.Client, before)
}

func TestWrongIdentity(t *testing.T) {
	v := newVPN(t)
	v.startProxy()
	v.invite("alice")
	other := filepath.Join(t.TempDir(), "other")
	v.proxyDo(0, "init", "--name", lab.ProxyName, other)
	file := filepath.Join(other, "mallory.toml")
	v.proxyDo(0, "invite", "mallory", "-c", filepath.Join(other, "proxy.toml"), "-o", file)
	v.clientDo(6, "up", file, "--wait")
	v.clientDo(6, "run", "-c", file)
}

func TestKilledClient(t *testing.T) {
	v := newVPN(t)
	before := v.snapshot(v.Client)
	v.startProxy()
	v.invite("alice")
	v.clientDo(0, "up", "alice", "--wait")
	pid := v.lockHolder("alice")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	v.clientDo(0, "wait", "alice", "--for", "disconnected")
	v.clientDo(3, "status", "alice")
	v.clientDo(0, "up", "alice", "--wait")
	v.clientDo(0, "down", "alice")
	v.sameAs(v.Client, before)
}

// lockHolder finds the process of a tunnel by its command line.
func (v *vpn) lockHolder(name string) int {
	v.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		v.Fatal(err)
	}
	for _, p := range processes {
		line, err := os.ReadFile(p)
		if err == nil && strings.HasPrefix(string(line), "masque-client\x00run\x00") &&
			strings.Contains(string(line), "/"+name+".toml\x00") {
			var pid int
			if _, err := fmt.Sscanf(p, "/proc/%d/cmdline", &pid); err != nil {
				v.Fatal(err)
			}
			return pid
		}
	}
	v.Fatalf("no process of the tunnel %s", name)
	return 0
}

func TestForeground(t *testing.T) {
	v := newVPN(t)
	before := v.snapshot(v.Client)
	v.startProxy()
	v.invite("alice")
	run := v.Client.Command(v.ctx, filepath.Join(bin, "masque-client"), "run", "-c",
		filepath.Join(v.dir, "alice.toml"), "--run-dir", v.clientRun, "--log-format", "json")
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	v.clientDo(0, "wait", "alice", "--for", "connected")
	if err := run.Stop(v.ctx); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	log, err := run.Log()
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(log, "\n")
	var line struct{ Msg, Program, Version, Name, Credentials string }
	if err := json.Unmarshal([]byte(first), &line); err != nil || line.Msg != "starting" ||
		line.Program != "masque-client" || line.Version == "" || line.Name != "alice" {
		t.Errorf("the first line of the log is %s, %v", first, err)
	}
	v.sameAs(v.Client, before)
}

func TestWithoutPrivileges(t *testing.T) {
	v := newVPN(t)
	v.invite("alice")
	file := filepath.Join(v.dir, "alice.toml")
	drop := func(want int, program string, args ...string) string {
		t.Helper()
		c := v.Client.Command(v.ctx, "/proc/self/exe",
			append([]string{filepath.Join(bin, program)}, args...)...)
		c.Env = append(os.Environ(), dropVar+"=1")
		out, _ := c.CombinedOutput() // checked by the exit code
		if c.ExitCode() != want {
			t.Fatalf("%s %v: exit code %d, want %d\n%s", program, args, c.ExitCode(), want, out)
		}
		return string(out)
	}
	for _, out := range []string{
		drop(7, "masque-client", "run", "-c", file, "--run-dir", v.clientRun),
		drop(7, "masque-client", "up", file, "--wait", "--run-dir", v.clientRun),
		drop(7, "masque-proxy", "run", "-c", v.config, "--run-dir", v.proxRun),
	} {
		if !strings.Contains(out, "CAP_NET_ADMIN is missing") ||
			!strings.Contains(out, "sudo setcap cap_net_admin") {
			t.Errorf("got\n%s", out)
		}
	}
	if out := drop(2, "masque-client", "check", "-c", file, "--run-dir",
		v.clientRun); !strings.Contains(out, "fail  privileges: CAP_NET_ADMIN is missing — ") {
		t.Errorf("check printed:\n%s", out)
	}
}

func TestProxyReload(t *testing.T) {
	v := newVPN(t)
	v.startProxy()
	v.invite("alice")
	if r := v.proxyDo(1, "run", "-c", v.config); !strings.Contains(r.last, "already running") {
		t.Errorf("a second proxy: %s", r.last)
	}
	v.proxyDo(0, "check", "-c", v.config)
	old := v.servedCertificate()
	v.proxyDo(0, "init", "--renew", v.dir)
	if out := v.proxyDo(0, "reload").out; out != "reloaded\n" {
		t.Errorf("reload printed %q", out)
	}
	if v.servedCertificate() == old {
		t.Error("the old certificate is still in use")
	}
	v.clientDo(0, "up", "alice", "--wait")

	text, err := os.ReadFile(v.config)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []struct{ from, to, restart string }{
		{"sessions = 4096", "sessions = 17", ""},
		{"offload = true", "offload = false", "tun.offload"},
	} {
		text = []byte(strings.Replace(string(text), change.from, change.to, 1))
		if err := os.WriteFile(v.config, text, 0o644); err != nil {
			t.Fatal(err)
		}
		if out := v.proxyDo(0, "reload").out; strings.Contains(out,
			"restart") != (change.restart != "") || !strings.Contains(out, change.restart) {
			t.Errorf("%s: reload printed %q", change.to, out)
		}
	}
	if err := os.WriteFile(v.config, []byte("nonsense = 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := v.proxyDo(2, "reload"); !strings.Contains(r.last, "nonsense") {
		t.Errorf("a broken file: %s", r.last)
	}
	if err := v.proxy.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	v.until("SIGHUP reloads", func() bool {
		return strings.Contains(v.proxyLog(), "reload failed")
	})
	v.clientDo(0, "status", "alice")
	v.clientDo(0, "down", "alice")
}

// servedCertificate returns the certificate that the proxy presents.
func (v *vpn) servedCertificate() [32]byte {
	v.Helper()
	socket, err := v.Client.ListenPacket("udp", "198.51.100.2:0")
	if err != nil {
		v.Fatal(err)
	}
	defer socket.Close()
	conn, err := quic.Dial(v.ctx, socket, &net.UDPAddr{IP: lab.ProxyIPv4.AsSlice(), Port: 443},
		&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h3"}}, nil)
	if err != nil {
		v.Fatal(err)
	}
	certs := conn.ConnectionState().TLS.PeerCertificates
	if err := conn.CloseWithError(0, ""); err != nil {
		v.Error(err)
	}
	return pki.Fingerprint(certs[0])
}
