package packaging

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var coexistTime = flag.Duration("coexist-time", time.Minute,
	"duration of TestCoexistence")

//go:embed testdata/coexist
var coexistScripts embed.FS

// coexistPackages is the folder in which `make coexist-packages` puts the
// Debian packages of other programs that this host lacks. They are installed on
// the machines only: on this host, firewalld would take over the firewall.
const coexistPackages = "../bin/coexist"

// target runs a command in the network namespace of the target.
const target = "ip netns exec target "

// newCrowdedMachine returns a machine with the other programs of
// TestCoexistence installed, and without our packages.
func newCrowdedMachine(t *testing.T) *machine {
	t.Helper()
	m := newMachine(t)
	m.do("mkdir -p /opt/coexist/packages")
	scripts, err := coexistScripts.ReadDir("testdata/coexist")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range scripts {
		b, err := coexistScripts.ReadFile("testdata/coexist/" + s.Name())
		if err != nil {
			t.Fatal(err)
		}
		m.write("/opt/coexist/"+s.Name(), b)
	}
	packages, err := filepath.Glob(coexistPackages + "/*.deb")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packages {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		m.write("/opt/coexist/packages/"+filepath.Base(p), b)
	}
	// There is no udev. systemd-networkd waits for it unless /sys is read-only,
	// as in a container.
	m.do(`set -e
chmod +x /opt/coexist/*.sh
if ls /opt/coexist/packages/*.deb >/dev/null 2>&1; then dpkg -i /opt/coexist/packages/*.deb >/dev/null; fi
rm -rf /etc/systemd/network/* /etc/firewalld/zones/* /etc/firewalld/policies/*
mount -o remount,ro /sys
ip link set lo up`)
	return m
}

// write writes a file on the machine.
func (m *machine) write(path string, content []byte) {
	m.Helper()
	c := m.command("cat > '" + path + "' && chmod 600 '" + path + "'")
	c.Stdin = bytes.NewReader(content)
	if out, err := c.CombinedOutput(); err != nil {
		m.Fatalf("writing %s: %v\n%s", path, err, out)
	}
}

// connect connects two machines by a veth pair.
func connect(t *testing.T, a *machine, nameA string, b *machine, nameB string) {
	t.Helper()
	if out, err := exec.Command("ip", "link", "add", nameA, "netns", a.pid, "type", "veth", "peer",
		"name", nameB, "netns", b.pid).CombinedOutput(); err != nil {
		t.Fatalf("connecting two machines: %v\n%s", err, out)
	}
}

// provider makes the network between client and proxy, on the machine of the
// proxy: the namespace isp with a router, a DHCP server, and router
// advertisements on the client's first network, and the namespace target with a
// host behind the proxy.
const provider = `set -e
ip netns add isp
ip netns add target
ip link set isp0 netns isp
ip link set isp1 netns isp
ip link add eth0 type veth peer name wan0 netns isp
ip link add eth1 type veth peer name eth0 netns target
ip netns exec isp sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
for link in "isp0 192.168.7.1/24" "isp0 2001:db8:7::1/64" "isp1 192.168.8.1/24" "wan0 203.0.113.1/24"; do
	set -- $link
	ip -n isp addr add $2 dev $1 nodad 2>/dev/null || ip -n isp addr add $2 dev $1
	ip -n isp link set $1 up
done
ip -n isp link set lo up
ip -n target link set lo up
ip -n target addr add 198.51.100.2/24 dev eth0
ip -n target addr add 2001:db8:9::2/64 dev eth0 nodad
ip -n target link set eth0 up
ip -n target route add default via 198.51.100.1
ip -n target route add default via 2001:db8:9::1
ip addr add 198.51.100.1/24 dev eth1
ip addr add 2001:db8:9::1/64 dev eth1 nodad
ip link set eth1 up
cat > /etc/systemd/network/10-wan.network <<END
[Match]
Name=eth0
[Network]
Address=203.0.113.2/24
Gateway=203.0.113.1
END
mkdir /run/isp
cat > /run/isp/dnsmasq.conf <<END
port=0
no-ping
interface=isp0,isp1
bind-interfaces
leasefile-ro
dhcp-authoritative
enable-ra
dhcp-range=set:lan0,192.168.7.100,192.168.7.199,255.255.255.0,2m
dhcp-range=set:lan1,192.168.8.100,192.168.8.199,255.255.255.0,2m
dhcp-range=2001:db8:7::,ra-only,64,10m
dhcp-optsfile=/run/isp/options
END
`

