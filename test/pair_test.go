package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/lab"
	"masquevpn/proxy"
)

// runDir is the run directory of both programs.
const runDir = "/run/masque"

// patience is the longest wait for events that take a second or two.
const patience = 60 * time.Second

// The proxy's pool, and the addresses of the first client and of the proxy in
// the tunnel.
var (
	pool4   = netip.MustParsePrefix("10.77.0.0/24")
	pool6   = netip.MustParsePrefix("fd77::/64")
	client4 = netip.MustParseAddr("10.77.0.2")
	client6 = netip.MustParseAddr("fd77::2")
	proxy4  = netip.MustParseAddr("10.77.0.1")
	proxy6  = netip.MustParseAddr("fd77::1")
)

// options are the differences of a pair from a full tunnel without address
// translation, with a target that has a route to the pool.
type options struct {
	clients int             // number of client hosts; 0: one
	mtu     int             // MTU of the links between clients and router; 0: 1500
	impair  *lab.Impairment // impairs the first link; nil: a plain link
	behind  []netip.Prefix  // networks behind the clients; the target has routes to them
	routes  string          // table [routes] of the clients, without its heading
	client  string          // other tables of the clients' configuration
	proxy   string          // other tables of the proxy's configuration
}

// pair is a proxy and its clients in the topology of the lab. All helpers that
// take a *pair fail the test that it belongs to.
type pair struct {
	*lab.Topology
	t      *testing.T
	ctx    context.Context
	dir    string // folder of the proxy's configuration
	opts   options
	server *lab.Cmd // the proxy that startProxy started last
}

// newPair makes the hosts and starts the proxy.
func newPair(t *testing.T, o options) *pair {
	t.Helper()
	p := newHosts(t, o)
	p.must(p.Proxy, "masque-proxy", "init", "--name", lab.ProxyName, p.dir)
	p.writeProxyConfig(o.proxy)
	p.startProxy()
	return p
}

// newHosts makes the hosts and starts nothing.
func newHosts(t *testing.T, o options) *pair {
	t.Helper()
	if err := lab.CheckTUN(); err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(t.Context())
	check(t, err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	topo, err := lab.NewTopology(l, lab.TopologyOptions{
		Clients: o.clients, ClientMTU: o.mtu, Impair: o.impair,
		Pool: append([]netip.Prefix{pool4, pool6}, o.behind...),
	})
	check(t, err)
	return &pair{Topology: topo, t: t, ctx: t.Context(), dir: filepath.Join(t.TempDir(), "proxy"),
		opts: o}
}

// config returns the path of proxy.toml.
func (p *pair) config() string { return filepath.Join(p.dir, "proxy.toml") }

// writeProxyConfig writes a proxy.toml that uses the files of `masque-proxy
// init` and ends with more.
func (p *pair) writeProxyConfig(more string) {
	p.t.Helper()
	if !strings.Contains(more, "[routes]") {
		more += "\n[routes]\nadvertise = [\"0.0.0.0/0\", \"::/0\"]\n"
	}
	check(p.t, os.WriteFile(p.config(), []byte(fmt.Sprintf(`
name = %q
[tls]
cert = "proxy.crt"
key = "proxy.key"
client_ca = "ca.crt"
[auth]
methods = ["mtls", "token"]
users = "users.toml"
[pool]
ipv4 = %q
ipv6 = %q
[nat]
masquerade = false
%s%s`, lab.ProxyName, pool4, pool6, tunTable(), more)), 0o600))
}

// editProxyConfig replaces from by to in proxy.toml.
func (p *pair) editProxyConfig(from, to string) {
	p.t.Helper()
	b, err := os.ReadFile(p.config())
	check(p.t, err)
	if !strings.Contains(string(b), from) {
		p.t.Fatalf("proxy.toml does not contain %q", from)
	}
	check(p.t, os.WriteFile(p.config(), []byte(strings.ReplaceAll(string(b), from, to)), 0o600))
}

// startProxy starts the proxy and waits until it serves.
func (p *pair) startProxy() {
	p.t.Helper()
	p.server = p.Proxy.Command(p.ctx, program("masque-proxy"), "run", "-c", p.config())
	check(p.t, p.server.Start())
	p.eventually("the proxy answers", func() bool {
		select {
		case <-p.server.Done():
			p.t.Fatalf("the proxy ended:\n%s", p.log(p.server))
		default:
		}
		return p.Proxy.Command(p.ctx, program("masque-proxy"), "status", "--json").Run() == nil
	})
}

// stopProxy stops the proxy with SIGTERM. It must exit with status 0.
func (p *pair) stopProxy() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := p.server.Stop(ctx); err != nil {
		p.t.Errorf("the proxy ended with %v:\n%s", err, p.log(p.server))
	}
}

