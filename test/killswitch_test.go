package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"masquevpn/client"
	"masquevpn/internal/dnstest"
	"masquevpn/internal/lab"
)

const killSwitch = "\n[kill_switch]\nenabled = true\n"

// chatter is what programs of a host, and of one behind it, send all the time:
// UDP and TCP, both families, to hosts that the tunnel leads to and others, the
// neighbour and the proxy among them.
type chatter struct {
	t      *testing.T
	stop   context.CancelFunc
	rounds atomic.Int64
	done   sync.WaitGroup
}

// chatterPort is the port that it all goes to.
const chatterPort = 9

var chatterTo = []string{
	"192.0.2.2", "198.51.100.1", "203.0.113.5", "203.0.113.99", "2001:db8:3::2", "2001:db8:1::1",
	"2001:db8:2::5", "2001:db8:99::1",
}

// chat starts to send from hosts.
func chat(t *testing.T, hosts ...*lab.Host) *chatter {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	c := &chatter{t: t, stop: stop}
	var sockets []net.PacketConn
	for _, h := range hosts {
		s, err := h.ListenPacket("udp", "[::]:0") // both families
		check(t, err)
		sockets = append(sockets, s)
	}
	c.done.Go(func() {
		for ; ctx.Err() == nil; c.rounds.Add(1) {
			for i, h := range hosts {
				for _, to := range chatterTo {
					addr := netip.AddrPortFrom(netip.MustParseAddr(to), chatterPort)
					// what is refused is no news
					_, _ = sockets[i].WriteTo([]byte("chatter"), net.UDPAddrFromAddrPort(addr))
					short, cancel := context.WithTimeout(ctx, 2*time.Millisecond)
					if conn, err := h.DialContext(short, "tcp", addr.String()); err == nil {
						conn.Close()
					}
					cancel()
				}
			}
		}
	})
	t.Cleanup(c.end)
	return c
}

// goesOn returns when everything was sent some more times.
func (c *chatter) goesOn() {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for until := c.rounds.Load() + 5; c.rounds.Load() < until; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatal("the chatter does not go on")
		}
	}
}

func (c *chatter) end() {
	c.stop()
	c.done.Wait()
}

// isTunnel reports whether a packet of the client is the tunnel's own.
func isTunnel(p lab.Packet) bool {
	if p.NetworkLayer() == nil || udpTo(p) != 443 {
		return false
	}
	dst := p.NetworkLayer().NetworkFlow().Dst().String()
	return dst == lab.ProxyIPv4.String() || dst == lab.ProxyIPv6.String()
}

// leak describes a packet that a closed kill switch has to hold, "" if it may
// leave.
func leak(p lab.Packet, allow ...netip.Prefix) string {
	if !p.Outgoing || p.Layer(layers.LayerTypeARP) != nil {
		return ""
	}
	var dst netip.Addr
	if ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
		dst = netip.AddrFrom4([4]byte(ip.DstIP.To4()))
	} else if ip, ok := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6); ok {
		dst = netip.AddrFrom16([16]byte(ip.DstIP))
	}
	switch port := udpTo(p); {
	case isTunnel(p), port == dhcpServer, port == dhcp6Server:
		return ""
	}
	if icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		switch icmp.TypeCode.Type() {
		case layers.ICMPv6TypeRouterSolicitation, layers.ICMPv6TypeNeighborSolicitation,
			layers.ICMPv6TypeNeighborAdvertisement,
			layers.ICMPv6TypeMLDv2MulticastListenerReportMessageV2:
			return ""
		}
	}
	if slices.ContainsFunc(allow, func(a netip.Prefix) bool { return a.Contains(dst) }) {
		return ""
	}
	return p.String()
}

// killSwitchHosts makes a client with a host behind it, for which it is the
// router.
func killSwitchHosts(t *testing.T, o options) (p *pair, behind *lab.Host) {
	t.Helper()
	p = newPair(t, o)
	behind, err := p.Lab.Host("behind")
	check(t, err)
	check(t, p.Lab.Connect(
		lab.End{Host: p.Client, Name: "eth1", Addrs: lab.Prefixes("10.5.0.1/24", "fd05::1/64")},
		lab.End{Host: behind, Name: "eth0", Addrs: lab.Prefixes("10.5.0.2/24", "fd05::2/64")},
		lab.LinkOptions{}))
	check(t, behind.AddDefaultRoute(netip.MustParseAddr("10.5.0.1")))
	check(t, behind.AddDefaultRoute(netip.MustParseAddr("fd05::1")))
	check(t, p.Client.Forward())
	return p, behind
}

