package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/lab"
)

// findResolved returns the path of systemd-resolved.
func findResolved(t *testing.T) string {
	t.Helper()
	const installed = "/lib/systemd/systemd-resolved"
	if _, err := os.Stat(installed); err == nil {
		return installed
	}
	unpacked, err := filepath.Abs("../bin/resolved" + installed)
	check(t, err)
	if _, err := os.Stat(unpacked); err != nil {
		t.Fatalf("%v; `make tools` unpacks it there", err)
	}
	return unpacked
}

// Bus name and object path of systemd-resolved.
const (
	resolveName = "org.freedesktop.resolve1"
	resolvePath = "/org/freedesktop/resolve1"
)

// systemBus is the configuration of a D-Bus daemon that allows everything.
const systemBus = `<busconfig>
<type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>
</busconfig>`

// newResolved returns a resolver whose client runs systemd-resolved, which asks
// the router. The resolv.conf of the client names systemd-resolved.
func newResolved(t *testing.T, o options) *resolver {
	t.Helper()
	program := findResolved(t)
	r := newResolver(t, o)
	check(t, r.Client.Do(func() error {
		// systemd-resolved switches to its own user. Map that user to root:
		// tests without root have no other user.
		passwd, err := os.ReadFile("/etc/passwd")
		if err != nil {
			return err
		}
		var users []byte
		for line := range strings.Lines(string(passwd)) {
			if !strings.HasPrefix(line, "systemd-resolve:") {
				users = append(users, line...)
			}
		}
		users = append(users, "systemd-resolve:x:0:0::/:/usr/sbin/nologin\n"...)
		if err := os.WriteFile("/etc/passwd", users, 0o644); err != nil {
			return err
		}
		for _, dir := range []string{"/run/dbus", "/run/systemd"} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
		}
		return os.WriteFile("/run/dbus.conf", []byte(systemBus), 0o644)
	}))
	bus := r.Client.Command(r.ctx, "dbus-daemon", "--nofork", "--config-file=/run/dbus.conf")
	check(t, bus.Start())
	r.eventually("the bus answers", func() bool { return r.bus("list") == nil })
	daemon := r.Client.Command(r.ctx, program)
	daemon.Env = append(os.Environ(), "SYSTEMD_LOG_TARGET=console")
	check(t, daemon.Start())
	r.eventually("systemd-resolved answers", func() bool {
		select {
		case <-daemon.Done():
			t.Fatalf("systemd-resolved ended:\n%s", r.log(daemon))
		default:
		}
		return r.bus("get-property", resolveName, resolvePath, resolveName+".Manager", "DNS") == nil
	})
	// The servers of the LAN belong to its interface, as with a DHCP client.
	link, err := r.Client.Command(r.ctx, "cat", "/sys/class/net/eth0/ifindex").Output()
	check(t, err)
	check(t, r.bus("call", resolveName, resolvePath, resolveName+".Manager", "SetLinkDNS",
		"ia(iay)",
		strings.TrimSpace(string(link)), "1", strconv.Itoa(syscall.AF_INET), "4", "198", "51",
		"100", "1"))
	check(t, r.Client.Do(func() error {
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			return err
		}
		return os.Symlink("/run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf")
	}))
	return r
}

// bus runs busctl.
func (r *resolver) bus(args ...string) error {
	return r.Client.Command(r.ctx, "busctl",
		append([]string{"--system", "--no-pager"}, args...)...).Run()
}

// resolvedState returns the servers and domains of systemd-resolved.
func (r *resolver) resolvedState() string {
	r.t.Helper()
	out, err := r.Client.Command(r.ctx, "busctl", "--system", "get-property",
		resolveName, resolvePath, resolveName+".Manager", "DNS", "Domains").Output()
	check(r.t, err)
	return string(out)
}

// query returns the name in a DNS query that a host sends. ok is false for
// other packets.
func query(p lab.Packet) (name string, ok bool) {
	udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	var m dnsmessage.Message
	if udp == nil || !p.Outgoing || m.Unpack(udp.Payload) != nil || m.Response ||
		len(m.Questions) != 1 {
		return "", false
	}
	return m.Questions[0].Name.String(), true
}

