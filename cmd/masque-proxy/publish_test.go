package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/config"
	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
	"masquevpn/internal/doctor"
	"masquevpn/internal/pki"
)

// certificateFor returns a certificate for names.
func certificateFor(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	authority, _, err := pki.NewAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Server(name, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	return chain[0]
}

var (
	host4 = netip.MustParseAddr("203.0.113.5")
	host6 = netip.MustParseAddr("2001:db8:2::5")
	// hostAddresses are those of the host in these tests.
	hostAddresses = []netip.Addr{netip.MustParseAddr("127.0.0.1"), host6, host4,
		netip.MustParseAddr("fe80::1"), netip.MustParseAddr("10.0.0.7"),
		netip.MustParseAddr("10.77.0.1")}
)

// published returns the publication of a domain for a proxy with a certificate
// for its name.
func published(t *testing.T, name, listen, domain string) *publication {
	t.Helper()
	f, err := config.ParseProxy("proxy.toml",
		[]byte(fmt.Sprintf("name = %q\nlisten = [%q]\n[auth]\nmethods = [\"none\"]\n"+
			"[pool]\nipv4 = \"10.77.0.0/24\"\n", name, listen)))
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPublication(f, domain, hostAddresses, hostAddresses)
	if err != nil {
		t.Fatal(err)
	}
	p.file, p.leaf = "proxy.toml", certificateFor(t, name)
	return p
}

// section returns the section of a text below a heading.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\n# "+heading)
	if !ok {
		t.Fatalf("no section %q in\n%s", heading, text)
	}
	_, rest, _ = strings.Cut(rest, "\n")
	before, _, _ := strings.Cut(rest, "\n# ")
	return before
}

// blocks returns the blocks of a section behind lines that end with a colon and
// have a phrase.
func blocks(section, phrase string) (list []string) {
	parts := strings.Split(section, "\n\n")
	for i, p := range parts[:len(parts)-1] {
		if strings.HasSuffix(p, ":") && strings.Contains(p, phrase) {
			list = append(list, strings.TrimSpace(parts[i+1]))
		}
	}
	return list
}

// publishIn puts the zone lines and the delegation file of a section into a
// world.
func publishIn(w *discoverytest.World, domain, section string) {
	for _, line := range strings.Split(strings.Join(blocks(section, "Zone file"), "\n"), "\n") {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		owner := strings.TrimSuffix(f[0], ".")
		n := w.DNS[owner]
		switch data := strings.Join(f[4:], " "); f[3] {
		case "A":
			n.A = append(n.A, netip.MustParseAddr(data))
		case "AAAA":
			n.AAAA = append(n.AAAA, netip.MustParseAddr(data))
		case "SRV":
			n.SRV = append(n.SRV, data)
		case "HTTPS":
			n.HTTPS = append(n.HTTPS, data)
		}
		w.DNS[owner] = n
	}
	for _, body := range blocks(section, "has this content") {
		w.HTTPS["https://"+domain+discovery.FilePath] = discoverytest.Page{Status: 200, Body: body}
	}
}

