package test

import (
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dnstest"
	"masquevpn/internal/lab"
)

// lanResolver is the resolv.conf of a host that asks its router.
const lanResolver = "# from DHCP\nnameserver 198.51.100.1\noptions edns0"

// resolver is a pair with name servers. The client asks its router, and the
// proxy pushes the target as name server.
type resolver struct {
	*pair
	outside *lab.Capture // queries that leave the client outside the tunnel
	file    string       // the client's configuration
}

// newResolver makes the hosts, starts the proxy and invites alice. Both name
// servers know the proxy's name and every other name. The client's hosts file
// does not have the proxy's name.
func newResolver(t *testing.T, o options) *resolver {
	o.proxy += "\n[dns]\nservers = [\"192.0.2.2\"]\nsearch = [\"example\"]\n"
	r := &resolver{pair: newPair(t, o)}
	for host, addr := range map[*lab.Host]string{r.Router: "198.51.100.1:53",
		r.Target: "192.0.2.2:53"} {
		socket, err := host.ListenPacket("udp", addr)
		check(t, err)
		dnstest.Serve(t, socket, lookUp)
	}
	r.setResolver(lanResolver)
	check(t, r.Client.Do(func() error {
		return os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644)
	}))
	r.file = r.invite("alice")
	var err error
	r.outside, err = r.Client.Capture("eth0", func(p lab.Packet) bool {
		udp, ok := p.TransportLayer().(*layers.UDP)
		return ok && p.Outgoing && udp.DstPort == 53
	})
	check(t, err)
	return r
}

// lookUp knows the proxy's IPv4 address, and the target's under every other
// name.
func lookUp(name string) ([]netip.Addr, error) {
	if name == lab.ProxyName {
		return []netip.Addr{lab.ProxyIPv4}, nil
	}
	return []netip.Addr{lab.TargetIPv4}, nil
}

// setResolver replaces the resolv.conf of the client.
func (r *resolver) setResolver(content string) {
	r.t.Helper()
	check(r.t, r.Client.Do(func() error {
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			// Programs replace the file. Writing it in place would change the
			// file of the machine.
			return err
		}
		return os.WriteFile("/etc/resolv.conf", []byte(content), 0o644)
	}))
}

// resolvConf returns the resolv.conf of the client.
func (r *resolver) resolvConf() (content string) {
	r.t.Helper()
	check(r.t, r.Client.Do(func() error {
		b, err := os.ReadFile("/etc/resolv.conf")
		content = string(b)
		return err
	}))
	return content
}

// files describes the resolv.conf of the client and its backups: names, modes,
// times and contents.
func (r *resolver) files() (all []string) {
	r.t.Helper()
	check(r.t, r.Client.Do(func() error {
		entries, err := os.ReadDir("/etc")
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), "resolv.conf") {
				info, err := e.Info()
				if err != nil {
					return err
				}
				b, err := os.ReadFile("/etc/" + e.Name())
				if err != nil {
					return err
				}
				all = append(all, e.Name()+" "+info.Mode().String()+" "+info.ModTime().String()+
					"\n"+string(b))
			}
		}
		return err
	}))
	return all
}

// wantFiles checks that files returns the same as before.
func (r *resolver) wantFiles(before []string) {
	r.t.Helper()
	if after := r.files(); !slices.Equal(before, after) {
		r.t.Errorf("before\n%q\nafter\n%q", before, after)
	}
}

// resolve checks that the C library of the client finds the IPv4 address of a
// name.
func (r *resolver) resolve(name string) {
	r.t.Helper()
	out, err := r.Client.Command(r.ctx, "getent", "ahostsv4", name).CombinedOutput()
	if err != nil || !strings.Contains(string(out), lab.TargetIPv4.String()) {
		r.t.Errorf("looking up %s: %v\n%s\n%s", name, err, out, r.resolvConf())
	}
}

// queriesOutside returns the queries that left the client outside the tunnel so
// far.
func (r *resolver) queriesOutside() (names []string) {
	for _, p := range r.outside.Packets() {
		var m dnsmessage.Message
		name := "?"
		if m.Unpack(p.TransportLayer().LayerPayload()) == nil && len(m.Questions) == 1 {
			name = m.Questions[0].Name.String()
		}
		names = append(names, name+" at "+p.NetworkLayer().NetworkFlow().Dst().String())
	}
	return names
}

// wantOnlyProxyQueries checks that all queries outside the tunnel are for the
// proxy's name, at the host's own name server.
func (r *resolver) wantOnlyProxyQueries() {
	r.t.Helper()
	for _, q := range r.queriesOutside() {
		if !strings.HasSuffix(q, lab.ProxyName+". at 198.51.100.1") {
			r.t.Errorf("query outside the tunnel: %s", q)
		}
	}
}

