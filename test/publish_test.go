package test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

const (
	// publishedDomain is a domain whose owner has the host of an owner.
	publishedDomain = "example.org"
	ownerIPv4       = "198.19.0.80"
)

// owner is the owner of a domain, with a host for its DNS server and its web
// server.
type owner struct {
	*pair
	host *lab.Host
	dir  string
	dns  *lab.Cmd // nil: not running
	web  *lab.Cmd
}

// newOwner makes the owner's host, and makes it the DNS server of client and
// proxy. The proxy's name is not in the client's table of hosts.
func newOwner(t *testing.T) *owner {
	p := newPair(t, options{})
	o := &owner{pair: p, dir: t.TempDir()}
	var err error
	o.host, err = p.Lab.Host("owner")
	check(t, err)
	check(t, p.Lab.Connect(
		lab.End{Host: p.Router, Name: "owner", Addrs: lab.Prefixes("198.19.0.1/24")},
		lab.End{Host: o.host, Name: "eth0", Addrs: lab.Prefixes(ownerIPv4 + "/24")},
		lab.LinkOptions{}))
	check(t, o.host.AddDefaultRoute(netip.MustParseAddr("198.19.0.1")))
	for _, h := range []*lab.Host{p.Client, p.Proxy} {
		check(t, h.Do(func() error {
			if err := os.Remove("/etc/resolv.conf"); err != nil {
				return err
			}
			return os.WriteFile("/etc/resolv.conf", []byte("nameserver "+ownerIPv4+"\n"), 0o644)
		}))
	}
	check(t, p.Client.Do(func() error {
		return os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644)
	}))
	ca, pair, err := pki.NewAuthority("web", time.Now())
	check(t, err)
	server, err := ca.Server(publishedDomain, nil, time.Now())
	check(t, err)
	for name, data := range map[string][]byte{"ca.crt": pair.Cert, "web.crt": server.Cert,
		"web.key": server.Key} {
		check(t, os.WriteFile(o.file(name), data, 0o600))
	}
	return o
}

func (o *owner) file(name string) string { return filepath.Join(o.dir, name) }

// publishes restarts the servers with the lines of a zone file, as they are,
// and with lines for the server block of nginx.
func (o *owner) publishes(zoneLines, serverLines string) {
	o.t.Helper()
	o.stops()
	conf := fmt.Sprintf("server:\n    rundir: %q\n    listen: [ 0.0.0.0@53 ]\n"+
		"database:\n    storage: %q\nlog:\n  - target: stderr\n    any: warning\nzone:\n",
		o.dir, o.dir)
	for _, zone := range []string{publishedDomain, "example"} {
		text := fmt.Sprintf("%[1]s. 3600 IN SOA ns.%[1]s. root.%[1]s. 1 3600 900 86400 60\n"+
			"%[1]s. 3600 IN NS ns.%[1]s.\nns.%[1]s. 3600 IN A %[2]s\n", zone, ownerIPv4)
		if zone == publishedDomain {
			text += zone + ". 3600 IN A " + ownerIPv4 + "\n"
		}
		for line := range strings.Lines(zoneLines) {
			if name, _, _ := strings.Cut(line, " "); strings.HasSuffix("."+name, "."+zone+".") {
				text += line
			}
		}
		check(o.t, os.WriteFile(o.file(zone+".zone"), []byte(text), 0o644))
		conf += fmt.Sprintf("  - domain: %s\n    file: %q\n", zone, o.file(zone+".zone"))
	}
	check(o.t, os.WriteFile(o.file("knot.conf"), []byte(conf), 0o644))
	check(o.t, os.WriteFile(o.file("nginx.conf"), []byte(fmt.Sprintf(`user root;
daemon off;
master_process off;
pid %[1]s/nginx.pid;
error_log stderr;
events {}
http {
    client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s;
    uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
    access_log off;
    server {
        listen 443 ssl;
        server_name %[2]s;
        ssl_certificate %[1]s/web.crt;
        ssl_certificate_key %[1]s/web.key;
%[3]s
    }
}
`, o.dir, publishedDomain, serverLines)), 0o644))
	o.dns = o.host.Command(o.ctx, "knotd", "-c", o.file("knot.conf"))
	check(o.t, o.dns.Start())
	o.web = o.host.Command(o.ctx, "nginx", "-c", o.file("nginx.conf"), "-e", "stderr", "-p",
		o.dir)
	check(o.t, o.web.Start())
	o.eventually("the servers answer", func() bool {
		for _, c := range []*lab.Cmd{o.dns, o.web} {
			select {
			case <-c.Done():
				o.t.Fatalf("a server of the domain ended:\n%s", o.log(c))
			default:
			}
		}
		return o.Client.Command(o.ctx, program("masque-client"), "resolve", publishedDomain, "--ca",
			o.file("ca.crt")).Run() == nil && o.answersHTTPS()
	})
}