// Whatever a section prints leads clients to the proxy once it is published,
// and the line about the certificate tells what it has to be for (C3, C4).
func TestPublishLeadsHere(t *testing.T) {
	const signed = "example.org"
	for _, test := range []struct {
		name, listen, domain, section string

		step, authority, sni, verify string
		port                         uint16
	}{
		{"vpn.example.net", "[::]:443", "", "The name itself",
			"address", "vpn.example.net", "vpn.example.net", "vpn.example.net", 443},
		{"vpn.example.net", "[::]:8443", "", "The name itself",
			"port", "vpn.example.net:8443", "vpn.example.net", "vpn.example.net", 8443},
		{"vpn.example.net", "[::]:8443", "", "SRV records",
			"srv", "vpn.example.net", "vpn.example.net", "vpn.example.net", 8443},
		{"vpn.example.net", "[::]:8443", "", "An HTTPS record",
			"https", "vpn.example.net", "vpn.example.net", "vpn.example.net", 8443},
		{"vpn.example.net", "[::]:443", "example.org", "A file of the domain's web server",
			"well-known/address", "vpn.example.net", "vpn.example.net", "vpn.example.net", 443},
		{"vpn.example.net", "[::]:8443", "example.org", "A file of the domain's web server",
			"well-known/port", "vpn.example.net:8443", "vpn.example.net", "vpn.example.net", 8443},
		{"203.0.113.5", "[::]:8443", "example.org", "A file of the domain's web server",
			"well-known/literal", "203.0.113.5:8443", "", "203.0.113.5", 8443},
		{"2001:db8:2::5", "[::]:443", "example.org", "A file of the domain's web server",
			"well-known/literal", "[2001:db8:2::5]", "", "2001:db8:2::5", 443},
		{"vpn.example.net", "[::]:8443", "example.org", "SRV records",
			"srv", "example.org", "example.org", "example.org", 8443},
		{"vpn.example.net", "[::]:8443", "example.org", "Signed SRV records",
			"srv", "example.org", "vpn.example.net", "example.org or vpn.example.net", 8443},
		{"vpn.example.net", "[::]:8443", "example.org", "A file and SRV records",
			"well-known/srv", "vpn.example.net", "vpn.example.net", "vpn.example.net", 8443},
	} {
		t.Run(fmt.Sprintf("%s at %s for %q by %s", test.name, test.listen, test.domain,
			test.section), func(t *testing.T) {
			text := published(t, test.name, test.listen, test.domain).text()
			way := section(t, text, test.section)
			w := &discoverytest.World{DNS: make(map[string]discoverytest.Node),
				HTTPS: make(map[string]discoverytest.Page)}
			// The domain has a web server, and all ways need the addresses of
			// the proxy.
			w.DNS["example.org"] = discoverytest.Node{A: []netip.Addr{
				netip.MustParseAddr("203.0.113.80")}}
			publishIn(w, test.domain, section(t, text, "The name itself"))
			publishIn(w, test.domain, way)
			query := discovery.Query{Transports: []discovery.Transport{discovery.H3}, Private: true}
			if strings.HasPrefix(test.section, "Signed") {
				publishIn(w, test.domain, section(t, text, "SRV records"))
				w.Signed, query.DNSSEC = []string{signed}, discovery.DNSSECUse
			}
			client, err := config.ParseClient("alice.toml", []byte(blocks(way, "Client")[0]))
			if err != nil {
				t.Fatal(err)
			}
			if client.Discovery.DNSSEC != query.DNSSEC {
				t.Errorf("the client's mode of signatures is %v", client.Discovery.DNSSEC)
			}
			if query.Name, err = discovery.ParseInput(client.Proxy); err != nil {
				t.Fatal(err)
			}
			r, err := w.Resolver().Resolve(t.Context(), query)
			if err != nil {
				t.Fatalf("%v\n%s", err, way)
			}
			rec := r.Groups[0].Records[0]
			if got := strings.Join(rec.Verify, " or "); r.Step != test.step ||
				r.Authority != test.authority || rec.SNI != test.sni || got != test.verify ||
				rec.Port != test.port || rec.Addresses[0] != host6 && rec.Addresses[0] != host4 {
				t.Errorf("got %s %s %+v\n%s", r.Step, r.Authority, rec, way)
			}
			needed := rec.Verify[len(rec.Verify)-1]
			line := "Certificate: for " + needed + ", as the proxy's is.\n"
			if needed != test.name {
				line = "Certificate: for " + needed + ". The proxy's is for " + test.name +
					": get another one.\n"
			}
			if !strings.Contains(way, line) {
				t.Errorf("no %q in\n%s", line, way)
			}
		})
	}
}

// The records of a domain without a proxy say so to clients and to peers.
func TestPublishNone(t *testing.T) {
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{"example.org": {
		A: []netip.Addr{host4}}}}
	publishIn(w, "example.org", section(t,
		published(t, "vpn.example.net", "[::]:443", "example.org").text(), "No proxy"))
	for _, purpose := range []discovery.Purpose{discovery.Client, discovery.Peer} {
		name, _ := discovery.ParseInput("example.org")
		_, err := w.Resolver().Resolve(t.Context(), discovery.Query{Name: name, Purpose: purpose,
			Transports: []discovery.Transport{discovery.H3}})
		var e *discovery.Error
		if !errors.As(err, &e) || e.Code != discovery.NotOffered {
			t.Errorf("purpose %v: %v", purpose, err)
		}
	}
}

