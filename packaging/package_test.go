package packaging

import (
	"bytes"
	"fmt"
	"os"
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

// apart runs one service in the network namespace "other", which is connected
// to the machine. The machine's hosts file has addr as the proxy's address.
// Both services log at level debug.
func (m *machine) apart(unit, addr string) {
	m.Helper()
	m.do(`set -e
ip link set lo up
ip netns add other
ip link add eth0 type veth peer name eth0 netns other
for s in all default eth0; do echo 0 > /proc/sys/net/ipv6/conf/$s/accept_dad; done
ip netns exec other sh -c 'for s in all default eth0; do echo 0 > /proc/sys/net/ipv6/conf/$s/accept_dad; done'
ip addr add 10.9.0.1/24 dev eth0
ip link set eth0 up
ip -n other addr add 10.9.0.2/24 dev eth0
ip -n other link set eth0 up
ip -n other link set lo up
echo "` + addr + ` vpn.example.org" >> /etc/hosts
cd /etc/systemd/system
mkdir -p masque-client@.service.d masque-proxy.service.d ` + unit + `.d
printf '[Service]\nNetworkNamespacePath=/run/netns/other\n' > ` + unit + `.d/apart.conf
printf '[Service]\nExecStart=\nExecStart=/usr/bin/masque-client --log-level debug run -c /etc/masque/%%i.toml\n' > masque-client@.service.d/test.conf
printf '[Service]\nExecStart=\nExecStart=/usr/bin/masque-proxy --log-level debug run -c /etc/masque/proxy.toml\nWatchdogSec=5s\n' > masque-proxy.service.d/test.conf`)
	m.until("both ends of the link have their addresses", func() bool {
		return strings.Count(m.do("ip -o addr show dev eth0; "+other+"ip -o addr show dev eth0"),
			"inet6 fe80:") == 2
	})
}

// other runs a command in the network namespace "other".
const other = "ip netns exec other "

// network returns the network configuration of the machine and of the namespace
// "other".
func (m *machine) network() string {
	m.Helper()
	const state = `ip -o addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; nft list ruleset;
cd /proc/sys/net; grep -r . ipv4/ip_forward ipv4/conf ipv6/conf 2>/dev/null | sort`
	return m.do("for enter in '' '" + other + "'; do $enter sh -c '" + state +
		"'; done; cat /etc/resolv.conf")
}

// files makes the files of a proxy and of its user alice for the services.
const files = `set -e
masque-proxy init --name vpn.example.org /etc/masque
masque-proxy invite alice -c /etc/masque/proxy.toml -o /etc/masque/alice.toml
`

// A proxy and a client are installed and run as services, upgraded, removed and
// purged.
func TestService(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apart("masque-client@.service", "10.9.0.1")
	m.do(install)
	m.is("getent passwd masque | cut -d: -f 1,6,7", "masque:/var/lib/masque:/usr/sbin/nologin")
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

	// systemd does not restart a service that cannot read its configuration.
	m.do("masque-proxy init --name vpn.example.org /etc/masque")
	m.do("masque-proxy invite alice -c /etc/masque/proxy.toml -o /root/alice.toml")
	m.do("cp /root/alice.toml /etc/masque")
	m.fails(1, "systemctl start masque-client@alice")
	m.is("systemctl show -P ExecMainStatus masque-client@alice", "7")
	m.do("install -g masque -m 640 /root/alice.toml /etc/masque/alice.toml")

	// Socket activation: the client's first packet starts the proxy.
	fresh := m.network()
	m.do("systemctl start masque-proxy.socket")
	m.is("systemctl is-active masque-proxy || true", "inactive")
	m.do("systemctl start masque-client@alice")
	m.do("masque-client wait alice --for connected --timeout 30s")
	const ping = other + "ping -n -c 1 -W 10 "
	m.do(ping + "10.77.0.1")
	m.do(ping + "fd77::1")
	m.is("cat /proc/sys/net/ipv4/ip_forward", "1")
	m.until("systemd shows the session", func() bool {
		return m.do("systemctl show -P StatusText masque-proxy") == "1 sessions, listening on [::]:443"
	})
	m.is("systemctl show -P StatusText masque-client@alice", "connected")
	const get = `bash -c 'exec 3<>/dev/tcp/127.0.0.1/9484; printf "GET %s HTTP/1.0\r\n\r\n" >&3; cat <&3'`
	for path, want := range map[string]string{"/readyz": "\r\nok",
		"/metrics": "\nmasque_sessions 1\n"} {
		if out := m.do(fmt.Sprintf(get, path)); !strings.Contains(out, want) {
			t.Errorf("GET %s: want %q in\n%s", path, want, out)
		}
	}
	m.do("test -s /usr/share/doc/masquevpn/copyright -a -s /usr/share/doc/masquevpn/CHANGELOG.md")
	m.do("test -s /usr/share/doc/masquevpn/docs/reference/client.toml")
	m.do("test -s /usr/share/doc/masquevpn/grafana/masque.json -a -s /usr/share/doc/masquevpn/prometheus/masque.rules.yml")

	netAdmin, bind := uint64(1)<<12, uint64(1)<<10
	for unit, want := range map[string]uint64{"masque-proxy": netAdmin | bind,
		"masque-client@alice": netAdmin} {
		status := m.do("cat /proc/" + m.mainPID(unit) + "/status")
		for _, field := range []string{"CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if line := fmt.Sprintf("%s:\t%016x\n", field, want); !strings.Contains(status, line) {
				t.Errorf("%s: want %q in\n%s", unit, line, status)
			}
		}
		uid := m.do("id -u masque")
		if !strings.Contains(status,
			"Uid:\t"+strings.Join([]string{uid, uid, uid, uid}, "\t")+"\n") ||
			!strings.Contains(status, "Seccomp:\t2\n") {
			t.Errorf("%s: want user %s and a system call filter:\n%s", unit, uid, status)
		}
		// The files of an undumpable process belong to root (proc(5)). Other
		// processes of the user cannot read its memory.
		m.is("stat -c %U /proc/"+m.mainPID(unit)+"/environ", "root")
	}
	m.is("stat -c '%U:%G %a' /run/masque /var/lib/masque", "masque:masque 750\nmasque:masque 750")
	m.noSecrets()
	for _, line := range []string{"masque-client status alice", "masque-proxy status",
		"masque-proxy reload"} {
		m.do(line)
		m.fails(7, "setpriv --reuid=65534 --regid=65534 --clear-groups "+line)
	}

	m.do("systemctl reload masque-proxy")
	m.do("cp /etc/masque/proxy.toml /root/ && echo nonsense >> /etc/masque/proxy.toml")
	m.fails(1, "systemctl reload masque-proxy")
	m.do("cp /root/proxy.toml /etc/masque/proxy.toml && systemctl reload masque-proxy")
	m.is("systemctl is-active masque-proxy", "active")

	// The watchdog kills and restarts a proxy that hangs.
	hung := m.mainPID("masque-proxy")
	m.do("kill -STOP " + hung)
	m.until("the proxy was restarted", func() bool {
		pid := m.mainPID("masque-proxy")
		return pid != hung && pid != "0"
	})
	m.until("packets flow again", func() bool { return m.command(ping+"10.77.0.1").Run() == nil })

	// An upgrade interrupts no session.
	pids := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice")
	pinging := m.command("echo $$ > /run/ping; exec " + other + "ping -n -i 0.2 10.77.0.1")
	var answers strings.Builder
	pinging.Stdout = &answers
	if err := pinging.Start(); err != nil {
		t.Fatal(err)
	}
	if out := m.do(upgrade); !strings.Contains(out,
		"systemctl restart masque-client@alice.service masque-proxy.service") {
		t.Errorf("the upgrade prints\n%s", out)
	}
	m.do("kill -INT $(cat /run/ping)")
	if err := pinging.Wait(); err != nil || !strings.Contains(answers.String(), " 0% packet loss") {
		t.Errorf("ping during the upgrade: %v\n%s", err, &answers)
	}
	running := func(deleted string) {
		t.Helper()
		for _, program := range []string{"proxy", "client@alice"} {
			name, _, _ := strings.Cut(program, "@")
			m.is("readlink /proc/"+m.mainPID("masque-"+program)+"/exe",
				"/usr/bin/masque-"+name+deleted)
		}
	}
	running(" (deleted)")
	if now := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice"); now != pids {
		t.Errorf("processes before the upgrade %s, after it %s", pids, now)
	}
	m.do("systemctl restart masque-client@alice.service masque-proxy.service")
	m.do("masque-client wait alice --for connected --timeout 30s")
	m.do(ping + "10.77.0.1")
	running("")

	m.do("systemctl enable masque-proxy.socket masque-client@alice")
	m.do("apt-get remove -y masquevpn")
	m.is("systemctl is-active masque-proxy masque-proxy.socket masque-client@alice || true",
		"inactive\ninactive\ninactive")
	if now := m.network(); now != fresh {
		t.Errorf("before\n%s\nafter removal\n%s", fresh, now)
	}
	m.is("ls /etc/masque", "alice.toml\nca.crt\nca.key\nproxy.crt\nproxy.key\nproxy.toml\nusers.toml")
	m.do("test -d /var/lib/masque")
	if out := m.do("apt-get purge -y masquevpn"); !strings.Contains(out, "/etc/masque holds keys") {
		t.Errorf("purge prints\n%s", out)
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

// resolvedPolicy is a part of the polkit policy of systemd-resolved.
const resolvedPolicy = `<?xml version="1.0"?>
<!DOCTYPE policyconfig PUBLIC "-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN" "http://www.freedesktop.org/standards/PolicyKit/1/policyconfig.dtd">
<policyconfig>
  <action id="org.freedesktop.resolve1.set-dns-servers"><description>x</description><message>x</message></action>
  <action id="org.freedesktop.resolve1.register-service"><description>x</description><message>x</message></action>
</policyconfig>
`

// polkit lets the user of the services set the DNS of interfaces, and nothing
// else of systemd-resolved.
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
		t.Run(test.user+"/"+test.action, func(t *testing.T) {
			m.fails(test.code, "setpriv --reuid="+test.user+
				" --clear-groups sh -c 'pkcheck --process $$ --action-id org.freedesktop.resolve1."+
				test.action+"'")
		})
	}
}

