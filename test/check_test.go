package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"masquevpn/internal/lab"
)

// check runs the check command of a program, which must exit with the given
// code, and returns the report.
func (p *pair) check(host *lab.Host, code int, name string, args ...string) string {
	p.t.Helper()
	c := host.Command(p.ctx, program(name), append([]string{"check"}, args...)...)
	out, _ := c.Output()
	if c.ExitCode() != code {
		p.t.Errorf("%s check %q: exit code %d, want %d\n%s%s", name, args, c.ExitCode(), code, out,
			p.log(c))
	}
	return string(out)
}

// wantLines checks that the report has a line with each of the prefixes.
func (p *pair) wantLines(report string, prefixes ...string) {
	p.t.Helper()
	for _, want := range prefixes {
		if !strings.Contains("\n"+report, "\n"+want) {
			p.t.Errorf("no line %q in:\n%s", want, report)
		}
	}
}

// The check commands find nothing wrong with a working pair. With a firewall in
// the way they name a remedy, and after the remedy they find nothing wrong
// again.
func TestCheckFirewall(t *testing.T) {
	p := newPair(t, options{})
	file := p.invite("alice")
	const (
		in      = "firewall: nftables table inet fw, chain input drops UDP 443 from clients"
		forward = "firewall: nftables table inet fw, chain forward drops packets of clients from masque0 to "
		answers = "firewall: nftables table inet fw, chain forward drops answers from "
		out     = "firewall: nftables table inet fw, chain output drops UDP 443 to the proxy"
	)
	report := p.check(p.Proxy, 0, "masque-proxy", "-c", p.config()) +
		p.check(p.Client, 0, "masque-client", "-c", file)
	p.wantLines(report, "ok    firewall: no chain of nftables drops UDP 443 from clients",
		"ok    firewall: no chain of nftables drops UDP 443 to the proxy",
		"ok    policy routing: ", "ok    reverse path filter: ",
		"ok    forwarding: net.ipv4.ip_forward is ", "ok    nat: off; ",
		"ok    IPv6: on for new interfaces")
	if strings.Contains(report, "fail  ") {
		t.Errorf("something fails:\n%s", report)
	}

	nft := func(host *lab.Host, rules string) {
		t.Helper()
		if out, err := host.Command(p.ctx, "nft", rules).CombinedOutput(); err != nil {
			t.Fatalf("nft %s: %v\n%s", rules, err, out)
		}
	}
	nft(p.Proxy, `table inet fw { chain input { type filter hook input priority 0; policy drop; iif lo accept; ct state established,related accept; meta l4proto ipv6-icmp accept
		}
		chain forward { type filter hook forward priority 0; policy drop; }
		}`)
	nft(p.Client, `table inet fw { chain output { type filter hook output priority 0; policy drop; meta l4proto ipv6-icmp accept
		oifname "masque*" accept
		}
		}`)
	report = p.check(p.Proxy, 0, "masque-proxy", "-c", p.config())
	p.wantLines(report, "warn  "+in+" — sudo nft insert rule inet fw input udp dport 443 accept, ",
		"warn  "+forward, "warn  "+answers)
	p.wantLines(p.check(p.Client, 0, "masque-client", "-c", file),
		"warn  "+out+" — sudo nft insert rule inet fw output udp dport 443 accept, ",
		"ok    firewall: no chain of nftables drops packets into the tunnel")
	if out, err := p.Client.Command(p.ctx, program("masque-client"), "up", file, "--wait",
		"--timeout", "2s").CombinedOutput(); err == nil {
		t.Errorf("the client connects through a closed firewall: %s", out)
	}

	for _, x := range []struct {
		host *lab.Host
		text string
	}{{p.Proxy, report}, {p.Client, p.check(p.Client, 0, "masque-client", "-c", file)}} {
		for line := range strings.Lines(x.text) {
			if _, command, ok := strings.Cut(line, " — sudo nft "); ok &&
				strings.HasPrefix(line, "warn  firewall: ") {
				command, _, _ = strings.Cut(command, ",")
				nft(x.host, command)
			}
		}
	}
	report = p.check(p.Proxy, 0, "masque-proxy", "-c", p.config()) +
		p.check(p.Client, 0, "masque-client", "-c", file)
	if strings.Contains(report, "warn  firewall: ") {
		t.Errorf("the remedies did not help:\n%s", report)
	}
	p.up(p.Client, file)
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.down(p.Client, "alice")
}

// With --connect, the check command of the client reports each step of
// connecting up to the first that fails.
func TestCheckConnect(t *testing.T) {
	p := newPair(t, options{})
	file := p.invite("alice")
	before := p.snapshot(p.Client)
	found := "ok    connecting: the name " + lab.ProxyName + " leads to "
	good := []string{found, "ok    connecting: [2001:db8:2::5]:443 answers on UDP, round trip ",
		"ok    connecting: its certificate is for " + lab.ProxyName + ", from ",
		"ok    connecting: it is a MASQUE proxy: ", "ok    connecting: the request for "}
	p.wantLines(p.check(p.Client, 0, "masque-client", "-c", file, "--connect"), good...)
	p.wantUnchanged(p.Client, before)
	p.eventually("the session has ended", func() bool {
		return strings.TrimSpace(p.must(p.Proxy, "masque-proxy", "sessions", "--json")) == "[]"
	})

	// Without --connect, the check command sends the proxy nothing.
	if report := p.check(p.Client, 0, "masque-client", "-c", file); strings.Contains(report,
		"connecting: ") {
		t.Errorf("without --connect it connects:\n%s", report)
	}

	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	p.wantLines(p.check(p.Client, 2, "masque-client", "-c", file, "--connect"), append(good[:4:4],
		"fail  connecting: the proxy does not accept the credentials — ask its operator for a new invitation")...)

	text := string(readFile(t, file))
	other := filepath.Join(t.TempDir(), "other.toml")
	dir := filepath.Join(t.TempDir(), "other")
	p.must(p.Proxy, "masque-proxy", "init", "--name", lab.ProxyName, dir)
	check(t, os.WriteFile(other, []byte(strings.Replace(text,
		string(readFile(t, filepath.Join(p.dir, "ca.crt"))),
		string(readFile(t, filepath.Join(dir, "ca.crt"))), 1)), 0o600))
	p.wantLines(p.check(p.Client, 2, "masque-client", "-c", other, "--connect"), found,
		"fail  connecting: the certificate of "+lab.ProxyName+
			" is from an unknown authority — set tls.ca")

	p.stopProxy()
	p.wantLines(p.check(p.Client, 2, "masque-client", "-c", file, "--connect"), found,
		"fail  connecting: ")
}
