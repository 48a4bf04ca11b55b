package packaging

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	install = "apt-get install -y $(ls -v /opt/packages/masquevpn_*.deb | head -1)"
	upgrade = "apt-get install -y /opt/packages/masquevpn_9999_*.deb"
)

// network gives the client a host of its own: a network namespace, connected to the machine, which is the proxy's.
const network = `set -e
ip link set lo up
ip netns add client
ip link add eth0 type veth peer name eth0 netns client
ip addr add 10.9.0.1/24 dev eth0
ip link set eth0 up
ip -n client addr add 10.9.0.2/24 dev eth0
ip -n client link set eth0 up
ip -n client link set lo up
echo "10.9.0.1 vpn.example.org" >> /etc/hosts
mkdir -p /etc/systemd/system/masque-client@.service.d /etc/systemd/system/masque-proxy.service.d
printf '[Service]\nNetworkNamespacePath=/run/netns/client\n' > /etc/systemd/system/masque-client@.service.d/test.conf
printf '[Service]\nWatchdogSec=3s\n' > /etc/systemd/system/masque-proxy.service.d/test.conf
`

// TestService is the life of a proxy and a client as services.
func TestService(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.do(network)
	m.do(install)
	m.is("stat -c '%U:%G %a' /etc/masque", "root:masque 2750")
	m.is("systemctl is-enabled masque-proxy.socket masque-proxy.service masque-client@alice.service || true", "disabled\ndisabled\ndisabled")

	units := "/usr/lib/systemd/system/masque-proxy.service /usr/lib/systemd/system/masque-proxy.socket /usr/lib/systemd/system/masque-client@.service"
	m.is("systemd-analyze verify --man=no "+units, "")
	level := regexp.MustCompile(`Overall exposure level for \S+: (\S+)`)
	for _, unit := range []string{"masque-proxy.service", "masque-client@.service"} {
		found := level.FindStringSubmatch(m.do("systemd-analyze security --no-pager --offline=true /usr/lib/systemd/system/" + unit))
		if found == nil {
			t.Fatalf("%s: no exposure level", unit)
		}
		if exposure, err := strconv.ParseFloat(found[1], 64); err != nil || exposure >= 3.0 {
			t.Errorf("%s: exposure level %s, want below 3.0", unit, found[1])
		}
	}

	// A file that the service may not read is not tried again and again.
	m.do("masque-proxy init --name vpn.example.org /etc/masque")
	m.do("masque-proxy invite alice -c /etc/masque/proxy.toml -o /root/alice.toml")
	m.do("cp /root/alice.toml /etc/masque")
	m.fails(1, "systemctl start masque-client@alice")
	m.is("systemctl show -P ExecMainStatus masque-client@alice", "7")
	m.do("install -g masque -m 640 /root/alice.toml /etc/masque/alice.toml")

	// The client's first packet starts the proxy.
	m.do("systemctl start masque-proxy.socket")
	m.is("systemctl is-active masque-proxy || true", "inactive")
	m.do("systemctl start masque-client@alice")
	m.do("masque-client wait alice --for connected --timeout 30s")
	const ping = "ip netns exec client ping -n -c 1 -W 10 "
	m.do(ping + "10.77.0.1")
	m.do(ping + "fd77::1")
	m.is("cat /proc/sys/net/ipv4/ip_forward", "1")
	m.until("systemd knows of the session", func() bool {
		return m.do("systemctl show -P StatusText masque-proxy") == "1 sessions, listening on [::]:443"
	})
	m.is("systemctl show -P StatusText masque-client@alice", "connected")
	const get = `bash -c 'exec 3<>/dev/tcp/127.0.0.1/9484; printf "GET %s HTTP/1.0\r\n\r\n" >&3; cat <&3'`
	for path, want := range map[string]string{"/readyz": "\r\nok", "/metrics": "\nmasque_sessions 1\n"} {
		if out := m.do(fmt.Sprintf(get, path)); !strings.Contains(out, want) {
			t.Errorf("GET %s: want %q in\n%s", path, want, out)
		}
	}
	m.do("test -s /usr/share/doc/masquevpn/grafana/masque.json -a -s /usr/share/doc/masquevpn/prometheus/masque.rules.yml")

	netAdmin, bind := uint64(1)<<12, uint64(1)<<10
	for unit, want := range map[string]uint64{"masque-proxy": netAdmin | bind, "masque-client@alice": netAdmin} {
		status := m.do("cat /proc/" + m.mainPID(unit) + "/status")
		for _, field := range []string{"CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if line := fmt.Sprintf("%s:\t%016x\n", field, want); !strings.Contains(status, line) {
				t.Errorf("%s: want %q in\n%s", unit, line, status)
			}
		}
		uid := m.do("id -u masque")
		if !strings.Contains(status, "Uid:\t"+strings.Join([]string{uid, uid, uid, uid}, "\t")+"\n") || !strings.Contains(status, "Seccomp:\t2\n") {
			t.Errorf("%s: not user %s with a filter of system calls:\n%s", unit, uid, status)
		}
	}
	for _, line := range []string{"masque-client status alice", "masque-proxy status", "masque-proxy reload"} {
		m.do(line)
		m.fails(7, "setpriv --reuid=65534 --regid=65534 --clear-groups "+line)
	}

	m.do("systemctl reload masque-proxy")
	m.do("cp /etc/masque/proxy.toml /root/ && echo nonsense >> /etc/masque/proxy.toml")
	m.fails(1, "systemctl reload masque-proxy")
	m.do("cp /root/proxy.toml /etc/masque/proxy.toml && systemctl reload masque-proxy")
	m.is("systemctl is-active masque-proxy", "active")

	// A proxy that hangs is ended and started again, without anybody's help.
	hung := m.mainPID("masque-proxy")
	m.do("kill -STOP " + hung)
	m.until("another proxy runs", func() bool { pid := m.mainPID("masque-proxy"); return pid != hung && pid != "0" })
	m.until("packets flow again", func() bool { return m.command(ping+"10.77.0.1").Run() == nil })

	before := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice")
	if out := m.do(upgrade); !strings.Contains(out, "systemctl restart masque-client@alice.service masque-proxy.service") {
		t.Errorf("the upgrade says\n%s", out)
	}
	if after := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice"); after != before {
		t.Errorf("processes before the upgrade %s, after it %s", before, after)
	}
	m.do(ping + "10.77.0.1")
	m.do("systemctl restart masque-client@alice.service masque-proxy.service")
	m.do("masque-client wait alice --for connected --timeout 30s")
	m.do(ping + "10.77.0.1")

	m.do("systemctl enable masque-proxy.socket masque-client@alice")
	m.do("apt-get remove -y masquevpn")
	m.is("systemctl is-active masque-proxy masque-proxy.socket masque-client@alice || true", "inactive\ninactive\ninactive")
	m.is("cat /proc/sys/net/ipv4/ip_forward", "0")
	m.is("ip -n client -o link | grep -c masque || true", "0")
	m.is("nft list tables", "")
	m.is("ls /etc/masque", "alice.toml\nca.crt\nca.key\nproxy.crt\nproxy.key\nproxy.toml\nusers.toml")
	m.do("test -d /var/lib/masque")
	if out := m.do("apt-get purge -y masquevpn"); !strings.Contains(out, "/etc/masque holds keys") {
		t.Errorf("purge says\n%s", out)
	}
	m.is("ls -d /var/lib/masque /run/masque /usr/bin/masque-* /etc/systemd/system/*.wants/masque-* 2>/dev/null || true", "")

	m.do("tar -C /etc -czf /root/masque.tar.gz masque && rm -r /etc/masque")
	m.do(install)
	m.do("tar -C /etc -xzf /root/masque.tar.gz")
	m.do("systemctl start masque-proxy")
	m.do("rm -r /etc/masque/*")
	m.do("apt-get purge -y masquevpn")
	m.fails(1, "test -d /etc/masque")
}

