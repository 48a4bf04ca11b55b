package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/discovery"
	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// Addresses of the host services, on a link of its own to the router: the
// validating resolver, and the web server of the domains.
const (
	resolverAddr = "203.0.115.53"
	webAddr      = "203.0.115.80"
)

// network is the domain network of a test: the topology of the lab, and a host
// with knot as the authoritative server of the domains, unbound as the
// resolver of the client, and nginx as the web server of example.org.
type network struct {
	*pair
	services *lab.Host
	webCA    string // file of the authority of the web server
	file     string // configuration of the client alice, whose proxy is a domain
}

// domains are the zones of a test and the delegation file of example.org.
type domains struct {
	certificate string              // name in the proxy's certificate
	zones       map[string][]string // records besides SOA and NS; names are relative
	signed      bool                // zones are signed, and unbound trusts their keys
	bogus       bool                // unbound trusts another key, so no answer is valid
	file        string              // server name in the delegation file; "": no file
	noWeb       bool                // nothing listens on TCP 443
}

// newNetwork starts the servers and the proxy, and invites alice.
func newNetwork(t *testing.T, d domains, o options) *network {
	t.Helper()
	n := &network{pair: newHosts(t, o)}
	n.must(n.Proxy, "masque-proxy", "init", "--name", d.certificate, n.dir)
	n.writeProxyConfig("")
	n.editProxyConfig(fmt.Sprintf("name = %q", lab.ProxyName),
		fmt.Sprintf("name = %q", d.certificate))
	n.startProxy()
	var err error
	n.services, err = n.Lab.Host("services")
	check(t, err)
	check(t, n.Lab.Connect(
		lab.End{Host: n.Router, Name: "services", Addrs: lab.Prefixes("203.0.115.1/24")},
		lab.End{Host: n.services, Name: "eth0",
			Addrs: lab.Prefixes(resolverAddr+"/24", webAddr+"/24")},
		lab.LinkOptions{}))
	check(t, n.services.AddDefaultRoute(lab.Prefixes("203.0.115.1/24")[0].Addr()))
	n.startDNS(d)
	if !d.noWeb {
		n.startWeb(d.file)
	}
	n.setResolv("nameserver " + resolverAddr + "\noptions trust-ad\n")
	n.file = n.invite("alice")
	n.setProxy("example.org")
	return n
}

// setResolv replaces the resolv.conf of the client.
func (n *network) setResolv(content string) {
	n.t.Helper()
	check(n.t, n.Client.Do(func() error {
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			return err
		}
		return os.WriteFile("/etc/resolv.conf", []byte(content), 0o644)
	}))
}

// setProxy changes the proxy in alice's file, and the tables behind it.
func (n *network) setProxy(proxy string, discovery ...string) {
	n.t.Helper()
	data, err := os.ReadFile(n.file)
	check(n.t, err)
	var lines []string
	for line := range strings.SplitSeq(string(data), "\n") {
		if strings.HasPrefix(line, "proxy = ") {
			line = fmt.Sprintf("proxy = %q", proxy)
		}
		lines = append(lines, line)
	}
	text, _, _ := strings.Cut(strings.Join(lines, "\n"), "\n[discovery]\n")
	if n.webCA != "" && !strings.Contains(proxy, ":") {
		discovery = append(discovery, fmt.Sprintf("ca = %q", n.webCA))
	}
	if len(discovery) > 0 {
		text += "\n[discovery]\n" + strings.Join(discovery, "\n") + "\n"
	}
	check(n.t, os.WriteFile(n.file, []byte(text), 0o600))
}

// start starts a daemon on the host services and fails the test if it ends.
func (n *network) start(name string, args ...string) *lab.Cmd {
	n.t.Helper()
	c := n.services.Command(n.ctx, name, args...)
	check(n.t, c.Start())
	return c
}