// The text says where the certificate comes from, and what a web server serves.
func TestPublishText(t *testing.T) {
	p := published(t, "vpn.example.net", "[::]:443", "example.org")
	p.source = "proxy.crt"
	text := p.text()
	for _, want := range []string{
		"domain       example.org\nproxy        vpn.example.net, UDP port 443\n" +
			"certificate  proxy.crt, for vpn.example.net, until ",
		"\npin          " + pinOf(p.leaf) + "\n",
		"\n    return 200 '{\"masque.server\": \"vpn.example.net\"}';\n}\n",
		"\nrespond /.well-known/masquevpn/server `{\"masque.server\": \"vpn.example.net\"}`\n",
		"\nvpn.example.net. 3600 IN A 203.0.113.5\nvpn.example.net. 3600 IN AAAA 2001:db8:2::5\n\n",
		"\n  masque-proxy invite NAME -c proxy.toml --proxy example.org -o NAME.toml\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	t.Run("no certificate yet", func(t *testing.T) {
		p.leaf = nil
		if text := p.text(); !strings.Contains(text, "pin          none yet\n") ||
			!strings.Contains(text, "Certificate: for example.org. The proxy has none yet.\n") {
			t.Error(text)
		}
	})
	t.Run("private addresses", func(t *testing.T) {
		p := published(t, "vpn.example.net", "10.0.0.7:443", "")
		if text := p.text(); !strings.Contains(text, "3600 IN A 10.0.0.7\n") ||
			!strings.Contains(text, "private ones alone") {
			t.Error(text)
		}
	})
	t.Run("an address as name", func(t *testing.T) {
		p := published(t, "203.0.113.5", "[::]:443", "example.org")
		if text := p.text(); strings.Contains(text, "IN SRV 10") ||
			!strings.Contains(text, "These need a name of the proxy") {
			t.Error(text)
		}
	})
}

func TestPublishErrors(t *testing.T) {
	for _, test := range []struct{ name, domain, want string }{
		{"vpn.example.org", "example.org:443", `--domain "example.org:443" is not a domain`},
		{"vpn.example.org", "vpn", `--domain "vpn" is not a domain`},
		{"vpn.example.org", "https://example.org",
			"is not a domain: write for example example.org"},
		{"203.0.113.5", "", "the proxy's name is an address, which needs no publication: " +
			"name a domain with --domain"},
		{"vpn", "example.org", `name = "vpn": only hosts of the local network know this name`},
	} {
		t.Run(test.name+" "+test.domain, func(t *testing.T) {
			_, file := install(t)
			replace(t, file, `"vpn.example.org"`, fmt.Sprintf("%q", test.name))
			if _, last := do(t, 2, "publish", "-c", file, "--domain",
				test.domain); !strings.Contains(
				last, test.want) {
				t.Errorf("got %s, want %q", last, test.want)
			}
		})
	}
}

