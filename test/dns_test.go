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

// resolver is a pair whose client asks the router, and whose proxy hands out
// the target as nameserver.
type resolver struct {
	*pair
	outside *lab.Capture // queries that leave the client beside the tunnel
	file    string       // the client's configuration
}

// newResolver makes it. Both nameservers know the proxy's name and
// "inside.example"; the name is not in the client's files.
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

func (r *resolver) setResolver(content string) {
	r.t.Helper()
	check(r.t, r.Client.Do(func() error {
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			// as programs do, and not in the file of the machine
			return err
		}
		return os.WriteFile("/etc/resolv.conf", []byte(content), 0o644)
	}))
}

func (r *resolver) resolvConf() (content string) {
	r.t.Helper()
	check(r.t, r.Client.Do(func() error {
		b, err := os.ReadFile("/etc/resolv.conf")
		content = string(b)
		return err
	}))
	return content
}

// files describes the client's resolv.conf and what is beside it.
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

func (r *resolver) sameFiles(before []string) {
	r.t.Helper()
	if after := r.files(); !slices.Equal(before, after) {
		r.t.Errorf("before\n%q\nafter\n%q", before, after)
	}
}

// looksUp has the C library of the client look up a name.
func (r *resolver) looksUp(name string) {
	r.t.Helper()
	out, err := r.Client.Command(r.ctx, "getent", "ahostsv4", name).CombinedOutput()
	if err != nil || !strings.Contains(string(out), lab.TargetIPv4.String()) {
		r.t.Errorf("looking up %s: %v\n%s\n%s", name, err, out, r.resolvConf())
	}
}

// asked returns the names that were asked for outside the tunnel so far.
func (r *resolver) asked() (names []string) {
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

// asksForProxyOnly checks that nothing but the proxy's name was asked for
// outside, and that of the host's own nameserver.
func (r *resolver) asksForProxyOnly() {
	r.t.Helper()
	for _, q := range r.asked() {
		if q != lab.ProxyName+". at 198.51.100.1" {
			r.t.Errorf("asked outside the tunnel: %s", q)
		}
	}
}

func (r *resolver) applied(via string) {
	r.t.Helper()
	r.eventually("DNS is applied", func() bool {
		s := r.status(r.Client, "alice").DNS
		return s.Applied && s.Via == via && slices.Equal(s.Servers, []string{"192.0.2.2"})
	})
}

// While the tunnel is there, all names are asked for through it; the name of
// the proxy excepted, which is asked for as if there was no tunnel, also when
// that has died. In the end the host is as it was.
func TestDNSApplied(t *testing.T) {
	r := newResolver(t, options{})
	r.up(r.Client, r.file)
	r.applied("/etc/resolv.conf")
	connected := len(r.asked())
	if connected == 0 {
		t.Error("the proxy's name was not looked up: this test would notice nothing")
	}
	r.looksUp("inside.example")
	r.looksUp("inside") // the search domain completes it
	r.looksUp("outside.example.org")
	if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
		"192.0.2.2, search example (/etc/resolv.conf)") {
		t.Errorf("the status says\n%s", text)
	}
	if n := len(r.asked()); n != connected {
		t.Errorf("asked outside the tunnel: %v", r.asked()[connected:])
	}

	r.killProxy()
	r.startProxy()
	r.awaitReconnected(0)
	if n := len(r.asked()); n == connected {
		t.Error("the proxy's name was not looked up again")
	}
	r.applied("/etc/resolv.conf")
	r.looksUp("inside.example")
	r.asksForProxyOnly()

	// Another program has a new idea of the host's nameserver: that comes back,
	// and not what was before.
	const other = "nameserver 198.51.100.1\nsearch home.example\n"
	r.setResolver(other)
	r.eventually("the tunnel's servers are back", func() bool {
		return strings.Contains(r.resolvConf(), "nameserver 192.0.2.2\n")
	})
	r.looksUp("inside.example")
	r.asksForProxyOnly()
	r.down(r.Client, "alice")
	if got := r.resolvConf(); got != other {
		t.Errorf("after another program's change:\n%s", got)
	}

	// Killed, and started again.
	r.setResolver(lanResolver)
	before, host := r.files(), r.snapshot(r.Client)
	running := r.runClient(r.file)
	r.applied("/etc/resolv.conf")
	r.kill(running)
	if !strings.Contains(r.resolvConf(), "nameserver 192.0.2.2\n") {
		t.Error("nothing was left behind; this test would not notice that it is not removed")
	}
	r.up(r.Client, r.file)
	r.looksUp("inside.example")
	r.down(r.Client, "alice")
	r.sameFiles(before)
	r.wantUnchanged(r.Client, host)

	// Killed, and put right without another start.
	running = r.runClient(r.file)
	r.applied("/etc/resolv.conf")
	r.kill(running)
	r.down(r.Client, "alice")
	r.sameFiles(before)
	r.asksForProxyOnly()
	check(t, r.outside.Close())
}