// resolvedPolicy is what systemd-resolved asks polkit about, as far as it matters here.
const resolvedPolicy = `<?xml version="1.0"?>
<!DOCTYPE policyconfig PUBLIC "-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN" "http://www.freedesktop.org/standards/PolicyKit/1/policyconfig.dtd">
<policyconfig>
  <action id="org.freedesktop.resolve1.set-dns-servers"><description>x</description><message>x</message></action>
  <action id="org.freedesktop.resolve1.register-service"><description>x</description><message>x</message></action>
</policyconfig>
`

// TestResolved: the user of the services may set the DNS of interfaces, and nothing else.
func TestResolved(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.do("mkdir -p /usr/share/polkit-1/actions && cat > /usr/share/polkit-1/actions/org.freedesktop.resolve1.policy <<'END'\n" + resolvedPolicy + "END")
	m.do(install)
	m.do("systemctl start dbus polkit")
	for _, test := range []struct {
		user, action string
		code         int
	}{
		{"masque", "set-dns-servers", 0},
		{"masque", "register-service", 1},
		{"nobody", "set-dns-servers", 1},
	} {
		m.fails(test.code, "setpriv --reuid="+test.user+" --clear-groups sh -c 'pkcheck --process $$ --action-id org.freedesktop.resolve1."+test.action+"'")
	}
}