// killProxy kills the proxy with SIGKILL and waits for its end.
func (p *pair) killProxy() {
	p.t.Helper()
	p.kill(p.server)
}

// kill kills c with SIGKILL and waits for its end.
func (p *pair) kill(c *lab.Cmd) {
	p.t.Helper()
	check(p.t, c.Signal(syscall.SIGKILL))
	<-c.Done()
}

// log returns the output that c has written so far.
func (p *pair) log(c *lab.Cmd) string {
	p.t.Helper()
	text, err := c.Log()
	check(p.t, err)
	return text
}

// clientLog returns the log of the tunnel that `masque-client up` started on
// the first client.
func (p *pair) clientLog(name string) string {
	p.t.Helper()
	out, err := p.Client.Command(p.ctx, "cat", runDir+"/"+name+".log").Output()
	check(p.t, err)
	return string(out)
}

// invite makes the configuration file of a user, appends the tables of the
// pair's options, and returns its path.
func (p *pair) invite(user string) string {
	p.t.Helper()
	file := filepath.Join(p.t.TempDir(), user+".toml")
	p.must(p.Proxy, "masque-proxy", "invite", user, "-c", p.config(), "-o", file)
	appendTo(p.t, file, tunTable())
	if p.opts.routes != "" {
		appendTo(p.t, file, "\n[routes]\n"+p.opts.routes+"\n")
	}
	appendTo(p.t, file, p.opts.client)
	return file
}

// appendTo appends text to an existing file.
func appendTo(t *testing.T, file, text string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteString(text)
	check(t, errors.Join(err, f.Close()))
}

// connect invites user and brings up a tunnel of that name on host.
func (p *pair) connect(host *lab.Host, user string) {
	p.t.Helper()
	p.up(host, p.invite(user))
}

// up brings up a tunnel in the background and waits until packets flow. The
// tunnel has the name of the file, without its extension.
func (p *pair) up(host *lab.Host, file string) {
	p.t.Helper()
	out, err := host.Command(p.ctx, program("masque-client"), "up", file, "--wait").CombinedOutput()
	if err != nil {
		p.t.Fatalf("masque-client up: %v\n%s\n%s", err, out, p.log(p.server))
	}
}

// down ends a tunnel and waits until the host is restored.
func (p *pair) down(host *lab.Host, name string) {
	p.t.Helper()
	p.must(host, "masque-client", "down", name)
}

// runClient runs a tunnel in the foreground on the first client and waits until
// it is connected.
func (p *pair) runClient(file string) *lab.Cmd {
	p.t.Helper()
	c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", file)
	check(p.t, c.Start())
	p.awaitConnected(strings.TrimSuffix(filepath.Base(file), ".toml"))
	return c
}

// awaitConnected waits until a tunnel of the first client is connected.
func (p *pair) awaitConnected(name string) {
	p.t.Helper()
	p.must(p.Client, "masque-client", "wait", name, "--for", "connected", "--timeout", "30s")
}

// awaitReconnected waits until alice's tunnel on the first client is connected
// and has reconnected more than n times.
func (p *pair) awaitReconnected(n uint64) {
	p.t.Helper()
	p.eventually("the client has reconnected", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateConnected && s.Reconnects > n
	})
}

// wantSameSession checks that alice's tunnel on the first client is connected
// in the session that it had when before was taken.
func (p *pair) wantSameSession(before client.Status) {
	p.t.Helper()
	if s := p.status(p.Client, "alice"); s.State != client.StateConnected || s.Reconnects != 0 ||
		!s.Since.Equal(before.Since) {
		p.t.Errorf("the session did not last: %+v", s)
	}
}

// status returns the status of a tunnel, which may be down.
func (p *pair) status(host *lab.Host, name string) client.Status {
	p.t.Helper()
	out, err := host.Command(p.ctx, program("masque-client"), "status", name, "--json").Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	var s client.Status
	if err := json.Unmarshal(out, &s); err != nil {
		p.t.Fatalf("status %q: %v", out, err)
	}
	return s
}