// With systemd-resolved, all names, or only those in the domains of the tunnel,
// are resolved through the tunnel and not outside. When the tunnel has ended,
// by whatever means, systemd-resolved is configured as before.
func TestResolved(t *testing.T) {
	r := newResolved(t, options{})
	before, state := r.snapshot(r.Client), r.resolvedState()
	r.resolve("before.example.org")
	if n := len(r.queriesOutside()); n == 0 {
		t.Fatal("no query was captured: this test would not notice others")
	}
	restored := func() {
		t.Helper()
		if got := r.resolvedState(); got != state {
			t.Errorf("systemd-resolved has\n%s\nbefore\n%s", got, state)
		}
		r.wantUnchanged(r.Client, before)
	}

	// outside returns the names in queries outside the tunnel since its last
	// call, except for the name of the proxy.
	seen := 0
	outside := func() (names []string) {
		t.Helper()
		packets := r.outside.Packets()
		for _, p := range packets[seen:] {
			if name, ok := query(p); ok && !strings.HasSuffix(name, lab.ProxyName+".") {
				names = append(names, name)
			}
		}
		seen = len(packets)
		return names
	}
	outside()
	run := func() *lab.Cmd {
		t.Helper()
		c := r.runClient(r.file)
		r.awaitApplied("systemd-resolved")
		return c
	}
	for _, tc := range []struct {
		name, config    string
		inside, outside []string
	}{
		{"all names", "", []string{"www.example.org", "inside.example", "host.corp.example"}, nil},
		{
			// The server of the LAN has a public address, which a full tunnel
			// would take.
			"some names", "\n[routes]\nlan = \"all\"\n\n[dns]\nsearch = [\"corp.example\"]\ndomains = [\"corp.example\", \"internal\"]\n",
			[]string{"host.corp.example", "db.internal"},
			[]string{"www.example.org", "internal.example.org"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			appendTo(t, r.file, tc.config)
			resolves := func(when string) {
				t.Helper()
				check(t, r.bus("call", resolveName, resolvePath, resolveName+".Manager",
					"FlushCaches"))
				for _, name := range tc.inside {
					r.resolve(name)
				}
				if got := outside(); len(got) > 0 {
					t.Errorf("%s: queries outside the tunnel for %v", when, got)
				}
				for _, name := range tc.outside {
					r.resolve(name)
					if got := outside(); len(got) == 0 || got[0] != name+"." {
						t.Errorf("%s: queries outside the tunnel for %v, want %s", when, got, name)
					}
				}
			}
			r.up(r.Client, r.file)
			r.awaitApplied("systemd-resolved")
			inside, err := r.Client.Capture("masque0", func(p lab.Packet) bool {
				_, ok := query(p)
				return ok
			})
			check(t, err)
			resolves("up")
			check(t, inside.Close())
			names := make(map[string]bool)
			for _, p := range inside.Packets() {
				name, _ := query(p)
				names[strings.TrimSuffix(name, ".")] = true
			}
			for _, name := range tc.inside {
				if !names[name] {
					t.Errorf("no query for %s in the tunnel", name)
				}
			}
			for _, name := range tc.outside {
				if names[name] {
					t.Errorf("query for %s in the tunnel", name)
				}
			}
			text := r.must(r.Client, "masque-client", "status", "alice")
			if want := "(systemd-resolved)"; !strings.Contains(text, want) {
				t.Errorf("the status does not contain %s:\n%s", want, text)
			}

			r.killProxy()
			r.startProxy()
			r.ping(r.Client, lab.TargetIPv4)
			r.awaitApplied("systemd-resolved")
			resolves("connected again")
			r.down(r.Client, "alice")
			restored()

			// The proxy's name is resolved outside the tunnel while the
			// resolver still asks the servers of a dead one.
			c := run()
			r.kill(c)
			before := len(r.queriesOutside())
			r.up(r.Client, r.file)
			r.awaitApplied("systemd-resolved")
			if len(r.queriesOutside()) == before {
				t.Error("the proxy's name was not looked up again")
			}
			resolves("started again")
			r.down(r.Client, "alice")
			restored()

			c = run()
			r.kill(c)
			r.down(r.Client, "alice")
			restored()
			outside()
			r.resolve("afterwards.example.org")
			if got := outside(); fmt.Sprint(got) == "[]" {
				t.Error("no query after the tunnel has ended")
			}
		})
	}
}