// Removing the package ends a tunnel that was started with `up`.
func TestStartedByHand(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apart("masque-client@.service", "10.9.0.1")
	m.do(install)
	m.do("masque-proxy init --name vpn.example.org /etc/masque && masque-proxy invite alice -c /etc/masque/proxy.toml -o /root/alice.toml")
	m.do("systemctl start masque-proxy")
	m.do(other + "masque-client up /root/alice.toml --wait --log-level debug")
	m.do("masque-client status alice")
	m.noSecrets()
	m.do("systemctl restart masque-proxy") // works with files of root and of masque in /run/masque
	m.do("apt-get remove -y masquevpn")
	m.is("ip -n other -o link | grep -c masque || true", "0")
	m.is("ls /run/masque", "alice.log")
}

// mainPID returns the process ID of a service, "0" if it does not run.
func (m *machine) mainPID(unit string) string {
	m.Helper()
	return m.do("systemctl show -P MainPID " + unit)
}

// noSecrets checks that no token and no private key appears in logs, status,
// command lines or journals of the programs.
func (m *machine) noSecrets() {
	m.Helper()
	var secrets []string
	for _, line := range strings.Split(m.do("cat /etc/masque/*.toml /root/*.toml /etc/masque/*.key"), "\n") {
		if _, token, ok := strings.Cut(line, "token = "); ok {
			secrets = append(secrets, strings.Trim(token, `"`))
		}
		if keyLine.MatchString(line) {
			secrets = append(secrets, line)
		}
	}
	if len(secrets) < 4 {
		m.Fatalf("found only these secrets: %q", secrets)
	}
	for _, line := range []string{
		"journalctl --sync; journalctl --no-pager -o export -a",
		"cat /proc/[0-9]*/cmdline | tr '\\0' ' '", "cat /run/masque/*.log 2>/dev/null || true",
		"cat /run/masque/*.journal 2>/dev/null || true", "masque-client status alice --json",
		"masque-proxy status --json", "masque-proxy sessions --json",
	} {
		out := m.do(line)
		for _, secret := range secrets {
			if strings.Contains(out, secret) {
				m.Errorf("%s: the output contains the secret %q", line, secret)
			}
		}
	}
}