// awaitApplied waits until the status reports that the tunnel set the DNS of
// the host by the given means.
func (r *resolver) awaitApplied(via string) {
	r.t.Helper()
	r.eventually("DNS is applied", func() bool {
		s := r.status(r.Client, "alice").DNS
		return s.Applied && s.Via == via && slices.Equal(s.Servers, []string{"192.0.2.2"})
	})
}

// While the tunnel is up, all names are resolved through it. Only the proxy's
// name is resolved outside, also when the tunnel does not carry packets.
// Afterwards the host is as before.
func TestDNSApplied(t *testing.T) {
	r := newResolver(t, options{})
	r.up(r.Client, r.file)
	r.awaitApplied("/etc/resolv.conf")
	connected := len(r.queriesOutside())
	if connected == 0 {
		t.Error("no query for the proxy's name was captured: this test would not notice others")
	}
	r.resolve("inside.example")
	r.resolve("inside") // completed by the search domain
	r.resolve("outside.example.org")
	if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
		"192.0.2.2, search example (/etc/resolv.conf)") {
		t.Errorf("the status is\n%s", text)
	}
	if n := len(r.queriesOutside()); n != connected {
		t.Errorf("queries outside the tunnel: %v", r.queriesOutside()[connected:])
	}

	r.killProxy()
	r.startProxy()
	r.awaitReconnected(0)
	r.awaitApplied("/etc/resolv.conf")
	r.resolve("inside.example")
	r.wantOnlyProxyQueries()

	// Another program replaces the host's resolv.conf. The tunnel applies its
	// servers again and restores the new file in the end.
	const other = "nameserver 198.51.100.1\nsearch home.example\n"
	r.setResolver(other)
	r.eventually("the tunnel's servers are back", func() bool {
		return strings.Contains(r.resolvConf(), "nameserver 192.0.2.2\n")
	})
	r.resolve("inside.example")
	r.wantOnlyProxyQueries()
	r.down(r.Client, "alice")
	if got := r.resolvConf(); got != other {
		t.Errorf("after another program's change:\n%s", got)
	}

	// A client is killed and started again.
	r.setResolver(lanResolver)
	before, host := r.files(), r.snapshot(r.Client)
	running := r.runClient(r.file)
	r.awaitApplied("/etc/resolv.conf")
	r.kill(running)
	if !strings.Contains(r.resolvConf(), "nameserver 192.0.2.2\n") {
		t.Error("the killed client left nothing behind: this test would not notice a failed cleanup")
	}
	asked := len(r.queriesOutside())
	r.up(r.Client, r.file)
	if len(r.queriesOutside()) == asked {
		t.Error("the proxy's name was not looked up again")
	}
	r.resolve("inside.example")
	r.down(r.Client, "alice")
	r.wantFiles(before)
	r.wantUnchanged(r.Client, host)

	// A client is killed, and `down` restores the host.
	running = r.runClient(r.file)
	r.awaitApplied("/etc/resolv.conf")
	r.kill(running)
	r.down(r.Client, "alice")
	r.wantFiles(before)
	r.wantOnlyProxyQueries()
	check(t, r.outside.Close())
}

// A resolv.conf that is a mount point, as `ip netns exec` makes it, is written
// in place.
func TestDNSInNetworkNamespace(t *testing.T) {
	r := newResolver(t, options{})
	check(t, r.Client.Do(func() error {
		if err := os.WriteFile("/run/resolv.conf", []byte(lanResolver), 0o604); err != nil {
			return err
		}
		return syscall.Mount("/run/resolv.conf", "/etc/resolv.conf", "", syscall.MS_BIND, "")
	}))
	r.up(r.Client, r.file)
	r.awaitApplied("/etc/resolv.conf")
	r.resolve("inside.example")
	r.wantOnlyProxyQueries()
	r.down(r.Client, "alice")
	if got := r.resolvConf(); got != lanResolver {
		t.Errorf("afterwards\n%s", got)
	}
}

// DNS servers that no route into the tunnel reaches are not used. Neither are
// servers for some domains only, on a host that cannot ask different servers
// for different domains.
func TestDNSNotApplied(t *testing.T) {
	for name, test := range map[string]struct {
		o      options
		reason string
	}{
		"off": {options{client: "\n[dns]\nmode = \"off\"\n"}, "dns.mode is off"},
		"no route": {options{routes: `accept = ["203.0.113.0/24"]`},
			"no route into the tunnel leads to 192.0.2.2"},
		"excluded": {options{routes: `exclude = ["192.0.2.2/32"]`},
			"no route into the tunnel leads to 192.0.2.2"},
		"no routing": {options{routes: `install = false`},
			"no route into the tunnel leads to 192.0.2.2"},
		"split": {options{client: "\n[dns]\ndomains = [\"corp.example\"]\n"},
			"cannot ask servers about some names only"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newResolver(t, test.o)
			before := r.files()
			r.up(r.Client, r.file)
			r.eventually("the status has the reason", func() bool {
				s := r.status(r.Client, "alice").DNS
				return !s.Applied && strings.Contains(s.Reason, test.reason)
			})
			if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
				"(not applied: ") {
				t.Errorf("the status is\n%s", text)
			}
			r.wantFiles(before)
			r.down(r.Client, "alice")
			r.wantFiles(before)
		})
	}
}

