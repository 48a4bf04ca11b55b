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
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/lab"
	"masquevpn/proxy"
)

var (
	pool4   = netip.MustParsePrefix("10.77.0.0/24")
	pool6   = netip.MustParsePrefix("fd77::/64")
	client4 = netip.MustParseAddr("10.77.0.2")
	client6 = netip.MustParseAddr("fd77::2")
	proxy4  = netip.MustParseAddr("10.77.0.1")
	proxy6  = netip.MustParseAddr("fd77::1")
)

// options change a pair. The zero value is a full tunnel without address
// translation, whose pool the target has a route to.
type options struct {
	clients int
	mtu     int // MTU of the links between clients and router
	impair  *lab.Impairment
	behind  []netip.Prefix // networks behind the clients, which the target has routes to
	routes  string         // table [routes] of the client, without its heading
	client  string         // more of the client's configuration
	proxy   string         // more of the proxy's
}

// pair is a proxy and its clients in the standard topology.
type pair struct {
	*lab.Topology
	t      *testing.T
	ctx    context.Context
	dir    string // folder of the proxy's configuration
	opts   options
	server *lab.Cmd
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

// newHosts makes the hosts alone.
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

// writeProxyConfig writes proxy.toml around the files that init made.
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

// editProxyConfig replaces text in proxy.toml.
func (p *pair) editProxyConfig(from, to string) {
	p.t.Helper()
	b, err := os.ReadFile(p.config())
	check(p.t, err)
	if !strings.Contains(string(b), from) {
		p.t.Fatalf("%q is not in the configuration", from)
	}
	check(p.t, os.WriteFile(p.config(), []byte(strings.ReplaceAll(string(b), from, to)), 0o600))
}

func (p *pair) config() string { return filepath.Join(p.dir, "proxy.toml") }

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

// stopProxy ends the proxy in good order.
func (p *pair) stopProxy() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := p.server.Stop(ctx); err != nil {
		p.t.Errorf("the proxy ended with %v:\n%s", err, p.log(p.server))
	}
}

func (p *pair) log(c *lab.Cmd) string {
	text, err := c.Log()
	check(p.t, err)
	return text
}

// clientLog returns what a client that was started by up has logged.
func (p *pair) clientLog(name string) string {
	p.t.Helper()
	out, err := p.Client.Command(p.ctx, "cat", "/run/masque/"+name+".log").Output()
	check(p.t, err)
	return string(out)
}

// invite makes the configuration of a user, with what the pair's options add,
// and returns its path.
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

func appendTo(t *testing.T, file, text string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteString(text)
	check(t, errors.Join(err, f.Close()))
}

// up connects host with the configuration in file and waits until packets flow.
// The tunnel's name is that of the file.
func (p *pair) up(host *lab.Host, file string) {
	p.t.Helper()
	out, err := host.Command(p.ctx, program("masque-client"), "up", file, "--wait").CombinedOutput()
	if err != nil {
		p.t.Fatalf("masque-client up: %v\n%s\n%s", err, out, p.log(p.server))
	}
}

func (p *pair) down(host *lab.Host, name string) {
	p.t.Helper()
	p.must(host, "masque-client", "down", name)
}

// connect invites user and brings up host as that user.
func (p *pair) connect(host *lab.Host, user string) {
	p.t.Helper()
	p.up(host, p.invite(user))
}

// must runs one of the programs, which has to succeed, and returns its standard
// output.
func (p *pair) must(host *lab.Host, name string, args ...string) string {
	p.t.Helper()
	c := host.Command(p.ctx, program(name), args...)
	out, err := c.Output()
	if err != nil {
		p.t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, out, p.log(c))
	}
	return string(out)
}

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

// kick ends the sessions of a user.
func (p *pair) kick(user string) {
	p.t.Helper()
	var sessions []proxy.SessionStatus
	check(p.t, json.Unmarshal([]byte(p.must(p.Proxy, "masque-proxy", "sessions", "--json")),
		&sessions))
	for _, s := range sessions {
		if s.User == user {
			p.must(p.Proxy, "masque-proxy", "kick", s.ID)
		}
	}
}

// eventually waits until ok holds.
func (p *pair) eventually(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("not in %v: %s\n%s", patience, what, p.log(p.server))
		}
	}
}

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

// unreachable checks that a ping from host is answered by the ICMP error of the
// given type and code. Beside other traffic a ping may be lost, in the kernel's
// queue in front of a device without offload for one; then it asks again.
func (p *pair) unreachable(from *lab.Host, to netip.Addr, typ, code int) {
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

func (p *pair) snapshot(host *lab.Host) string {
	p.t.Helper()
	s, err := host.Snapshot()
	check(p.t, err)
	return s
}

// unchanged checks that host is as it was when before was taken.
func (p *pair) unchanged(host *lab.Host, before string) {
	p.t.Helper()
	if d := lab.Diff(before, p.snapshot(host)); d != "" {
		p.t.Errorf("%s is not as before:\n%s", host.Name(), d)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lastLine returns the last line of what a program wrote.
func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