// TestByHand: removal ends a tunnel that was started by hand.
func TestByHand(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.do(network)
	m.do(install)
	m.do("masque-proxy init --name vpn.example.org /etc/masque && masque-proxy invite alice -c /etc/masque/proxy.toml -o /root/alice.toml")
	m.do("systemctl start masque-proxy")
	m.do("ip netns exec client masque-client up /root/alice.toml --wait")
	m.do("masque-client status alice")
	m.do("systemctl restart masque-proxy") // the files in /run/masque may have either owner
	m.do("apt-get remove -y masquevpn")
	m.is("ip -n client -o link | grep -c masque || true", "0")
	m.is("ls /run/masque", "alice.log")
}

func (m *machine) mainPID(unit string) string {
	m.Helper()
	return m.do("systemctl show -P MainPID " + unit)
}

// TestSameFiles: the rpm has what the deb has.
func TestSameFiles(t *testing.T) {
	list := func(pattern, name string, args ...string) []string {
		t.Helper()
		files, err := filepath.Glob("../dist/" + pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("no %s in dist: %v", pattern, err)
		}
		out, err := exec.Command(name, append(args, files[0])...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	var deb, rpm []string
	for _, line := range list("*.deb", "dpkg-deb", "--contents") {
		fields := strings.Fields(line)
		if path := strings.TrimPrefix(fields[len(fields)-1], "."); !strings.HasSuffix(path, "/") {
			deb = append(deb, strings.Replace(path, "/zsh/vendor-completions/", "/zsh/site-functions/", 1))
		}
	}
	for _, path := range list("*.rpm", "rpm", "-qp", "--queryformat", "[%{FILEMODES:perms} %{FILENAMES}\n]") {
		if mode, path, _ := strings.Cut(path, " "); !strings.HasPrefix(mode, "d") {
			rpm = append(rpm, path)
		}
	}
	slices.Sort(deb)
	slices.Sort(rpm)
	if !slices.Equal(deb, rpm) {
		t.Errorf("the deb has\n%s\nthe rpm\n%s", strings.Join(deb, "\n"), strings.Join(rpm, "\n"))
	}
	for _, want := range []string{"/usr/bin/masque-proxy", "/usr/lib/systemd/system/masque-client@.service", "/usr/share/man/man1/masque-client-up.1.gz", "/usr/share/bash-completion/completions/masque-proxy"} {
		if !slices.Contains(deb, want) {
			t.Errorf("no %s in the packages", want)
		}
	}
	scripts := strings.Join(list("*.rpm", "rpm", "-qp", "--scripts"), "\n")
	for _, want := range []string{"postinstall scriptlet", "preuninstall scriptlet", "postuninstall scriptlet"} {
		if !strings.Contains(scripts, want) {
			t.Errorf("the rpm has no %s:\n%s", want, scripts)
		}
	}
}
