package test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// linkConfig links a.example, behind the proxy, with b.example, whose gateway
// is a client.
const linkConfig = `
[routes]
advertise = ["192.0.2.0/24", "2001:db8:3::/64"]
[federation]
domains = ["a.example"]
ca = "peers.crt"
[[peer]]
domain = "b.example"
networks = ["10.2.0.0/24", "fd00:2::/64"]
reach = ["192.0.2.0/24", "2001:db8:3::/64"]
delegation = []
connect = false
`

// newLink starts the proxy of a.example and writes the configuration of the
// gateway of b.example. The owners have authorities of their own.
func newLink(t *testing.T, certificateFor string) (p *pair, file string) {
	t.Helper()
	networks := lab.Prefixes("10.2.0.0/24", "fd00:2::/64")
	p = newHosts(t, options{behind: networks})
	p.must(p.Proxy, "masque-proxy", "init", "--name", "a.example", p.dir)
	authority, ca, err := pki.NewAuthority("authority of b.example", time.Now())
	check(t, err)
	cert, err := authority.Server(certificateFor, nil, time.Now())
	check(t, err)
	dir := t.TempDir()
	for name, data := range map[string][]byte{filepath.Join(p.dir, "peers.crt"): ca.Cert,
		filepath.Join(dir, "b.crt"): cert.Cert, filepath.Join(dir, "b.key"): cert.Key} {
		check(t, os.WriteFile(name, data, 0o600))
	}
	p.writeProxyConfig(linkConfig)
	p.editProxyConfig(fmt.Sprintf("name = %q", lab.ProxyName), `name = "a.example"`)
	p.startProxy()
	check(t, p.Client.Resolve("a.example", lab.ProxyIPv4, lab.ProxyIPv6))
	for _, n := range []string{"10.2.0.5/32", "fd00:2::5/128"} {
		addr := netip.MustParsePrefix(n)
		check(t, p.Client.AddAddr("lo", addr))
		p.ping(p.Client, addr.Addr()) // the kernel has installed its route
	}
	file = filepath.Join(dir, "link.toml")
	check(t, os.WriteFile(file, []byte(fmt.Sprintf(`proxy = "a.example"
[federation]
domain = "b.example"
[tls]
ca = %q
cert = "b.crt"
key = "b.key"
[routes]
advertise = ["10.2.0.0/24", "fd00:2::/64"]
accept = ["192.0.2.0/24", "2001:db8:3::/64"]
`, filepath.Join(p.dir, "ca.crt"))+tunTable()), 0o600))
	return p, file
}

// Two owners with authorities of their own link their networks: hosts behind
// both ends reach each other, in both families and both directions.
func TestPeersLinkNetworks(t *testing.T) {
	p, file := newLink(t, "b.example")
	before := p.snapshot(p.Client)
	p.up(p.Client, file)
	s := p.status(p.Client, "link")
	if s.Peer == nil || s.Peer.Domain != "a.example" || s.Peer.Local != "b.example" ||
		s.Peer.Identity != "certificate" {
		t.Errorf("the status has the peer %+v", s.Peer)
	}
	session := p.session()
	if session.Kind != "peer" || session.User != "b.example" {
		t.Errorf("the proxy has a session %s of %s, want peer of b.example", session.Kind,
			session.User)
	}
	p.ping(p.Target, netip.MustParseAddr("10.2.0.5"), netip.MustParseAddr("fd00:2::5"))
	for _, args := range [][]string{{"-I", "10.2.0.5", lab.TargetIPv4.String()},
		{"-I", "fd00:2::5", lab.TargetIPv6.String()}} {
		p.run(p.Client, "ping", append([]string{"-c1", "-W2"}, args...)...)
	}
	p.down(p.Client, "link")
	p.wantUnchanged(p.Client, before)
}

// A gateway that proves another domain links nothing: no route is installed at
// either end, and no packet passes.
func TestPeerRefused(t *testing.T) {
	p, file := newLink(t, "c.example")
	client, proxyHost := p.snapshot(p.Client), p.snapshot(p.Proxy)
	c := p.Client.Command(p.ctx, program("masque-client"), "up", file, "--wait", "--timeout", "20s")
	out, err := c.CombinedOutput()
	if exitCode(err) != 4 || !strings.Contains(string(out),
		`the peer a.example does not accept our identity: it has to have [[peer]] domain = "b.example", and a certificate that proves b.example`) {
		t.Errorf("up ended with %v:\n%s", err, out)
	}
	if log := p.log(p.server); !strings.Contains(log, "not_delegated") {
		t.Errorf("the proxy's log has no class not_delegated:\n%s", log)
	}
	if len(p.sessions()) != 0 {
		t.Error("the proxy has a session")
	}
	p.wantUnchanged(p.Client, client)
	p.wantUnchanged(p.Proxy, proxyHost)
}
