package test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
	"masquevpn/proxy"
)

// twoProxies links a.example, whose proxy is in front of the target, with
// domains of a hoster, whose proxy runs on the host of the client.
type twoProxies struct {
	*pair
	hoster string    // folder of the hoster's proxy
	behind *lab.Host // the host behind the hoster's proxy
	server *lab.Cmd  // the hoster's proxy
	nets   []netip.Prefix
}

// newTwoProxies starts both proxies. The n-th domain has 10.n.0.0/24, from 2,
// and reaches the n-th half of the target's network. Each owner has an
// authority of its own, and the hoster's certificate is for gw.hoster.example,
// which a.example names as the server of each of the domains.
func newTwoProxies(t *testing.T, connectA, connectB bool, domains ...string) *twoProxies {
	t.Helper()
	p := &twoProxies{hoster: t.TempDir()}
	var tablesA, tablesB strings.Builder
	for i, d := range domains {
		n := netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/24", i+2))
		p.nets = append(p.nets, n)
		part := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(128 * i)}), 25)
		fmt.Fprintf(&tablesA, "[[peer]]\ndomain = %q\nnetworks = [%q]\nreach = [%q]\n"+
			"delegation = []\nserver = \"gw.hoster.example\"\nconnect = %t\n", d, n, part, connectA)
		fmt.Fprintf(&tablesB, "[[peer]]\ndomain = \"a.example\"\nlocal = %q\nnetworks = [%q]\n"+
			"reach = [%q]\ndelegation = []\nserver = \"a.example\"\nconnect = %t\n", d, part, n,
			connectB)
	}
	p.pair = newHosts(t, options{behind: p.nets})
	p.must(p.Proxy, "masque-proxy", "init", "--name", "a.example", p.dir)
	p.must(p.Client, "masque-proxy", "init", "--name", "gw.hoster.example", p.hoster)
	hosterCA := readFile(t, filepath.Join(p.hoster, "ca.crt"))
	check(t, os.WriteFile(filepath.Join(p.dir, "peers.crt"), hosterCA, 0o600))
	check(t, os.WriteFile(filepath.Join(p.hoster, "peers.crt"),
		readFile(t, filepath.Join(p.dir, "ca.crt")), 0o600))
	for _, h := range []*lab.Host{p.Proxy, p.Client} {
		check(t, h.Resolve("gw.hoster.example", lab.ClientIPv4))
		check(t, h.Resolve("a.example", lab.ProxyIPv4))
	}
	p.writeProxyConfig("\n[routes]\nadvertise = [\"192.0.2.0/24\"]\n" +
		"[federation]\ndomains = [\"a.example\"]\nca = \"peers.crt\"\n" + tablesA.String())
	p.editProxyConfig(fmt.Sprintf("name = %q", lab.ProxyName), `name = "a.example"`)
	var advertise, local []string
	for i, d := range domains {
		advertise, local = append(advertise, fmt.Sprintf("%q", p.nets[i])),
			append(local, fmt.Sprintf("%q", d))
	}
	var err error
	p.behind, err = p.Lab.Host("behind")
	check(t, err)
	router, host := lab.End{Host: p.Client, Name: "eth1"}, lab.End{Host: p.behind, Name: "eth0"}
	for _, n := range p.nets {
		host.Addrs = append(host.Addrs, netip.PrefixFrom(n.Addr().Next(), n.Bits()))
		router.Addrs = append(router.Addrs, netip.PrefixFrom(n.Addr().Next().Next(), n.Bits()))
	}
	check(t, p.Lab.Connect(router, host, lab.LinkOptions{}))
	check(t, p.behind.AddDefaultRoute(router.Addrs[0].Addr()))
	check(t, os.WriteFile(filepath.Join(p.hoster, "proxy.toml"), []byte(fmt.Sprintf(`
name = "gw.hoster.example"
[tls]
cert = "proxy.crt"
key = "proxy.key"
client_ca = "ca.crt"
[auth]
methods = ["mtls"]
users = "users.toml"
[pool]
ipv4 = "10.99.0.0/24"
[nat]
masquerade = false
[routes]
advertise = [%s]
[federation]
domains = [%s]
ca = "peers.crt"
%s%s`, strings.Join(advertise, ", "), strings.Join(local, ", "), tablesB.String(), tunTable())), 0o600))
	p.startProxy()
	p.startHoster()
	return p
}

// startHoster starts the hoster's proxy.
func (p *twoProxies) startHoster() {
	p.t.Helper()
	p.server = p.Client.Command(p.ctx, program("masque-proxy"), "run", "-c",
		filepath.Join(p.hoster, "proxy.toml"))
	check(p.t, p.server.Start())
}