// keyLine matches the first line of a private key in PEM format (PKCS #8), and
// a token on a line of its own.
var keyLine = regexp.MustCompile(`^M[A-Za-z0-9+/]{63}$`)

// Stopping a service keeps its kill switch closed, and the status names the
// command that opens it.
func TestKillSwitch(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apart("masque-proxy.service", "10.9.0.2")
	m.do(install)
	fresh := m.network()
	m.do(files + `printf '\n[kill_switch]\nenabled = true\n' >> /etc/masque/alice.toml; systemctl start masque-proxy`)
	const ping = "ping -n -c 1 -W 1 10.9.0.2"
	connect := func() {
		t.Helper()
		m.do("systemctl start masque-client@alice && masque-client wait alice --for connected --timeout 30s")
	}
	connect()
	m.do("systemctl stop masque-client@alice")
	m.do("! " + ping)
	for _, line := range []string{"systemctl status masque-client@alice || true",
		"masque-client status alice 2>&1 || true"} {
		if out := m.do(line); !strings.Contains(out, "masque-client down alice") {
			t.Errorf("%s: no command that opens the kill switch:\n%s", line, out)
		}
	}
	m.do("masque-client down alice")
	m.do(ping)
	m.fails(3, "masque-client down alice")

	// systemd does not restart a service that `down` has ended, and the kill
	// switch is open.
	connect()
	m.do("masque-client down alice && " + ping)
	m.until("the service has ended", func() bool {
		return m.do("systemctl is-active masque-client@alice || true") == "inactive"
	})

	connect()
	m.do("systemctl stop masque-client@alice masque-proxy")
	m.do("! " + ping)
	m.do("apt-get remove -y masquevpn && " + ping)
	if now := m.network(); now != fresh {
		t.Errorf("before\n%s\nafter removal\n%s", fresh, now)
	}
}