// If the proxy pushes no name servers, queries to the router of the LAN leave a
// full tunnel. The status and the log report them, and dns.outside = false
// refuses them. After the tunnel they are sent as before.
func TestDNSOutsideTunnel(t *testing.T) {
	for _, tc := range []struct {
		name, config string
		leaves       bool
		want         string // in the status and the log
	}{
		{"reported", "", true, "DNS queries to 192.168.77.1 leave outside the tunnel, in the clear (the proxy hands out no nameservers)"},
		{"refused", "\n[dns]\noutside = false\n", false,
			"DNS queries to 192.168.77.1 are refused, because they would leave outside the tunnel"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &resolver{pair: newPair(t, options{client: tc.config})}
			r.givePrivateLAN()
			socket, err := r.Router.ListenPacket("udp", "192.168.77.1:53")
			check(t, err)
			dnstest.Serve(t, socket, lookUp)
			r.setResolver("nameserver 192.168.77.1\n")
			r.resolve("before.example")
			before := r.snapshot(r.Client)
			r.connect(r.Client, "alice")
			r.outside, err = r.Client.Capture("eth0", func(p lab.Packet) bool {
				udp, ok := p.TransportLayer().(*layers.UDP)
				return ok && p.Outgoing && udp.DstPort == 53
			})
			check(t, err)
			out, err := r.Client.Command(r.ctx, "getent", "ahostsv4",
				"secret.example").CombinedOutput()
			if found := err == nil; found != tc.leaves {
				t.Errorf("looking up a name: %v\n%s", err, out)
			}
			check(t, r.outside.Close())
			if asked := r.queriesOutside(); (len(asked) > 0) != tc.leaves {
				t.Errorf("queries outside the tunnel: %q", asked)
			}
			if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
				tc.want) {
				t.Errorf("the status does not contain %q:\n%s", tc.want, text)
			}
			if log := r.clientLog("alice"); !strings.Contains(log, tc.want) {
				t.Errorf("the log does not contain %q:\n%s", tc.want, log)
			}
			r.down(r.Client, "alice")
			r.resolve("after.example")
			r.wantUnchanged(r.Client, before)
		})
	}
}

// The status shows the DNS configuration that the proxy pushes, and follows a
// reload.
func TestDNSStatus(t *testing.T) {
	p := newPair(t, options{proxy: `
[dns]
servers = ["10.77.0.1", "fd77::1"]
search = ["corp.example", "example"]
`})
	p.connect(p.Client, "alice")
	wantDNS := func(want connectip.DNSStatus) {
		t.Helper()
		var got connectip.DNSStatus
		p.eventually("the status has the configuration", func() bool {
			got = p.status(p.Client, "alice").DNS
			got.NAT64 = nil // other tests compare it
			return reflect.DeepEqual(got, want)
		})
	}
	wantDNS(connectip.DNSStatus{
		Servers: []string{"10.77.0.1", "fd77::1"}, Search: []string{"corp.example", "example"},
		Domains: []string{"."},
		Applied: true, Via: "/etc/resolv.conf",
	})
	text := p.must(p.Client, "masque-client", "status", "alice")
	if want := "10.77.0.1, fd77::1, search corp.example example (/etc/resolv.conf)"; !strings.Contains(text, want) {
		t.Errorf("the status does not contain %q:\n%s", want, text)
	}
	p.editProxyConfig(`servers = ["10.77.0.1", "fd77::1"]`, `servers = ["192.0.2.53"]`)
	if out := p.must(p.Proxy, "masque-proxy", "reload"); strings.Contains(out, "restart") {
		t.Errorf("a change of [dns] needs a restart: %s", out)
	}
	wantDNS(connectip.DNSStatus{
		Servers: []string{"192.0.2.53"}, Search: []string{"corp.example", "example"},
		Domains: []string{"."}, Applied: true, Via: "/etc/resolv.conf",
	})
	out, err := p.Client.Command(p.ctx, "cat", "/etc/resolv.conf").Output()
	check(t, err)
	if !strings.Contains(string(out), "\nnameserver 192.0.2.53\nsearch corp.example example\n") {
		t.Errorf("/etc/resolv.conf is\n%s", out)
	}
}