// peers returns the peers of a.example.
func (p *twoProxies) peers(host *lab.Host) (list []proxy.PeerStatus) {
	p.t.Helper()
	check(p.t, json.Unmarshal([]byte(p.must(host, "masque-proxy", "peers", "--json")), &list))
	return list
}

// awaitLinked waits until all peers are connected, and their networks are
// routed.
func (p *twoProxies) awaitLinked() {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		list := p.peers(p.Proxy)
		linked := !slices.ContainsFunc(list, func(s proxy.PeerStatus) bool {
			return s.State != proxy.PeerConnected || len(s.Networks) == 0
		})
		if linked {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("the peers are not linked: %+v\n%s\n%s", list, p.log(p.pair.server),
				p.log(p.server))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// pings checks that the target and the network of the first domain, which
// reaches it, reach each other.
func (p *twoProxies) pings() {
	p.t.Helper()
	addr := p.nets[0].Addr().Next()
	p.ping(p.Target, addr)
	p.run(p.behind, "ping", "-c1", "-W2", "-I", addr.String(), lab.TargetIPv4.String())
}

// Two domains at one hoster share the connection to it, and each has a link of
// its own. A reload that removes one ends it alone.
func TestPeersShareAConnection(t *testing.T) {
	p := newTwoProxies(t, true, false, "b.example", "c.example")
	// The hoster's certificate proves the name in server.
	p.awaitLinked()
	p.pings()
	list := p.peers(p.Proxy)
	if len(list) != 2 || list[0].Connection != list[1].Connection || list[0].DialedBy != "us" ||
		list[0].Identity != "certificate" {
		t.Errorf("the peers are %+v, want one connection that we dialed", list)
	}
	if out := p.must(p.Client, "masque-proxy", "peers"); strings.Count(out, "connected") != 2 ||
		!strings.Contains(out, "them") {
		t.Errorf("the hoster's peers are\n%s", out)
	}
	if s := p.proxyStatus().Peers; s == nil || s.Configured != 2 || s.Connected != 2 {
		t.Errorf("the status has the peers %+v, want 2 of 2", s)
	}
	// c.example is removed.
	data := string(readFile(t, p.config()))
	at := strings.Index(data, "[[peer]]\ndomain = \"c.example\"")
	end := strings.Index(data[at:], "connect = true\n") + at + len("connect = true\n")
	check(t, os.WriteFile(p.config(), []byte(data[:at]+data[end:]), 0o600))
	p.must(p.Proxy, "masque-proxy", "reload")
	p.eventually("the other link is gone", func() bool {
		return len(p.sessions()) == 1 && len(p.peers(p.Proxy)) == 1
	})
	p.ping(p.Target, p.nets[0].Addr().Next())
	if s := p.peers(p.Proxy)[0]; s.State != proxy.PeerConnected || *s.Since != *list[0].Since {
		t.Errorf("the link that stays is %+v, want it as before", s)
	}
	if out := p.run(p.Proxy, "ip", "route"); strings.Contains(out, p.nets[1].String()) {
		t.Errorf("the route of the removed peer is still there:\n%s", out)
	}
}

// When both ends connect, one connection is left, and packets pass. A proxy
// that was killed is linked again.
func TestPeersDialEachOther(t *testing.T) {
	p := newTwoProxies(t, true, true, "b.example")
	p.awaitLinked()
	p.eventually("one link is left", func() bool { return len(p.sessions()) == 1 })
	p.pings()
	p.kill(p.server)
	p.startHoster()
	p.eventually("the networks reach each other again", func() bool {
		return p.Target.Command(p.ctx, "ping", "-c1", "-W1",
			p.nets[0].Addr().Next().String()).Run() == nil
	})
	p.awaitLinked()
}

// An owner without a table for the other's domain is linked with nobody: the
// proxy that connects sees that it is refused.
func TestPeersWithoutConsent(t *testing.T) {
	p := newTwoProxies(t, true, false, "b.example")
	data := string(readFile(t, filepath.Join(p.hoster, "proxy.toml")))
	data = strings.Replace(data, `domain = "a.example"`, `domain = "x.example"`, 1)
	check(t, os.WriteFile(filepath.Join(p.hoster, "proxy.toml"), []byte(data), 0o600))
	p.kill(p.server)
	p.startHoster()
	p.eventually("the peer refuses", func() bool {
		list := p.peers(p.Proxy)
		return list[0].State == proxy.PeerRefused && list[0].RetryIn > 0
	})
	if len(p.sessions()) != 0 {
		t.Error("there is a session")
	}
	if out := p.run(p.Proxy, "ip", "route"); strings.Contains(out, p.nets[0].String()) {
		t.Errorf("a route is installed:\n%s", out)
	}
}