// The rpm is installed, upgraded and removed. rpm calls the scripts with other
// arguments than dpkg.
func TestRPM(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apart("masque-client@.service", "10.9.0.1")
	const rpm = "rpm --force-debian --nodeps " // Debian's packages are not in its database
	m.do(rpm + "-i $(ls -v /opt/packages/*.rpm | head -1)")
	m.is("stat -c '%U:%G %a' /etc/masque", "root:masque 2750")
	m.is("rpm -V masquevpn", "")
	fresh := m.network()
	m.do(files + "systemctl start masque-proxy masque-client@alice; masque-client wait alice --for connected --timeout 30s")
	pids := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice")
	if out := m.do(rpm + "-U /opt/packages/*-9999-*.rpm"); !strings.Contains(out,
		"systemctl restart masque-client@alice.service masque-proxy.service") {
		t.Errorf("the upgrade prints\n%s", out)
	}
	if now := m.mainPID("masque-proxy") + " " + m.mainPID("masque-client@alice"); now != pids {
		t.Errorf("processes before the upgrade %s, after it %s", pids, now)
	}
	m.do(other + "ping -n -c 1 -W 10 10.77.0.1")
	m.do(rpm + "-e masquevpn")
	m.is("systemctl is-active masque-proxy masque-client@alice || true", "inactive\ninactive")
	if now := m.network(); now != fresh {
		t.Errorf("before\n%s\nafter removal\n%s", fresh, now)
	}
	m.fails(2, "ls /usr/bin/masque-proxy")
	m.is("ls /etc/masque", "alice.toml\nca.crt\nca.key\nproxy.crt\nproxy.key\nproxy.toml\nusers.toml")
}

// The same files make the same packages.
func TestReproducible(t *testing.T) {
	for _, format := range []string{"deb", "rpm"} {
		packages, err := filepath.Glob("../dist/*." + format)
		if err != nil || len(packages) != 1 {
			t.Fatalf("%v in dist: %v", packages, err)
		}
		again := filepath.Join(t.TempDir(), filepath.Base(packages[0]))
		nfpm := exec.Command("dist/nfpm", "package", "--config", "packaging/nfpm.yaml",
			"--packager", format, "--target", again)
		nfpm.Dir = ".."
		if out, err := nfpm.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		one, err := os.ReadFile(packages[0])
		if err != nil {
			t.Fatal(err)
		}
		two, err := os.ReadFile(again)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(one, two) {
			t.Errorf("%s differs when it is made again", packages[0])
		}
	}
}

// The rpm contains the same files as the deb.
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
			deb = append(deb, strings.Replace(path, "/zsh/vendor-completions/",
				"/zsh/site-functions/", 1))
		}
	}
	for _, path := range list("*.rpm", "rpm", "-qp", "--queryformat",
		"[%{FILEMODES:perms} %{FILENAMES}\n]") {
		if mode, path, _ := strings.Cut(path, " "); !strings.HasPrefix(mode, "d") {
			rpm = append(rpm, path)
		}
	}
	slices.Sort(deb)
	slices.Sort(rpm)
	if !slices.Equal(deb, rpm) {
		t.Errorf("files of the deb\n%s\nfiles of the rpm\n%s", strings.Join(deb, "\n"),
			strings.Join(rpm, "\n"))
	}
	for _, want := range []string{"/usr/bin/masque-proxy",
		"/usr/lib/systemd/system/masque-client@.service",
		"/usr/share/man/man1/masque-client-up.1.gz",
		"/usr/share/bash-completion/completions/masque-proxy"} {
		if !slices.Contains(deb, want) {
			t.Errorf("no %s in the packages", want)
		}
	}
	scripts := strings.Join(list("*.rpm", "rpm", "-qp", "--scripts"), "\n")
	for _, want := range []string{"postinstall scriptlet", "preuninstall scriptlet",
		"postuninstall scriptlet"} {
		if !strings.Contains(scripts, want) {
			t.Errorf("the rpm has no %s:\n%s", want, scripts)
		}
	}
}
