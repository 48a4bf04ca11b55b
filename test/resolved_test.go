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

// findResolved returns where systemd-resolved is.
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

// How systemd-resolved is called on the bus.
const (
	resolveName = "org.freedesktop.resolve1"
	resolvePath = "/org/freedesktop/resolve1"
)

// systemBus is the configuration of a D-Bus that lets everybody do everything.
const systemBus = `<busconfig>
<type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>
</busconfig>`

// newResolved is a resolver whose client runs systemd-resolved, which asks the
// router, and is asked by whoever reads resolv.conf.
func newResolved(t *testing.T, o options) *resolver {
	t.Helper()
	program := findResolved(t)
	r := newResolver(t, o)
	check(t, r.Client.Do(func() error {
		// It becomes a user of its own. That is root here: tests that run
		// without root have no other.
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
	r.eventually("the bus is there", func() bool { return r.bus("list") == nil })
	daemon := r.Client.Command(r.ctx, program)
	daemon.Env = append(os.Environ(), "SYSTEMD_LOG_TARGET=console")
	check(t, daemon.Start())
	r.eventually("systemd-resolved is there", func() bool {
		select {
		case <-daemon.Done():
			t.Fatalf("systemd-resolved ended:\n%s", r.log(daemon))
		default:
		}
		return r.bus("get-property", resolveName, resolvePath, resolveName+".Manager", "DNS") == nil
	})
	// As a DHCP client has it: the servers of the LAN are those of its
	// interface.
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

// told returns what systemd-resolved knows of servers and domains.
func (r *resolver) told() string {
	r.t.Helper()
	out, err := r.Client.Command(r.ctx, "busctl", "--system", "get-property",
		resolveName, resolvePath, resolveName+".Manager", "DNS", "Domains").Output()
	check(r.t, err)
	return string(out)
}

// query is one that a host has sent.
func query(p lab.Packet) (name string, ok bool) {
	udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	var m dnsmessage.Message
	if udp == nil || !p.Outgoing || m.Unpack(udp.Payload) != nil || m.Response ||
		len(m.Questions) != 1 {
		return "", false
	}
	return m.Questions[0].Name.String(), true
}

// With systemd-resolved, all names or only those of the tunnel are asked for in
// the tunnel, and none of those outside; and it knows what it knew when the
// tunnel is gone, however that ends.
func TestResolved(t *testing.T) {
	r := newResolved(t, options{})
	before, told := r.snapshot(r.Client), r.told()
	r.looksUp("before.example.org")
	if n := len(r.asked()); n == 0 {
		t.Fatal("nothing was asked: this test would notice nothing")
	}
	restored := func() {
		t.Helper()
		if got := r.told(); got != told {
			t.Errorf("systemd-resolved knows\n%s\nbefore\n%s", got, told)
		}
		r.wantUnchanged(r.Client, before)
	}

	// outside returns the names that were asked for outside since it was last
	// called, the proxy's excepted.
	seen := 0
	outside := func() (names []string) {
		t.Helper()
		packets := r.outside.Packets()
		for _, p := range packets[seen:] {
			if name, ok := query(p); ok && !strings.HasPrefix(name, lab.ProxyName) {
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
		r.applied("systemd-resolved")
		return c
	}
	for _, tc := range []struct {
		name, config    string
		inside, outside []string
	}{
		{"all names", "", []string{"www.example.org", "inside.example", "host.corp.example"}, nil},
		{
			// The server outside is on a public network, which would be in the
			// tunnel.
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
					r.looksUp(name)
				}
				if got := outside(); len(got) > 0 {
					t.Errorf("%s: asked outside the tunnel for %v", when, got)
				}
				for _, name := range tc.outside {
					r.looksUp(name)
					if got := outside(); len(got) == 0 || got[0] != name+"." {
						t.Errorf("%s: asked outside the tunnel for %v, want %s", when, got, name)
					}
				}
			}
			r.up(r.Client, r.file)
			r.applied("systemd-resolved")
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
					t.Errorf("%s was not asked for in the tunnel", name)
				}
			}
			for _, name := range tc.outside {
				if names[name] {
					t.Errorf("%s was asked for in the tunnel", name)
				}
			}
			text := r.must(r.Client, "masque-client", "status", "alice")
			if want := "(systemd-resolved)"; !strings.Contains(text, want) {
				t.Errorf("the status does not say %s:\n%s", want, text)
			}

			// The proxy's own name is looked up outside, when the tunnel that
			// all others go to is dead.
			before := len(r.asked())
			r.killProxy()
			r.startProxy()
			r.ping(r.Client, lab.TargetIPv4)
			r.applied("systemd-resolved")
			if len(r.asked()) == before {
				t.Error("the proxy's name was not looked up again")
			}
			resolves("connected again")
			r.down(r.Client, "alice")
			restored()

			c := run()
			r.kill(c)
			r.up(r.Client, r.file)
			r.applied("systemd-resolved")
			resolves("started again")
			r.down(r.Client, "alice")
			restored()

			c = run()
			r.kill(c)
			r.down(r.Client, "alice")
			restored()
			outside()
			r.looksUp("afterwards.example.org")
			if got := outside(); fmt.Sprint(got) == "[]" {
				t.Error("afterwards nobody is asked")
			}
		})
	}
}