// The check compares what is published with the proxy.
func TestPublishedCheck(t *testing.T) {
	const (
		file  = "https://example.org/.well-known/masquevpn/server"
		srv   = "_masque._udp.example.org"
		peers = "_masque-fed._udp.example.org"
	)
	proxyHost := discoverytest.Node{A: []netip.Addr{host4}, AAAA: []netip.Addr{host6}}
	web := discoverytest.Node{A: []netip.Addr{netip.MustParseAddr("203.0.113.80")}}
	other := discoverytest.Node{A: []netip.Addr{netip.MustParseAddr("203.0.113.6")}}
	delegated := map[string]discoverytest.Page{file: {Status: 200,
		Body: `{"masque.server": "vpn.example.net"}`}}
	record := func(list ...string) discoverytest.Node { return discoverytest.Node{SRV: list} }
	for _, test := range []struct {
		name        string
		world       *discoverytest.World
		certificate string // the name of the proxy's; default: vpn.example.net
		dnssec      discovery.DNSSEC
		keys        map[string]error // addresses of servers that answer
		hasPeers    bool
		fails       bool
		want        []string // beginnings of lines
	}{
		{name: "a file", world: &discoverytest.World{HTTPS: delegated,
			DNS: map[string]discoverytest.Node{"example.org": web, "vpn.example.net": proxyHost}},
			want: []string{
				"ok    clients: well-known/address leads to vpn.example.net port 443 at " +
					"2001:db8:2::5, this proxy",
				"ok    clients: the certificate is for vpn.example.net",
				"ok    peers: as clients"}},
		{name: "nothing", world: &discoverytest.World{
			DNS: map[string]discoverytest.Node{"example.org": web}}, fails: true, want: []string{
			"fail  clients: address leads to example.org port 443 at 203.0.113.80, which is " +
				"not this proxy: it does not answer",
			"fail  clients: example.org does not lead to this proxy — publish one of the ways"}},
		{name: "no domain", world: &discoverytest.World{}, fails: true, want: []string{
			"fail  clients: the name example.org has no address — "}},
		{name: "a bad file", world: &discoverytest.World{
			HTTPS: map[string]discoverytest.Page{file: {Status: 200, Body: "{}"}},
			DNS:   map[string]discoverytest.Node{"example.org": proxyHost}},
			certificate: "example.org", want: []string{
				"warn  clients: the delegation file is not used (invalid) — correct " +
					"https://example.org/",
				"ok    clients: the certificate is for example.org"}},
		{name: "SRV, and the certificate is for the target", world: &discoverytest.World{
			DNS: map[string]discoverytest.Node{srv: record("10 60 443 vpn.example.net."),
				"vpn.example.net": proxyHost}}, fails: true, want: []string{
			"fail  clients: the certificate is not for example.org, but for vpn.example.net " +
				"— get one for example.org, publish the delegation file, or sign"}},
		{name: "signed SRV", dnssec: discovery.DNSSECUse, world: &discoverytest.World{
			Signed: []string{"example.org"},
			DNS: map[string]discoverytest.Node{srv: record("10 60 443 vpn.example.net."),
				"vpn.example.net": proxyHost}}, want: []string{
			"ok    clients: the certificate is for vpn.example.net"}},
		{name: "another port", certificate: "example.org", world: &discoverytest.World{
			DNS: map[string]discoverytest.Node{srv: record("10 60 8443 vpn.example.net."),
				"vpn.example.net": proxyHost}}, fails: true, want: []string{
			"fail  clients: srv leads to vpn.example.net port 8443 at 203.0.113.5, which is not"}},
		{name: "several hosts", certificate: "example.org", world: &discoverytest.World{
			DNS: map[string]discoverytest.Node{
				srv:               record("10 0 443 vpn.example.net.", "20 0 443 p2.example.net."),
				"vpn.example.net": proxyHost, "p2.example.net": other}}, want: []string{
			"ok    clients: srv leads to vpn.example.net port 443 at 203.0.113.5, this proxy",
			"warn  clients: srv leads to p2.example.net port 443 at 203.0.113.6, which is " +
				"not this proxy: "}},
		{name: "an old address", world: &discoverytest.World{HTTPS: delegated,
			DNS: map[string]discoverytest.Node{"example.org": web, "vpn.example.net": {
				A: []netip.Addr{host4, netip.MustParseAddr("203.0.113.9")}}}}, fails: true,
			want: []string{
				"fail  clients: well-known/address leads to vpn.example.net port 443 at " +
					"203.0.113.9, which is not this proxy: it does not answer — correct the " +
					"addresses of vpn.example.net"}},
		{name: "behind a translator", world: &discoverytest.World{HTTPS: delegated,
			DNS: map[string]discoverytest.Node{"example.org": web, "vpn.example.net": other}},
			keys: map[string]error{"203.0.113.6": nil}, want: []string{
				"ok    clients: well-known/address leads to vpn.example.net port 443 at " +
					"203.0.113.6, this proxy"}},
		{name: "another server", world: &discoverytest.World{HTTPS: delegated,
			DNS: map[string]discoverytest.Node{"example.org": web, "vpn.example.net": other}},
			keys: map[string]error{"203.0.113.6": errOtherKey}, fails: true, want: []string{
				"fail  clients: well-known/address leads to vpn.example.net port 443 at " +
					"203.0.113.6, which is not this proxy: the server there has another " +
					"certificate"}},
		{name: "an alias", certificate: "example.org", world: &discoverytest.World{
			DNS: map[string]discoverytest.Node{
				srv:               record("10 0 443 vpn.example.net.", "20 0 443 www.example.org."),
				"vpn.example.net": proxyHost,
				"www.example.org": {CNAME: "vpn.example.net."}}}, want: []string{
			`warn  clients: the SRV record "_udp 20 0 443 www.example.org." is not used (alias)`}},
		{name: "none for peers", world: &discoverytest.World{HTTPS: delegated,
			DNS: map[string]discoverytest.Node{"example.org": web, "vpn.example.net": proxyHost,
				"_masque-fed._udp.vpn.example.net": record("0 0 0 .")}}, want: []string{
			"ok    clients: the certificate is for vpn.example.net",
			"warn  peers: vpn.example.net says in its DNS that it has no MASQUE proxy"}},
		{name: "none for peers, and the proxy has some", hasPeers: true, fails: true,
			world: &discoverytest.World{HTTPS: delegated, DNS: map[string]discoverytest.Node{
				"example.org": web, "vpn.example.net": proxyHost,
				"_masque-fed._udp.vpn.example.net": record("0 0 0 .")}}, want: []string{
				"fail  peers: vpn.example.net says in its DNS that it has no MASQUE proxy"}},
		{name: "DNS fails", world: &discoverytest.World{DNS: map[string]discoverytest.Node{
			"example.org": {Fail: map[string]string{"*": "SERVFAIL"}},
			srv:           {Fail: map[string]string{"*": "SERVFAIL"}}}}, fails: true,
			want: []string{
				"fail  clients: DNS does not answer about example.org (SERVFAIL) — check " +
					"this host's DNS"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := published(t, "vpn.example.net", "[::]:443", "example.org")
			if test.certificate != "" {
				p.leaf = certificateFor(t, test.certificate)
			}
			test.world.Now = discoverytest.Epoch
			var report doctor.Report
			c := &publishedCheck{publication: p, report: &report, local: hostAddresses,
				now: time.Now(), hasPeers: test.hasPeers,
				keyOf: func(_ context.Context, r discovery.Record) (string, error) {
					err, ok := test.keys[r.Addresses[0].String()]
					switch {
					case !ok:
						return "", errors.New("it does not answer")
					case err != nil:
						return "sha256:other", nil
					}
					return pinOf(p.leaf), nil
				}}
			c.run(t.Context(), test.world.Resolver(), test.dnssec)
			var out strings.Builder
			err := report.Finish(&out, false)
			if (err != nil) != test.fails {
				t.Errorf("the outcome is %v", err)
			}
			for _, want := range test.want {
				if !strings.Contains("\n"+out.String(), "\n"+want) {
					t.Errorf("no line begins with %q", want)
				}
			}
			if t.Failed() {
				t.Log("\n" + out.String())
			}
		})
	}
}