// classless returns the options of the DHCP server in round n: the default
// route, routes to private networks of the provider, which may leave outside
// the tunnel, and in some rounds routes to public networks, which must not
// (option 121, RFC 3442).
func classless(n int) string {
	first, second := "0.0.0.0/0,192.168.7.1,10.5.0.0/16,192.168.7.1", "10.6.0.0/16,192.168.8.1"
	switch n % 4 {
	case 1:
		first += ",192.0.2.0/25,192.168.7.1"
	case 2:
		second += ",192.0.2.128/25,192.168.8.1"
	case 3:
		first += ",198.51.100.2/32,192.168.7.1"
		second += ",192.0.2.0/24,192.168.8.1"
	}
	return fmt.Sprintf("tag:lan0,option:classless-static-route,%s\ntag:lan1,option:router\ntag:lan1,option:classless-static-route,%s\n", first, second)
}

// own is a filter of tcpdump for the packets that a client with a full tunnel
// may send on its networks: packets of the tunnel and DHCP, ICMP errors about
// late answers of the DHCP server, which firewalld refuses, and packets that
// find neighbours, routers and multicast listeners.
const own = "arp or igmp or (udp and dst host 203.0.113.2 and dst port 443) or (udp and dst port 67) or (udp and dst port 547)" +
	" or (icmp[0] == 3 and icmp[17] == 17 and icmp[28:2] == 67)" +
	" or (icmp6 and ip6[40] >= 130 and ip6[40] <= 143) or (ip6 and ip6[6] == 0 and ip6[48] >= 130 and ip6[48] <= 143)"

// capture runs tcpdump on an interface of a namespace. lines stops it and
// returns a line for each received packet that matches filter.
func (m *machine) capture(namespace, iface, filter string) (lines func() []string) {
	m.Helper()
	file := "/run/capture-" + namespace + "-" + iface
	m.do(fmt.Sprintf("systemd-run --quiet --unit=capture-%[1]s-%[2]s -p NetworkNamespacePath=/run/netns/%[1]s -p StandardOutput=file:%[3]s -p StandardError=file:%[3]s.log "+
		"tcpdump -Z root -tttt -l -n -Q in -i %[2]s '%[4]s'", namespace, iface, file, filter))
	m.until("tcpdump listens on "+iface, func() bool {
		return strings.Contains(m.do("cat "+file+".log || true"), "listening on")
	})
	return func() []string {
		m.Helper()
		m.do("systemctl stop capture-" + namespace + "-" + iface)
		if text := m.do("cat " + file); text != "" {
			return strings.Split(text, "\n")
		}
		return nil
	}
}

// disturber is a program that changes the network of a machine repeatedly.
type disturber struct {
	name  string
	every time.Duration
	round func(n int) (*machine, string) // shell command of round n and its machine

	done, failed int    // number of rounds
	last         string // output of the last failed round
}