// leaks returns what left the client's underlay in a capture and should not
// have, once for each destination and kind.
func leaks(c *lab.Capture, allow ...netip.Prefix) map[string]int {
	out := make(map[string]int)
	for _, packet := range c.Packets() {
		if l := leak(packet, allow...); l != "" {
			out[flow(packet)]++
		}
	}
	return out
}

// flow is where a packet comes from and goes to.
func flow(p lab.Packet) string {
	if p.NetworkLayer() == nil {
		return p.String()
	}
	f := p.NetworkLayer().NetworkFlow().String()
	if tr := p.TransportLayer(); tr != nil {
		f += " " + tr.LayerType().String() + " to " + tr.TransportFlow().Dst().String()
	}
	return f
}

// all flows of the chatter that leave by the underlay when nothing holds them.
func chatterFlows(p *pair, behind *lab.Host) (flows []string) {
	from := map[bool][]string{true: {lab.ClientIPv4.String(), "10.5.0.2"},
		false: {lab.ClientIPv6.String(), "fd05::2"}}
	for _, to := range chatterTo {
		for _, src := range from[netip.MustParseAddr(to).Is4()] {
			for _, kind := range []string{"UDP", "TCP"} {
				flows = append(flows, fmt.Sprintf("%s->%s %s to %d", src, to, kind, chatterPort))
			}
		}
	}
	return flows
}

// capture collects what the client sends on its underlay.
func (p *pair) capture() *lab.Capture {
	p.t.Helper()
	return p.captureOn("eth0")
}

// captureOn collects what the client sends on an interface.
func (p *pair) captureOn(iface string) *lab.Capture {
	p.t.Helper()
	c, err := p.Client.Capture(iface, func(p lab.Packet) bool { return p.Outgoing })
	check(p.t, err)
	p.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			p.t.Error(err)
		}
	})
	return c
}

// open checks that the chatter leaves by the underlay: a test that finds
// nothing there would find it.
func (p *pair) open(c *chatter, behind *lab.Host) {
	p.t.Helper()
	seen := p.capture()
	p.eventually("all of the chatter leaves", func() bool {
		c.goesOn()
		got := leaks(seen)
		return !slices.ContainsFunc(chatterFlows(p, behind), func(f string) bool {
			return got[f] == 0
		})
	})
}

// excepted sends what a host needs to be in a network at all, which a kill
// switch lets pass: its search for neighbours, of which it forgets those that
// it had, DHCP and DHCPv6.
func (p *pair) excepted() {
	p.t.Helper()
	check(p.t, p.Client.Command(p.ctx, "ip", "neigh", "flush", "dev", "eth0").Run())
	seen := p.capture()
	for from, to := range map[string]netip.AddrPort{
		"0.0.0.0:68": netip.MustParseAddrPort("255.255.255.255:67"),
		"[::]:546":   netip.MustParseAddrPort("[ff02::1:2]:547"),
	} {
		check(p.t, p.Client.Do(func() error {
			listen := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
				var err error
				// as DHCP clients do
				cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "eth0") })
				return errors.Join(cerr, err)
			}}
			c, err := listen.ListenPacket(p.ctx, "udp", from)
			if err != nil {
				return err
			}
			defer c.Close()
			iface, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			dst := net.UDPAddrFromAddrPort(to)
			if to.Addr().Is6() {
				// of a name Go remembers the index, perhaps that on another
				// host
				dst.Zone = strconv.Itoa(iface.Index)
			}
			_, err = c.WriteTo([]byte("discover"), dst)
			return err
		}))
	}
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	for what, is := range map[string]func(lab.Packet) bool{
		"DHCP":   func(p lab.Packet) bool { return udpTo(p) == dhcpServer },
		"DHCPv6": func(p lab.Packet) bool { return udpTo(p) == dhcp6Server },
		"ARP":    func(p lab.Packet) bool { return p.Layer(layers.LayerTypeARP) != nil },
		"neighbour discovery": func(p lab.Packet) bool {
			icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			return ok && icmp.TypeCode.Type() == layers.ICMPv6TypeNeighborSolicitation
		},
	} {
		if _, err := seen.Wait(ctx, is); err != nil {
			p.t.Errorf("%s does not leave: %v", what, err)
		}
	}
}

// Ports of servers.
const (
	dhcpServer  = 67
	dhcp6Server = 547
)

// udpTo is the port that a UDP packet goes to, 0 of others.
func udpTo(p lab.Packet) layers.UDPPort {
	if udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP); ok {
		return udp.DstPort
	}
	return 0
}