// proxyStatus returns the status of the proxy.
func (p *pair) proxyStatus() (s proxy.Status) {
	p.t.Helper()
	check(p.t, json.Unmarshal([]byte(p.must(p.Proxy, "masque-proxy", "status", "--json")), &s))
	return s
}

// sessions returns the sessions of the proxy.
func (p *pair) sessions() (list []proxy.SessionStatus) {
	p.t.Helper()
	check(p.t, json.Unmarshal([]byte(p.must(p.Proxy, "masque-proxy", "sessions", "--json")), &list))
	return list
}

// session returns the only session of the proxy.
func (p *pair) session() proxy.SessionStatus {
	p.t.Helper()
	all := p.sessions()
	if len(all) != 1 {
		p.t.Fatalf("the proxy has %d sessions, want 1", len(all))
	}
	return all[0]
}

// kick ends the sessions of a user.
func (p *pair) kick(user string) {
	p.t.Helper()
	for _, s := range p.sessions() {
		if s.User == user {
			p.must(p.Proxy, "masque-proxy", "kick", s.ID)
		}
	}
}

// must runs one of the programs under test, which must succeed, and returns its
// standard output.
func (p *pair) must(host *lab.Host, name string, args ...string) string {
	p.t.Helper()
	c := host.Command(p.ctx, program(name), args...)
	out, err := c.Output()
	if err != nil {
		p.t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, out, p.log(c))
	}
	return string(out)
}

// run runs another program, which must succeed, and returns its output.
func (p *pair) run(host *lab.Host, name string, args ...string) string {
	p.t.Helper()
	out, err := host.Command(p.ctx, name, args...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s: %s %v: %v\n%s", host.Name(), name, args, err, out)
	}
	return string(out)
}

// script runs shell commands, which must all succeed.
func (p *pair) script(host *lab.Host, lines string) {
	p.t.Helper()
	p.run(host, "sh", "-ec", lines)
}

// eventually waits until ok returns true. condition completes the sentence "it
// never happened that ...".
func (p *pair) eventually(condition string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("not within %v: %s\n%s", patience, condition, p.log(p.server))
		}
	}
}

// ping checks that each address answers an echo request.
func (p *pair) ping(from *lab.Host, to ...netip.Addr) {
	p.t.Helper()
	for _, a := range to {
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		if _, err := from.Ping(ctx, a); err != nil {
			p.t.Errorf("ping from %s to %v: %v\n%s", from.Name(), a, err, p.log(p.server))
		}
		cancel()
	}
}

// wantUnreachable checks that an echo request is answered with an ICMP error of
// the given type and code. It asks again if nothing answers, because a queue in
// front of a device without offload may drop the request beside other traffic.
func (p *pair) wantUnreachable(from *lab.Host, to netip.Addr, typ, code int) {
	p.t.Helper()
	var a lab.Answer
	var err error
	for range 10 {
		ctx, cancel := context.WithTimeout(p.ctx, patience/10)
		a, err = from.Probe(ctx, lab.Probe{To: to})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	if err != nil || a.Echo || a.Type != typ || a.Code != code {
		p.t.Errorf("ping from %s to %v: %v, %v, want type %d code %d", from.Name(), to, a, err,
			typ, code)
	}
}

// snapshot returns the network configuration of a host, for wantUnchanged.
func (p *pair) snapshot(host *lab.Host) string {
	p.t.Helper()
	s, err := host.Snapshot()
	check(p.t, err)
	return s
}

// wantUnchanged checks that the network configuration of host is as it was when
// before was taken.
func (p *pair) wantUnchanged(host *lab.Host, before string) {
	p.t.Helper()
	if d := lab.Diff(before, p.snapshot(host)); d != "" {
		p.t.Errorf("%s is not as before:\n%s", host.Name(), d)
	}
}

// wantRoute checks through which interface the kernel of the first client sends
// packets to an address.
func (p *pair) wantRoute(to netip.Addr, iface string) {
	p.t.Helper()
	if out := p.run(p.Client, "ip", "route", "get", to.String()); !strings.Contains(out,
		" dev "+iface+" ") {
		p.t.Errorf("route to %v: %s, want one through %s", to, out, iface)
	}
}

// check ends the test if err is not nil.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lastLine returns the last line of a program's output.
func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// readFile returns the contents of a file.
func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	check(t, err)
	return b
}