// The domain is the first of federation.domains, or the proxy's name.
func TestPublishDomain(t *testing.T) {
	for _, test := range []struct{ federation, flag, want string }{
		{"", "", "vpn.example.org"},
		{`domains = ["a.example", "b.example"]`, "", "a.example"},
		{`domains = ["a.example"]`, "Example.ORG.", "example.org"},
	} {
		t.Run(test.want, func(t *testing.T) {
			_, file := install(t)
			write(t, file, read(t, file)+"\n[federation]\n"+test.federation+"\n")
			if out, _ := do(t, 0, "publish", "-c", file, "--domain", test.flag); !strings.HasPrefix(
				out, "domain       "+test.want+"\n") {
				t.Error(out)
			}
		})
	}
}

// The command asks DNS, and its exit code tells whether the domain leads here.
func TestPublishCheckCommand(t *testing.T) {
	_, file := install(t)
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{
		"vpn.example.org": {A: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		"other.example":   {A: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}}}
	server := w.ServeDNS(t).String()
	out, _ := do(t, 0, "publish", "-c", file, "--check", "--nameserver", server)
	if !strings.Contains(out, "port 443 at 127.0.0.1, this proxy\n") {
		t.Error(out)
	}
	out, last := do(t, 2, "publish", "-c", file, "--check", "--nameserver", server, "--domain",
		"other.example")
	if !strings.Contains(out, "fail  clients: the certificate is not for other.example, but "+
		"for vpn.example.org") ||
		!strings.Contains(last, "checks failed") {
		t.Error(out, last)
	}
	out, _ = do(t, 2, "publish", "-c", file, "--check", "--nameserver", server, "--domain",
		"missing.example")
	if !strings.Contains(out, "fail  clients: the name missing.example has no address") {
		t.Error(out)
	}
}