// Nothing but the tunnel's own packets leaves the underlay in any state, from
// the first packet to the proxy until `down`.
func TestKillSwitch(t *testing.T) {
	p, behind := killSwitchHosts(t, options{client: killSwitch})
	file := p.invite("alice")
	p.stopProxy()
	before := p.snapshot(p.Client)
	talk := chat(t, p.Client, behind)
	p.open(talk, behind)

	seen := p.capture()
	state := func(name string) {
		t.Helper()
		talk.goesOn()
		closed := false // since the first packet of the tunnel
		for _, packet := range seen.Packets() {
			l := leak(packet)
			if closed = closed || isTunnel(packet); closed && l != "" {
				t.Fatalf("%s: this left the host:\n%s", name, l)
			}
		}
		if !closed {
			t.Fatalf("%s: nothing of the tunnel was seen", name)
		}
	}
	start := func() *lab.Cmd {
		t.Helper()
		c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", file)
		check(t, c.Start())
		return c
	}
	connected := func() {
		t.Helper()
		p.awaitConnected("alice")
		p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		if s := p.status(p.Client, "alice"); s.KillSwitch != client.KillSwitchClosed {
			t.Errorf("the kill switch is %q", s.KillSwitch)
		}
	}

	running := start()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	_, err := seen.Wait(ctx, isTunnel)
	check(t, err)
	p.excepted()
	state("connecting")

	p.startProxy()
	connected()
	state("connected")

	p.killProxy()
	state("the proxy is gone")
	p.startProxy()
	p.awaitReconnected(0)
	state("reconnected")

	p.kill(running)
	state("killed")
	c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
	out, _ := c.CombinedOutput()
	if c.ExitCode() != 3 || !strings.Contains(lastLine(out),
		"not running, and its kill switch is closed: connect with: masque-client up alice, or lift it with: masque-client down alice") {
		t.Errorf("status of a killed client: exit code %d\n%s", c.ExitCode(), out)
	}

	running = start()
	connected()
	state("started again")

	// What clears nftables opens it, and it is closed again.
	check(t, p.Client.Command(p.ctx, "nft", "flush", "ruleset").Run())
	p.killProxy()
	p.startProxy()
	p.eventually("the kill switch is closed again", func() bool {
		return strings.Contains(p.snapshot(p.Client), "masquevpn-kill-alice")
	})
	seen = p.capture()
	connected()
	state("closed again")

	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	<-running.Done()
	state("refused")
	if line := lastLine([]byte(p.log(running))); running.ExitCode() != 4 ||
		!strings.Contains(line, "the proxy does not accept the c") ||
		!strings.HasSuffix(line, "; the kill switch stays closed, until: masque-client down alice") {
		t.Errorf("exit code %d, and the last line is %s", running.ExitCode(), line)
	}

	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
	p.open(talk, behind)
	c = p.Client.Command(p.ctx, program("masque-client"), "down", "alice")
	if _ = c.Run(); c.ExitCode() != 3 {
		t.Errorf("down once more: exit code %d, want 3", c.ExitCode())
	}
}

// Who ends the tunnel, and how, decides whether its kill switch is lifted.
func TestKillSwitchEnds(t *testing.T) {
	p := newPair(t, options{client: killSwitch})
	file := p.invite("alice")
	before := p.snapshot(p.Client)
	closed := func() bool {
		t.Helper()
		return strings.Contains(p.snapshot(p.Client), "masquevpn-kill-alice")
	}
	start := func() *lab.Cmd {
		t.Helper()
		c := p.runClient(file)
		return c
	}
	for _, tt := range []struct {
		name   string
		end    func(c *lab.Cmd)
		closed bool
		says   string
	}{
		{"SIGTERM", func(c *lab.Cmd) {
			check(t, c.Signal(syscall.SIGTERM))
		}, true, "the kill switch stays closed, until: masque-client down alice"},
		{"SIGINT", func(c *lab.Cmd) {
			check(t, c.Signal(syscall.SIGINT))
		}, false, "kill switch lifted"},
		{"down", func(*lab.Cmd) { p.down(p.Client, "alice") }, false, "kill switch lifted"},
	} {
		c := start()
		tt.end(c)
		<-c.Done()
		if c.ExitCode() != 0 || closed() != tt.closed || !strings.Contains(p.log(c), tt.says) {
			t.Errorf("%s: exit code %d, closed %t, want %t and %q:\n%s", tt.name, c.ExitCode(),
				closed(), tt.closed, tt.says, p.log(c))
		}
		if !tt.closed {
			p.wantUnchanged(p.Client, before)
		}
	}

	// A process that died is done with by down.
	c := start()
	p.kill(c)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)

	// A tunnel that does not come up leaves it closed, too.
	p.stopProxy()
	up := p.Client.Command(p.ctx, program("masque-client"), "up", file, "--wait", "--timeout", "1s")
	out, _ := up.CombinedOutput()
	if line := lastLine(out); up.ExitCode() != 5 || !closed() ||
		!strings.HasSuffix(line, "; the kill switch stays closed, until: masque-client down alice") {
		t.Errorf("exit code %d, closed %t, and the last line is %s", up.ExitCode(), closed(), line)
	}
	up = p.Client.Command(p.ctx, program("masque-client"), "up", file, "--wait", "--timeout", "5m")
	check(t, up.Start())
	p.eventually("the client tries", func() bool {
		// it may not run yet
		out, _ := p.Client.Command(p.ctx, program("masque-client"), "status", "alice",
			"--json").Output()
		return strings.Contains(string(out), `"state":"connecting","since"`) &&
			!strings.Contains(string(out), `"reason":""`)
	})
	check(t, up.Signal(syscall.SIGINT))
	<-up.Done()
	if line := lastLine([]byte(p.log(up))); up.ExitCode() != 1 ||
		!strings.Contains(line, "interrupted") {
		t.Errorf("exit code %d, and the last line is %s", up.ExitCode(), line)
	}
	p.wantUnchanged(p.Client, before)
	p.startProxy()

	// Turned off, it does not stay from before.
	check(t, start().Stop(p.ctx))
	if !closed() {
		t.Error("the kill switch was lifted")
	}
	text, err := os.ReadFile(file)
	check(t, err)
	check(t, os.WriteFile(file, []byte(strings.Replace(string(text), "enabled = true",
		"enabled = false", 1)), 0o600))
	c = start()
	if s := p.status(p.Client, "alice"); closed() || s.KillSwitch != client.KillSwitchOff {
		t.Errorf("turned off, it is closed: %t, %q", closed(), s.KillSwitch)
	}
	check(t, c.Stop(p.ctx))
	p.wantUnchanged(p.Client, before)
}