// answersHTTPS reports whether the web server accepts connections.
func (o *owner) answersHTTPS() bool {
	c, err := o.Client.DialContext(o.ctx, "tcp", ownerIPv4+":443")
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

// stops stops the servers.
func (o *owner) stops() {
	o.t.Helper()
	for _, c := range []*lab.Cmd{o.dns, o.web} {
		if c != nil {
			o.kill(c)
		}
	}
}

// publish returns the output of `masque-proxy publish` for the domain.
func (o *owner) publish() string {
	o.t.Helper()
	return o.must(o.Proxy, "masque-proxy", "publish", "-c", o.config(), "--domain", publishedDomain)
}

// compare runs `masque-proxy publish --check`, which must have an exit code,
// and returns its output.
func (o *owner) compare(exit int) string {
	o.t.Helper()
	c := o.Proxy.Command(o.ctx, program("masque-proxy"), "publish", "-c", o.config(), "--domain",
		publishedDomain, "--check", "--ca", o.file("ca.crt"))
	out, _ := c.CombinedOutput()
	if c.ExitCode() != exit {
		o.t.Errorf("publish --check: exit code %d, want %d\n%s", c.ExitCode(), exit, out)
	}
	return string(out)
}

// published returns the blocks behind lines with a phrase, in the section of a
// publication with a heading.
func published(t *testing.T, text, heading, phrase string) string {
	t.Helper()
	_, section, ok := strings.Cut(text, "\n# "+heading)
	if !ok {
		t.Fatalf("no section %q in\n%s", heading, text)
	}
	section, _, _ = strings.Cut(section, "\n# ")
	m := regexp.MustCompile(`(?m)` + regexp.QuoteMeta(phrase) + `.*:\n\n((?:.+\n)+)`).
		FindStringSubmatch(section)
	if m == nil {
		t.Fatalf("no %q in\n%s", phrase, section)
	}
	return m[1]
}

// What `publish` prints leads to a tunnel when it is put into the DNS server
// and the web server as it is.
func TestPublishIsWhatIsNeeded(t *testing.T) {
	o := newOwner(t)
	text := o.publish()
	addresses := published(t, text, "The name itself", "Zone file")
	delegation := published(t, text, "A file of the domain's web server", "nginx")
	for _, way := range []struct {
		name, zone, server, proxy, step string
	}{
		{"a file", addresses, delegation, publishedDomain, "well-known/address"},
		{"a file and SRV records",
			addresses + published(t, text, "A file and SRV records", "Zone file"), delegation,
			publishedDomain, "well-known/srv"},
		{"an HTTPS record", addresses + published(t, text, "An HTTPS record", "Zone file"), "",
			lab.ProxyName, "https"},
		{"the name itself", addresses, "", lab.ProxyName, "address"},
	} {
		t.Run(way.name, func(t *testing.T) {
			o.publishes(way.zone, way.server)
			if way.proxy == publishedDomain {
				o.compare(0)
			}
			user := strings.ReplaceAll(way.name, " ", "-")
			file := filepath.Join(t.TempDir(), user+".toml")
			o.must(o.Proxy, "masque-proxy", "invite", user, "-c", o.config(), "--proxy", way.proxy,
				"-o", file)
			appendTo(t, file, tunTable()+fmt.Sprintf("\n[discovery]\nca = %q\n"+
				"[metrics]\nlisten = \"127.0.0.1:9484\"\n", o.file("ca.crt")))
			o.up(o.Client, file)
			if d := o.status(o.Client, user).Discovery; d == nil || d.Step != way.step {
				t.Errorf("found by %+v, want %s", d, way.step)
			}
			o.ping(o.Client, lab.TargetIPv4, lab.TargetIPv6)
			counted := newScraper(o.pair, o.Client)
			counted.await(fmt.Sprintf("masque_discoveries_total{result=\"ok\",step=%q}",
				way.step), 1)
			if way.server != "" {
				counted.await(`masque_well_known_requests_total{result="valid"}`, 1)
			}
			o.down(o.Client, user)
		})
	}
}

// `publish --check` names each difference between what is published and the
// proxy.
func TestPublishCheck(t *testing.T) {
	o := newOwner(t)
	text := o.publish()
	addresses := published(t, text, "The name itself", "Zone file")
	delegation := published(t, text, "A file of the domain's web server", "nginx")
	srv := published(t, text, "SRV records", "Zone file")
	out, err := o.Router.Command(o.ctx, "nft", "table ip forward { "+
		"chain in { type nat hook prerouting priority dstnat; "+
		"ip daddr 203.0.113.1 udp dport 443 dnat to 203.0.113.5; }; "+
		"chain out { type nat hook postrouting priority srcnat; ct status dnat masquerade; }; }").
		CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	for _, row := range []struct {
		name, zone, server string
		exit               int
		want               []string
	}{
		{"nothing", addresses, "", 2,
			[]string{"fail  clients: address leads to example.org port 443 at " +
				ownerIPv4 + ", which is not this proxy: it does not answer",
				"fail  clients: example.org does not lead to this proxy"}},
		{"a file", addresses, delegation, 0, []string{
			"ok    clients: well-known/address leads to proxy.example port 443 at 203.0.113.5, this proxy",
			"ok    clients: the certificate is for proxy.example", "ok    peers: as clients"}},
		{"a file with a mistake", addresses, strings.ReplaceAll(delegation, "masque.server",
			"masque-server"), 2, []string{
			"warn  clients: the delegation file is not used (invalid)"}},
		{"SRV records without a certificate for the domain", addresses + srv, "", 2, []string{
			"fail  clients: the certificate is not for example.org, but for proxy.example"}},
		{"an old address", addresses + "proxy.example. 3600 IN A " + ownerIPv4 + "\n",
			delegation, 2,
			[]string{"fail  clients: well-known/address leads to proxy.example port 443 at " +
				ownerIPv4 + ", which is not this proxy: it does not answer — " +
				"correct the addresses of proxy.example"}},
		{"a router that forwards the port", "proxy.example. 3600 IN A 203.0.113.1\n", delegation, 0,
			[]string{"ok    clients: well-known/address leads to proxy.example port 443 at " +
				"203.0.113.1, this proxy"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			o.publishes(row.zone, row.server)
			o.wantLines(o.compare(row.exit), row.want...)
		})
	}
}