// A resolv.conf that is mounted, as `ip netns exec` does, is written in place.
func TestDNSInNetworkNamespace(t *testing.T) {
	r := newResolver(t, options{})
	check(t, r.Client.Do(func() error {
		if err := os.WriteFile("/run/resolv.conf", []byte(lanResolver), 0o604); err != nil {
			return err
		}
		return syscall.Mount("/run/resolv.conf", "/etc/resolv.conf", "", syscall.MS_BIND, "")
	}))
	r.up(r.Client, r.file)
	r.applied("/etc/resolv.conf")
	r.looksUp("inside.example")
	r.asksForProxyOnly()
	r.down(r.Client, "alice")
	if got := r.resolvConf(); got != lanResolver {
		t.Errorf("afterwards\n%s", got)
	}
}

// Names are not sent where the tunnel does not lead: a server without a route
// is not used, and one with a route that asks to be asked about some names only
// is not used where the host cannot do so.
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
			r.eventually("it says why", func() bool {
				s := r.status(r.Client, "alice").DNS
				return !s.Applied && strings.Contains(s.Reason, test.reason)
			})
			if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
				"(not applied: ") {
				t.Errorf("the status says\n%s", text)
			}
			r.sameFiles(before)
			r.down(r.Client, "alice")
			r.sameFiles(before)
		})
	}
}

// Names that are asked of the LAN's router beside a tunnel for everything,
// because the proxy hands out no nameservers, are said in status and log, and
// held where that is wanted. When the tunnel is down, they are asked as before.
func TestDNSOutsideTunnel(t *testing.T) {
	for _, tc := range []struct {
		name, config string
		leaves       bool
		says         string
	}{
		{"said", "", true, "DNS queries to 192.168.77.1 leave outside the tunnel, in the clear (the proxy hands out no nameservers)"},
		{"held", "\n[dns]\noutside = false\n", false,
			"DNS queries to 192.168.77.1 are refused, because they would leave outside the tunnel"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &resolver{pair: newPair(t, options{client: tc.config})}
			r.givePrivateLAN()
			socket, err := r.Router.ListenPacket("udp", "192.168.77.1:53")
			check(t, err)
			dnstest.Serve(t, socket, lookUp)
			r.setResolver("nameserver 192.168.77.1\n")
			r.looksUp("before.example")
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
			if asked := r.asked(); (len(asked) > 0) != tc.leaves {
				t.Errorf("asked outside: %q", asked)
			}
			if text := r.must(r.Client, "masque-client", "status", "alice"); !strings.Contains(text,
				tc.says) {
				t.Errorf("the status does not say %q:\n%s", tc.says, text)
			}
			if log := r.clientLog("alice"); !strings.Contains(log, tc.says) {
				t.Errorf("the log does not say %q:\n%s", tc.says, log)
			}
			r.down(r.Client, "alice")
			r.looksUp("after.example")
			r.wantUnchanged(r.Client, before)
		})
	}
}

// The client shows what the proxy is configured to tell it about name
// resolution, and follows a reload.
func TestDNSStatus(t *testing.T) {
	p := newPair(t, options{proxy: `
[dns]
servers = ["10.77.0.1", "fd77::1"]
search = ["corp.example", "example"]
`})
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
	shows(connectip.DNSStatus{
		Servers: []string{"10.77.0.1", "fd77::1"}, Search: []string{"corp.example", "example"},
		Domains: []string{"."},
		Applied: true, Via: "/etc/resolv.conf",
	})
	text := p.must(p.Client, "masque-client", "status", "alice")
	if want := "10.77.0.1, fd77::1, search corp.example example (/etc/resolv.conf)"; !strings.Contains(text, want) {
		t.Errorf("the status does not say %q:\n%s", want, text)
	}
	p.editProxyConfig(`servers = ["10.77.0.1", "fd77::1"]`, `servers = ["192.0.2.53"]`)
	if out := p.must(p.Proxy, "masque-proxy", "reload"); strings.Contains(out, "restart") {
		t.Errorf("a change of [dns] needs a restart: %s", out)
	}
	shows(connectip.DNSStatus{
		Servers: []string{"192.0.2.53"}, Search: []string{"corp.example", "example"},
		Domains: []string{"."}, Applied: true, Via: "/etc/resolv.conf",
	})
	out, err := p.Client.Command(p.ctx, "cat", "/etc/resolv.conf").Output()
	check(t, err)
	if !strings.Contains(string(out), "\nnameserver 192.0.2.53\nsearch corp.example example\n") {
		t.Errorf("/etc/resolv.conf is\n%s", out)
	}
}