// A host that resolves names by itself, as with systemd-resolved, finds the
// proxy although nobody else may ask anything; and what is allowed goes on.
func TestKillSwitchNames(t *testing.T) {
	allow := lab.Prefixes("198.51.100.0/24", "2001:db8:1::/64")
	p, behind := killSwitchHosts(t,
		options{client: killSwitch + `allow = ["198.51.100.0/24", "2001:db8:1::/64"]`,
			routes: `exclude = ["203.0.113.99/32"]`})
	file := p.invite("alice")
	dns, err := p.Router.ListenPacket("udp", "203.0.113.1:53")
	check(t, err)
	dnstest.Serve(t, dns, func(name string) ([]netip.Addr, error) {
		if name == lab.ProxyName {
			return []netip.Addr{lab.ProxyIPv4}, nil
		}
		return nil, nil
	})
	check(t, p.Client.Do(func() error {
		const upstream = "/run/systemd/resolve/resolv.conf"
		if err := os.MkdirAll(filepath.Dir(upstream), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(upstream,
			[]byte("# written by systemd-resolved\nnameserver 203.0.113.1\n"), 0o644); err != nil {
			return err
		}
		if err := os.WriteFile("/etc/hosts", nil, 0o644); err != nil {
			return err
		}
		return os.WriteFile("/etc/resolv.conf", []byte("nameserver 127.0.0.53\n"), 0o644)
	}))
	before := p.snapshot(p.Client)
	talk := chat(t, p.Client, behind)
	seen := p.capture()
	p.up(p.Client, file)
	closed := len(seen.Packets())
	talk.goesOn()
	asked := false
	for i, packet := range seen.Packets() {
		udp, _ := packet.Layer(layers.LayerTypeUDP).(*layers.UDP)
		query := udp != nil && udp.DstPort == 53
		asked = asked || query
		if l := leak(packet, allow...); i >= closed && l != "" && !query {
			t.Fatalf("this left the host:\n%s", l)
		}
	}
	if !asked {
		t.Error("no name was looked up: the test tests nothing")
	}
	got := leaks(seen)
	for from, to := range map[string]netip.Addr{lab.ClientIPv4.String(): lan4, "10.5.0.2": lan4,
		lab.ClientIPv6.String(): lan6, "fd05::2": lan6} {
		for _, kind := range []string{"UDP", "TCP"} {
			if f := fmt.Sprintf("%s->%s %s to %d", from, to, kind, chatterPort); got[f] == 0 {
				t.Errorf("%s is allowed and did not leave: %v", f, got)
			}
		}
	}
	if log := p.clientLog("alice"); !strings.Contains(log,
		"kill_switch.allow lacks what routes.exclude has") ||
		!strings.Contains(log, "203.0.113.99/32") {
		t.Errorf("the log does not say that the kill switch stops what is excluded:\n%s", log)
	}
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}