// run runs a round every f.every until ctx ends.
func (f *disturber) run(ctx context.Context) {
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	for n := 1; ; n++ {
		m, line := f.round(n)
		if out, err := m.command(line).CombinedOutput(); err != nil {
			f.failed++
			f.last = fmt.Sprintf("%v: %s", err, bytes.TrimSpace(out))
		} else {
			f.done++
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// A client and a proxy run beside programs that change the network of real
// hosts: systemd-networkd, firewalld, containers as dockerd makes them, the
// rules of mwan3, and two DHCP clients with changing routes. Only packets of
// the tunnel leave the client, and an inner TCP connection lasts. `make
// e2e-coexist TIME=1h` is the long run.
func TestCoexistence(t *testing.T) {
	t.Parallel()
	near, far := newCrowdedMachine(t), newCrowdedMachine(t)
	connect(t, near, "eth0", far, "isp0")
	connect(t, near, "eth1", far, "isp1")
	far.do(provider)
	far.write("/run/isp/options", []byte(classless(0)))
	far.do(`systemd-run --quiet --unit=isp -p NetworkNamespacePath=/run/netns/isp dnsmasq -k -u root -C /run/isp/dnsmasq.conf
systemctl start systemd-networkd firewalld`)
	near.do(`set -e
mkdir -p /etc/systemd/network
cat > /etc/systemd/network/10-lan.network <<END
[Match]
Name=eth0
[Network]
DHCP=ipv4
IPv6AcceptRA=yes
END
echo "203.0.113.2 vpn.example.org" >> /etc/hosts
systemctl start systemd-networkd firewalld
ip link set eth1 up
dhclient -1 -q -pf /run/dhclient.pid -lf /run/dhclient.leases eth1`)
	near.until("systemd-networkd has a lease", func() bool {
		return strings.Contains(near.do("ip route; ip -6 route"),
			"default via 192.168.7.1 dev eth0")
	})

	// Configure the other programs once, as docs/install.md describes.
	for _, m := range []*machine{near, far} {
		m.do(`set -e
/opt/coexist/bridge.sh daemon
for action in "--new-zone=docker" "--zone=docker --set-target=ACCEPT" "--zone=docker --add-interface=docker0" \
	"--zone=trusted --add-interface=masque0" "--zone=public --add-port=443/udp"; do
	firewall-cmd -q --permanent $action
done
firewall-cmd -q --reload
/opt/coexist/bridge.sh daemon`)
		m.do(install)
	}
	near.do("/opt/coexist/multiwan.sh load 192.168.7.1")
	far.do(files + "systemctl start masque-proxy")
	near.write("/etc/masque/alice.toml", []byte(far.do("cat /etc/masque/alice.toml")+"\n"))
	near.do("chgrp masque /etc/masque/alice.toml && chmod 640 /etc/masque/alice.toml")
	near.do("systemctl start masque-client@alice && masque-client wait alice --for connected --timeout 30s")
	near.do("ping -n -c 1 -W 10 198.51.100.2")
	near.do("/opt/coexist/bridge.sh up 254 && ip netns exec box254 ping -n -c 1 -W 10 198.51.100.2")
	pids := near.mainPID("masque-client@alice") + " " + far.mainPID("masque-proxy")

	outside := []func() []string{far.capture("isp", "isp0", "not ("+own+")"), far.capture("isp", "isp1", "not ("+own+")")}
	untranslated := []func() []string{
		far.capture("isp", "wan0", "src net 10.77.0.0/24 or src net fd77::/64"),
		far.capture("target", "eth0", "src net 10.77.0.0/24 or src net fd77::/64"),
	}

	disturbers := []*disturber{
		{name: "systemd-networkd of the client", every: 4 * time.Second,
			round: func(n int) (*machine, string) {
				return near, []string{
					fmt.Sprintf("mkdir -p /etc/systemd/network/10-lan.network.d && printf '[DHCPv4]\\nRouteMetric=%d\\n' > /etc/systemd/network/10-lan.network.d/metric.conf && networkctl reload", 1000+n),
					"networkctl reconfigure eth0", "networkctl renew eth0", "networkctl reload",
				}[n%4]
			}},
		{name: "systemd-networkd of the proxy", every: 5 * time.Second,
			round: func(n int) (*machine, string) {
				return far, []string{
					fmt.Sprintf("mkdir -p /etc/systemd/network/10-wan.network.d && printf '[Route]\\nDestination=10.%d.0.0/16\\nGateway=203.0.113.1\\n' > /etc/systemd/network/10-wan.network.d/route.conf && networkctl reload", n%200),
					"networkctl reconfigure eth0", "networkctl reload",
				}[n%3]
			}},
		{name: "firewalld of the client", every: 7 * time.Second,
			round: func(int) (*machine, string) {
				return near, reload
			}},
		{name: "firewalld of the proxy", every: 8 * time.Second,
			round: func(int) (*machine, string) {
				return far, reload
			}},
		{name: "containers of the client", every: 3 * time.Second,
			round: func(n int) (*machine, string) {
				return near, containers(n)
			}},
		{name: "containers of the proxy", every: 3 * time.Second,
			round: func(n int) (*machine, string) {
				return far, containers(n)
			}},
		{name: "mwan3's rules of the client", every: 6 * time.Second,
			round: func(int) (*machine, string) {
				return near, "/opt/coexist/multiwan.sh load 192.168.7.1"
			}},
		{name: "routes of the DHCP server", every: 9 * time.Second,
			round: func(n int) (*machine, string) {
				return far, fmt.Sprintf("printf '%s' > /run/isp/options && systemctl kill -s HUP isp", strings.ReplaceAll(classless(n), "\n", `\n`))
			}},
		{name: "dhclient", every: 10 * time.Second, round: func(int) (*machine, string) {
			const files = "-q -pf /run/dhclient.pid -lf /run/dhclient.leases eth1"
			return near, "dhclient -r " + files + " && dhclient -1 " + files
		}},
	}

	far.do("systemd-run --quiet --unit=transfer -p NetworkNamespacePath=/run/netns/target python3 /opt/coexist/transfer.py serve 198.51.100.2 7000")
	far.until("the receiver listens", func() bool {
		return strings.Contains(far.do(target+"ss -Hltn"), ":7000")
	})
	seconds := int(coexistTime.Seconds())
	near.do(fmt.Sprintf("systemd-run --quiet --unit=scatter python3 /opt/coexist/scatter.py %d 198.51.100.2 192.0.2.7 192.0.2.200 198.18.0.9 2001:db8:9::2 2001:db8:77::7", seconds+10))
	sending := near.command(fmt.Sprintf("python3 /opt/coexist/transfer.py send 198.51.100.2 7000 %d", seconds))
	var sent, sendErr bytes.Buffer
	sending.Stdout, sending.Stderr = &sent, &sendErr
	if err := sending.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), *coexistTime)
	defer cancel()
	var working sync.WaitGroup
	for _, f := range disturbers {
		working.Go(func() { f.run(ctx) })
	}
	working.Wait()
	transferErr := sending.Wait()

	var status struct {
		State    string
		Reason   string
		Warnings []string
	}
	state := func() string {
		// The command fails while the client is not connected.
		out, _ := near.command("masque-client status alice --json").Output()
		status.State = ""
		if err := json.Unmarshal(out, &status); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		return status.State
	}
	near.until("the client is connected", func() bool { return state() == "connected" })

	for _, f := range disturbers {
		t.Logf("%s: %d done, %d failed %s", f.name, f.done, f.failed, f.last)
		if f.done == 0 {
			t.Errorf("%s did nothing: %s", f.name, f.last)
		}
	}
	t.Logf("client: %s", near.do("masque-client status alice; journalctl -u masque-client@alice -o cat | cut -c 1-4000 | "+tally))
	t.Logf("proxy: %s", far.do("masque-proxy status; journalctl -u masque-proxy -o cat | "+tally))
	if got := near.mainPID("masque-client@alice") + " " + far.mainPID("masque-proxy"); got != pids {
		t.Errorf("processes %s, at the start %s", got, pids)
	}
	wantNone := func(name string, captures []func() []string) {
		t.Helper()
		var packets []string
		for _, lines := range captures {
			packets = append(packets, lines()...)
		}
		t.Logf("%s: %d", name, len(packets))
		if len(packets) > 0 {
			t.Errorf("%s, by destination\n%s", name, byDestination(packets))
		}
	}
	wantNone("packets outside the tunnel", outside)
	wantNone("untranslated packets of clients behind the proxy", untranslated)
	results := strings.Fields(sent.String()) // bytes, digest sent, digest received
	t.Logf("transfer: %s", strings.Join(results, " "))
	if transferErr != nil || len(results) != 3 || results[1] != results[2] {
		t.Errorf("the transfer ended with %v, %s%s", transferErr, &sent, &sendErr)
	}
	if t.Failed() {
		t.Logf("client's log\n%s", near.do("journalctl -u masque-client@alice -o cat | tail -n 60"))
		t.Logf("client's host\n%s",
			near.do("ip rule; ip route show table all; nft list tables; ip addr"))
		t.Logf("proxy's log\n%s", far.do("journalctl -u masque-proxy -o cat | tail -n 40"))
	}
}

// reload is the round of firewalld. Its reload also flushes the rules of
// iptables, and dockerd restores its rules then.
const reload = "firewall-cmd -q --reload && /opt/coexist/bridge.sh daemon"

// byDestination summarizes lines of tcpdump: for each destination the number of
// packets, and the first and the last line.
func byDestination(packets []string) string {
	first, last, count := map[string]string{}, map[string]string{}, map[string]int{}
	for _, line := range packets {
		to := line
		if _, after, ok := strings.Cut(line, " > "); ok {
			to, _, _ = strings.Cut(after, ": ")
		}
		if count[to] == 0 {
			first[to] = line
		}
		count[to]++
		last[to] = line
	}
	var b strings.Builder
	for _, to := range slices.Sorted(maps.Keys(count)) {
		fmt.Fprintf(&b, "%6d %s\n\t%s\n\t%s\n", count[to], to, first[to], last[to])
	}
	return b.String()
}

// tally counts the lines of a JSON log by message.
const tally = `sed -n 's/.*"msg":"\([^"]*\)".*/\1/p' | sort | uniq -c | sort -rn`

// containers returns round n of dockerd: it starts a container that sends
// packets and removes an older one, or restarts the daemon.
func containers(n int) string {
	if n%5 == 0 {
		return "/opt/coexist/bridge.sh daemon"
	}
	const kept = 3
	line := fmt.Sprintf("set -e; /opt/coexist/bridge.sh up %d; ip netns exec box%[1]d python3 /opt/coexist/scatter.py 1 198.51.100.2 192.0.2.7 192.0.2.200", n%200+1)
	if old := n - kept; old > 0 && old%5 != 0 {
		line += fmt.Sprintf("; /opt/coexist/bridge.sh down %d", old%200+1)
	}
	return line
}