// startDNS runs knot and unbound.
func (n *network) startDNS(d domains) {
	n.t.Helper()
	dir := n.t.TempDir()
	var knot, unbound strings.Builder
	fmt.Fprintf(&knot, `server:
    listen: 127.0.0.2@53
    rundir: %[1]s
database:
    storage: %[1]s
policy:
  - id: auto
    algorithm: ecdsap256sha256
template:
  - id: default
    storage: %[1]s
    dnssec-signing: %[2]s
    dnssec-policy: auto
zone:
`, dir, map[bool]string{true: "on", false: "off"}[d.signed])
	fmt.Fprintf(&unbound, `server:
    interface: %s
    access-control: 0.0.0.0/0 allow
    do-not-query-localhost: no
    username: ""
    chroot: ""
    directory: %[2]q
    pidfile: ""
    use-syslog: no
    do-daemonize: no
    num-threads: 1
    module-config: "validator iterator"
`, resolverAddr, dir)
	for zone, records := range d.zones {
		text := "$ORIGIN " + zone +
			".\n$TTL 60\n@ SOA ns admin 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.2\n" +
			strings.Join(records, "\n") + "\n"
		check(n.t, os.WriteFile(filepath.Join(dir, zone+".zone"), []byte(text), 0o644))
		fmt.Fprintf(&knot, "  - domain: %s\n    file: %s.zone\n", zone, zone)
	}
	config := filepath.Join(dir, "knot.conf")
	check(n.t, os.WriteFile(config, []byte(knot.String()), 0o644))
	server := n.start("knotd", "-c", config)
	n.awaitAnswer(server, "127.0.0.2", "")
	for zone := range d.zones {
		fmt.Fprintf(&unbound, "    local-zone: %q nodefault\n", zone)
		switch {
		case d.bogus:
			fmt.Fprintf(&unbound, "    trust-anchor: %q\n",
				zone+". DS 1 13 2 "+strings.Repeat("00", 32))
		case d.signed:
			out, err := n.services.Command(n.ctx, "keymgr", "-c", config, zone, "ds").Output()
			check(n.t, err)
			line, _, _ := strings.Cut(string(out), "\n")
			fmt.Fprintf(&unbound, "    trust-anchor: %q\n", line)
		default:
			fmt.Fprintf(&unbound, "    domain-insecure: %q\n", zone)
		}
	}
	for zone := range d.zones {
		fmt.Fprintf(&unbound, "stub-zone:\n    name: %q\n    stub-addr: 127.0.0.2\n", zone)
	}
	config = filepath.Join(dir, "unbound.conf")
	check(n.t, os.WriteFile(config, []byte(unbound.String()), 0o644))
	resolver := n.start("unbound", "-d", "-c", config)
	want := "NOERROR"
	if d.bogus {
		want = "SERVFAIL"
	}
	n.awaitAnswer(resolver, resolverAddr, want)
}

// awaitAnswer waits until a DNS server answers about example.org, with a status
// if it is not empty.
func (n *network) awaitAnswer(server *lab.Cmd, addr, status string) {
	n.t.Helper()
	n.eventually("the DNS server answers", func() bool {
		select {
		case <-server.Done():
			n.t.Fatalf("the DNS server ended:\n%s", n.log(server))
		default:
		}
		out, _ := n.services.Command(n.ctx, "dig", "+tries=1", "+time=1", "@"+addr, "example.org",
			"SOA").Output()
		return strings.Contains(string(out), "status: "+status)
	})
}

