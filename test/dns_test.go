package test

import (
	"reflect"
	"strings"
	"testing"

	"masquevpn/internal/connectip"
)

// The client shows what the proxy is configured to tell it about name resolution, follows a reload, and leaves the host's
// resolver alone.
func TestDNSIsShown(t *testing.T) {
	p := newPair(t, options{proxy: `
[dns]
servers = ["10.77.0.1", "fd77::1"]
search = ["corp.example", "example"]
`})
	resolvConf := func() string {
		out, err := p.Client.Command(p.ctx, "cat", "/etc/resolv.conf").Output()
		check(t, err)
		return string(out)
	}
	before := resolvConf()
	p.connect(p.Client, "alice")
	shows := func(want connectip.DNSStatus) {
		t.Helper()
		var got connectip.DNSStatus
		p.eventually("the client shows it", func() bool {
			got = p.status(p.Client, "alice").DNS
			got.NAT64 = nil // compared elsewhere
			return reflect.DeepEqual(got, want)
		})
	}
	shows(connectip.DNSStatus{Servers: []string{"10.77.0.1", "fd77::1"}, Search: []string{"corp.example", "example"}, Domains: []string{"."}})
	text := p.must(p.Client, "masque-client", "status", "alice")
	if want := "10.77.0.1, fd77::1, search corp.example example (not applied)"; !strings.Contains(text, want) {
		t.Errorf("the status does not say %q:\n%s", want, text)
	}
	p.editProxyConfig(`servers = ["10.77.0.1", "fd77::1"]`, `servers = ["192.0.2.53"]`)
	if out := p.must(p.Proxy, "masque-proxy", "reload"); strings.Contains(out, "restart") {
		t.Errorf("a change of [dns] needs a restart: %s", out)
	}
	shows(connectip.DNSStatus{Servers: []string{"192.0.2.53"}, Search: []string{"corp.example", "example"}, Domains: []string{"."}})
	if after := resolvConf(); after != before {
		t.Errorf("/etc/resolv.conf was\n%s\nand is\n%s", before, after)
	}
}
