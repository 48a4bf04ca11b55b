package test

import (
	"strings"
	"testing"

	"masquevpn/internal/lab"
)

// After each kind of tunnel, and each kind of end, the host is as before:
// addresses, routes, rules, nftables, sysctls and resolver files. `down` or the
// next start restores it after a killed client. The next start of a killed
// proxy restores its host.
func TestHostRestored(t *testing.T) {
	networks := lab.Prefixes("10.5.0.0/24", "fd05::/64")
	p := newPair(t, options{behind: networks, proxy: `
[dns]
servers = ["192.0.2.2"]
search = ["example"]
[[site]]
user = "gateway"
networks = ["10.5.0.0/24", "fd05::/64"]
`})
	p.stopProxy()
	p.editProxyConfig("masquerade = false", "masquerade = true")
	beforeProxy := p.snapshot(p.Proxy)
	p.startProxy()
	behind, err := p.Lab.Host("behind")
	check(t, err)
	check(t, p.Lab.Connect(
		lab.End{Host: p.Client, Name: "eth1", Addrs: lab.Prefixes("10.5.0.1/24", "fd05::1/64")},
		lab.End{Host: behind, Name: "eth0", Addrs: lab.Prefixes("10.5.0.2/24", "fd05::2/64")},
		lab.LinkOptions{}))
	before := p.snapshot(p.Client)

	outer := p.t
	run := func(file string) *lab.Cmd {
		p.t.Helper()
		c := p.runClient(file)
		p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		return c
	}
	kill := func(file string) {
		p.t.Helper()
		c := run(file)
		p.kill(c)
		if lab.Diff(before, p.snapshot(p.Client)) == "" {
			p.t.Error("the killed client left nothing behind: this test would not notice a failed cleanup")
		}
	}
	for _, tunnel := range []struct {
		user, routes, client string
		killSwitch           bool
	}{
		{user: "full"},
		{user: "split", routes: split},
		{user: "exclude", routes: `exclude = ["203.0.113.0/24", "2001:db8:3::8/125"]`},
		{user: "all", routes: "lan = false"},
		{user: "without-dns", client: "\n[dns]\nmode = \"off\"\n"},
		{user: "closed", client: killSwitch, killSwitch: true},
		{user: "gateway", routes: `advertise = ["10.5.0.0/24", "fd05::/64"]`},
	} {
		p.opts.routes, p.opts.client = tunnel.routes, tunnel.client
		file := p.invite(tunnel.user)
		for _, end := range []struct {
			name string
			do   func()
		}{
			{"down", func() {
				p.up(p.Client, file)
				p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
				p.down(p.Client, tunnel.user)
			}},
			{"SIGTERM", func() { check(p.t, run(file).Stop(p.ctx)) }},
			{"killed, down", func() {
				kill(file)
				p.down(p.Client, tunnel.user)
			}},
			{"killed, started, down", func() {
				kill(file)
				p.up(p.Client, file)
				p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
				p.down(p.Client, tunnel.user)
			}},
			{"refused", func() {
				c := run(file)
				p.must(p.Proxy, "masque-proxy", "user", "remove", tunnel.user, "-c", p.config())
				<-c.Done()
				if c.ExitCode() != 4 ||
					!strings.Contains(lastLine([]byte(p.log(c))),
						"the proxy does not accept the c") {
					p.t.Errorf("exit code %d, and the log is\n%s", c.ExitCode(), p.log(c))
				}
			}},
		} {
			t.Run(tunnel.user+"/"+end.name, func(t *testing.T) {
				p.t = t
				defer func() { p.t = outer }()
				end.do()
				if tunnel.killSwitch && !strings.HasSuffix(end.name, "down") {
					if !strings.Contains(p.snapshot(p.Client), "masquevpn-kill-closed") {
						t.Error("the kill switch is open")
					}
					p.down(p.Client, tunnel.user)
				}
				p.wantUnchanged(p.Client, before)
			})
		}
	}

	p.killProxy()
	if lab.Diff(beforeProxy, p.snapshot(p.Proxy)) == "" {
		t.Error("the killed proxy left nothing behind: this test would not notice a failed cleanup")
	}
	p.startProxy()
	p.stopProxy()
	p.wantUnchanged(p.Proxy, beforeProxy)
}