// startWeb runs nginx for example.org, with a delegation file if it is not
// empty.
func (n *network) startWeb(file string) {
	n.t.Helper()
	dir := n.t.TempDir()
	authority, ca, err := pki.NewAuthority("web CA", time.Now())
	check(n.t, err)
	cert, err := authority.Server("example.org", nil, time.Now())
	check(n.t, err)
	n.webCA = filepath.Join(dir, "ca.crt")
	check(n.t, os.WriteFile(n.webCA, ca.Cert, 0o644))
	check(n.t, os.WriteFile(filepath.Join(dir, "web.crt"), cert.Cert, 0o644))
	check(n.t, os.WriteFile(filepath.Join(dir, "web.key"), cert.Key, 0o600))
	location := "return 404;"
	if file != "" {
		body, err := json.Marshal(map[string]string{"masque.server": file})
		check(n.t, err)
		location = fmt.Sprintf("default_type application/json; return 200 '%s';", body)
	}
	config := fmt.Sprintf(`user root;
worker_processes 1;
daemon off;
pid %[1]s/pid;
error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
  server {
    listen %[2]s:443 ssl http2;
    server_name example.org;
    ssl_certificate %[1]s/web.crt;
    ssl_certificate_key %[1]s/web.key;
    location = %[3]s { %[4]s }
  }
}
`, dir, webAddr, discovery.FilePath, location)
	path := filepath.Join(dir, "nginx.conf")
	check(n.t, os.WriteFile(path, []byte(config), 0o644))
	server := n.start("nginx", "-c", path, "-e", "stderr", "-p", dir)
	n.eventually("nginx listens", func() bool {
		select {
		case <-server.Done():
			n.t.Fatalf("nginx ended:\n%s", n.log(server))
		default:
		}
		c, err := n.services.DialContext(n.ctx, "tcp", webAddr+":443")
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// The records of the tests: the address of the domain is that of its web
// server.
var (
	webRecord  = "@ A " + webAddr
	p1Record   = "p1 A " + lab.ProxyIPv4.String()
	hosterZone = []string{p1Record, "vpn A " + lab.ProxyIPv4.String()}
)

// A tunnel comes up by each way in which a domain can lead to its proxy. The
// proxy proves the name that the way asks for.
func TestDiscover(t *testing.T) {
	for _, tt := range []struct {
		name    string
		domains domains
		step    string
		proves  string
		authority,
		wellKnown string
	}{
		{"ByFile", domains{certificate: "vpn.hoster.example", file: "vpn.hoster.example",
			zones: map[string][]string{"example.org": {webRecord}, "hoster.example": hosterZone}},
			"well-known/address", "vpn.hoster.example", "vpn.hoster.example", "valid"},
		{"BySRV", domains{certificate: "example.org",
			zones: map[string][]string{"example.org": {webRecord,
				"_masque._udp SRV 10 0 443 p1.hoster.example."}, "hoster.example": hosterZone}},
			"srv", "example.org", "example.org", "error: status 404"},
		{"ByHTTPS", domains{certificate: "example.org",
			zones: map[string][]string{"example.org": {webRecord,
				`@ HTTPS 1 p1.hoster.example. alpn="h3"`}, "hoster.example": hosterZone}},
			"https", "example.org", "example.org", "error: status 404"},
		{"ByFileAndSRV", domains{certificate: "vpn.hoster.example", file: "vpn.hoster.example",
			zones: map[string][]string{"example.org": {webRecord, "_masque._udp SRV 0 0 0 ."},
				"hoster.example": {p1Record, "_masque._udp.vpn SRV 10 0 443 p1"}}},
			"well-known/srv", "vpn.hoster.example", "vpn.hoster.example", "valid"},
		{"ByAddress", domains{certificate: "example.org", noWeb: true,
			zones: map[string][]string{"example.org": {"@ A " + lab.ProxyIPv4.String()}}},
			"address", "example.org", "example.org", "error: unreachable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t, tt.domains, options{})
			n.up(n.Client, n.file)
			n.ping(n.Client, lab.TargetIPv4)
			s := n.status(n.Client, "alice")
			d := s.Discovery
			if d == nil || d.Step != tt.step || d.Authority != tt.authority ||
				d.WellKnown != tt.wellKnown ||
				d.Input != "example.org" {
				t.Errorf("the status has %+v, want step %s, authority %s and file %q", d, tt.step,
					tt.authority,
					tt.wellKnown)
			}
			if s.Proxy.AuthenticatedAs != tt.proves {
				t.Errorf("the proxy proved %s, want %s", s.Proxy.AuthenticatedAs, tt.proves)
			}
			out := n.must(n.Client, "masque-client", "resolve", "-c", n.file)
			if !strings.Contains(out, "step       "+tt.step+", for ") {
				t.Errorf("resolve printed\n%s\nwant step %s", out, tt.step)
			}
			out = n.must(n.Client, "masque-client", "resolve", "-c", n.file, "--connect")
			if !strings.Contains(out, "verified as "+tt.proves+", ") {
				t.Errorf("resolve --connect printed\n%s\nwant a server that proves %s", out,
					tt.proves)
			}
		})
	}
}

// signedSRV has a signed SRV record that leads to another name.
func signedSRV() domains {
	return domains{certificate: "p1.hoster.example", signed: true, noWeb: true,
		zones: map[string][]string{"example.org": {webRecord,
			"_masque._udp SRV 10 0 443 p1.hoster.example."}, "hoster.example": hosterZone}}
}

// A signed SRV record leads to a server with a certificate for its own name,
// and an answer that is not signed, or not validly, does not.
func TestDiscoverSigned(t *testing.T) {
	for _, tt := range []struct {
		name, dnssec string
		change       func(*domains)
		exit         int
		want         string // in the output of resolve
	}{
		{"used", "use", nil, 0, "p1.hoster.example  example.org or p1.hoster.example"},
		{"required", "require", nil, 0, "p1.hoster.example  example.org or p1.hoster.example"},
		{"not looked at", "off", nil, 0, "example.org  example.org"},
		{"stripped and used", "use", func(d *domains) {
			d.signed = false
		}, 0, "example.org  example.org"},
		{"stripped and required", "require", func(d *domains) {
			d.signed = false
		}, 5, "are not signed"},
		{"not valid", "use", func(d *domains) {
			d.bogus = true
		}, 5, "DNS does not answer about example.org (SERVFAIL)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := signedSRV()
			if tt.change != nil {
				tt.change(&d)
			}
			n := newNetwork(t, d, options{})
			n.setProxy("example.org", fmt.Sprintf("dnssec = %q", tt.dnssec))
			out := n.runFor(tt.exit, "resolve", "-c", n.file)
			if !strings.Contains(out, tt.want) {
				t.Errorf("resolve printed\n%s\nwant %q", out, tt.want)
			}
			signed := tt.exit == 0 && strings.Contains(tt.want, " or ")
			if !signed {
				// The certificate is for the target, which nobody vouches for.
				out := n.runFor(2, "check", "-c", n.file, "--connect")
				if tt.exit == 0 && !strings.Contains(out,
					"is not for the name example.org, but for p1.hoster.example") {
					t.Errorf("check printed\n%s", out)
				}
				return
			}
			n.up(n.Client, n.file)
			s := n.status(n.Client, "alice")
			if s.Proxy.AuthenticatedAs != "p1.hoster.example" || !s.Discovery.Secure {
				t.Errorf("the status has %+v and %+v", s.Proxy, s.Discovery)
			}
		})
	}
}

// runFor runs masque-client on the client, and returns its output. The exit
// code must be as given.
func (n *network) runFor(exit int, args ...string) string {
	n.t.Helper()
	c := n.Client.Command(n.ctx, program("masque-client"), args...)
	out, err := c.CombinedOutput()
	if code := exitCode(err); code != exit {
		n.t.Errorf("masque-client %s: exit code %d, want %d:\n%s", strings.Join(args, " "), code,
			exit, out)
	}
	return string(out)
}

// A proxy with a port is not discovered: the client asks for addresses alone,
// and nobody for a file.
func TestDiscoverNothingNew(t *testing.T) {
	n := newNetwork(t, domains{certificate: "example.org", file: "vpn.hoster.example",
		zones: map[string][]string{"example.org": {"@ A " + lab.ProxyIPv4.String(),
			"_masque._udp SRV 0 0 1 p1.hoster.example."}, "hoster.example": hosterZone}}, options{})
	n.setProxy("example.org:443")
	c, err := n.Client.Capture("eth0", func(p lab.Packet) bool { return p.Outgoing })
	check(t, err)
	n.up(n.Client, n.file)
	n.ping(n.Client, lab.TargetIPv4)
	check(t, c.Close())
	questions := 0
	for _, p := range c.Packets() {
		if _, ok := p.TransportLayer().(*layers.TCP); ok {
			t.Errorf("the client sent a TCP packet: %v", p)
		}
		udp, ok := p.TransportLayer().(*layers.UDP)
		var m dnsmessage.Message
		if !ok || udp.DstPort != 53 || m.Unpack(udp.Payload) != nil {
			continue
		}
		questions++
		if kind := m.Questions[0].Type; kind != dnsmessage.TypeA && kind != dnsmessage.TypeAAAA {
			t.Errorf("the client asked for %v", kind)
		}
	}
	if questions == 0 {
		t.Error("the client asked nothing: this test would not notice other questions")
	}
	if d := n.status(n.Client, "alice").Discovery; d != nil {
		t.Errorf("the status has %+v, want no discovery", d)
	}
}

// A network that drops TCP 443 does not keep the client from its proxy.
func TestDiscoverSlowFile(t *testing.T) {
	n := newNetwork(t, domains{certificate: "example.org", file: "vpn.hoster.example",
		zones: map[string][]string{"example.org": {webRecord,
			"_masque._udp SRV 0 0 443 p1.hoster.example."},
			"hoster.example": hosterZone}}, options{})
	n.script(n.Router, "nft add table inet web\n"+
		"nft add chain inet web f '{ type filter hook forward priority 0; }'\n"+
		"nft add rule inet web f tcp dport 443 drop")
	n.up(n.Client, n.file)
	if d := n.status(n.Client, "alice").Discovery; d == nil || d.Step != "srv" {
		t.Errorf("the status has %+v, want step srv", d)
	}
}

// A domain that moves to another server does not end a running tunnel, and the
// next connection goes there.
func TestDiscoverMoves(t *testing.T) {
	d := domains{certificate: "vpn.hoster.example", file: "vpn.hoster.example",
		zones: map[string][]string{"example.org": {webRecord}, "hoster.example": hosterZone}}
	n := newNetwork(t, d, options{})
	n.up(n.Client, n.file)
	before := n.status(n.Client, "alice")
	n.killProxy()
	n.startProxy()
	n.awaitReconnected(before.Reconnects)
	if d := n.status(n.Client, "alice").Discovery; d == nil || d.Step != "well-known/address" {
		t.Errorf("after a reconnect: the status has %+v", d)
	}
}

// With the kill switch closed, the client resolves and connects, and nothing
// else leaves the host.
func TestDiscoverKillSwitch(t *testing.T) {
	n := newNetwork(t, domains{certificate: "vpn.hoster.example", file: "vpn.hoster.example",
		zones: map[string][]string{"example.org": {webRecord}, "hoster.example": hosterZone}},
		options{client: "\n[kill_switch]\nenabled = true\n"})
	n.up(n.Client, n.file)
	n.killProxy() // the switch stays closed
	c, err := n.Client.Capture("eth0", func(p lab.Packet) bool { return p.Outgoing })
	check(t, err)
	if out, err := n.Client.Command(n.ctx, "ping", "-c1", "-W1",
		webAddr).CombinedOutput(); err == nil {
		t.Errorf("the kill switch is open: %s", out)
	}
	n.startProxy()
	n.eventually("the tunnel is back", func() bool {
		return n.status(n.Client, "alice").State == "connected"
	})
	check(t, c.Close())
	for _, p := range c.Packets() {
		dst := p.NetworkLayer().NetworkFlow().Dst().String()
		if dst != lab.ProxyIPv4.String() && dst != resolverAddr && dst != webAddr {
			continue // neighbour discovery and such
		}
		if p.Layer(layers.LayerTypeICMPv4) != nil {
			t.Errorf("the client sent %v", p)
		}
	}
}

// resolve prints each message of a domain that leads nowhere, with its exit
// code.
func TestResolveCommand(t *testing.T) {
	n := newNetwork(t, domains{certificate: "example.org", zones: map[string][]string{
		"example.org": {webRecord,
			"_masque._udp.off SRV 0 0 0 .",
			"_masque._tcp.tcp SRV 0 0 443 p1.hoster.example.",
			"_masque._udp.alias SRV 0 0 443 cname.hoster.example.",
			"local A 127.0.0.1",
			"_masque._udp.local SRV 0 0 443 p1.local",
			"p1.local A 127.0.0.1",
			"circle HTTPS 0 circle2",
			"circle2 HTTPS 0 circle",
		}, "hoster.example": append(hosterZone, "cname CNAME p1")}}, options{})
	for _, tt := range []struct {
		name, input string
		exit        int
		want        string
	}{
		{"not a name", "a b", 2, `not a name, host:port or URI template: write for example "vpn.example.org"`},
		{"another script", "bücher.example", 2, `not ASCII: write "xn--bcher-kva.example"`},
		{"a zone", "fe80::1%eth0", 2,
			"has a zone, which no certificate can have: write the address without it"},
		{"no address", "none.example.org", 5, "the name none.example.org has no address"},
		{"not offered", "off.example.org", 5,
			"off.example.org says in its DNS that it has no MASQUE proxy"},
		{"another transport", "tcp.example.org", 5,
			"offers its proxy by HTTP/2 (_masque._tcp) alone"},
		{"an alias", "alias.example.org", 5, "(cname.hoster.example port 443: an alias)"},
		{"this host", "local.example.org", 5, "(p1.local.example.org port 443: forbidden address)"},
		{"circles", "circle.example.org", 5, "the aliases of circle.example.org lead in circles"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if out := n.runFor(tt.exit, "resolve", tt.input); !strings.Contains(out, tt.want) {
				t.Errorf("got\n%s\nwant %q", out, tt.want)
			}
		})
	}
	n.setResolv("nameserver 203.0.115.99\n")
	if out := n.runFor(5, "resolve", "example.org"); !strings.Contains(out,
		"DNS does not answer about example.org") {
		t.Errorf("without a resolver: got\n%s", out)
	}
}

// exitCode returns the exit code of a command that ended with err.
func exitCode(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	return 0
}
