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

// killSwitch is the configuration of a tunnel with a kill switch.
const killSwitch = "\n[kill_switch]\nenabled = true\n"

// chatter is background traffic of several hosts: UDP and TCP in both families,
// to chatterTo.
type chatter struct {
	t      *testing.T
	stop   context.CancelFunc
	rounds atomic.Int64 // number of times that everything was sent
	done   sync.WaitGroup
}

// chatterPort is the destination port of the chatter.
const chatterPort = 9

// chatterTo are the destinations of the chatter: hosts that the tunnel leads to
// and others, among them the neighbour of the client and the proxy.
var chatterTo = []string{
	"192.0.2.2", "198.51.100.1", "203.0.113.5", "203.0.113.99", "2001:db8:3::2", "2001:db8:1::1",
	"2001:db8:2::5", "2001:db8:99::1",
}

// startChatter sends from hosts until the test ends.
func startChatter(t *testing.T, hosts ...*lab.Host) *chatter {
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
					// Errors are expected: the kill switch refuses packets.
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

// awaitRounds waits until the chatter was sent several more times.
func (c *chatter) awaitRounds() {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for until := c.rounds.Load() + 5; c.rounds.Load() < until; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatal("the chatter has stopped")
		}
	}
}

// end stops the chatter.
func (c *chatter) end() {
	c.stop()
	c.done.Wait()
}

// isTunnel reports whether a packet of the client belongs to the tunnel itself.
func isTunnel(p lab.Packet) bool {
	if p.NetworkLayer() == nil || udpTo(p) != 443 {
		return false
	}
	dst := p.NetworkLayer().NetworkFlow().Dst().String()
	return dst == lab.ProxyIPv4.String() || dst == lab.ProxyIPv6.String()
}

// leak describes a packet that a closed kill switch must drop. It returns "" if
// the packet may leave, for example to a prefix of allow.
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

// killSwitchHosts makes a pair whose client is the router of another host.
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

// leaks counts the packets in a capture of the underlay that leak reports, by
// their flow.
func leaks(c *lab.Capture, allow ...netip.Prefix) map[string]int {
	out := make(map[string]int)
	for _, packet := range c.Packets() {
		if l := leak(packet, allow...); l != "" {
			out[flow(packet)]++
		}
	}
	return out
}

// flow describes the addresses, protocol and destination port of a packet.
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

// chatterFlows returns the flows of the chatter that leave through the underlay
// without a kill switch, as flow describes them.
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

// capture captures the packets that the client sends on its underlay.
func (p *pair) capture() *lab.Capture {
	p.t.Helper()
	return p.captureOn("eth0")
}

// captureOn captures the packets that the client sends on an interface.
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

// wantChatter checks that all of the chatter leaves through the underlay, so
// that the test would notice a leak.
func (p *pair) wantChatter(c *chatter, behind *lab.Host) {
	p.t.Helper()
	seen := p.capture()
	p.eventually("all of the chatter leaves", func() bool {
		c.awaitRounds()
		got := leaks(seen)
		return !slices.ContainsFunc(chatterFlows(p, behind), func(f string) bool {
			return got[f] == 0
		})
	})
}

// wantExceptions sends packets that a host needs to be in a network at all, and
// checks that the kill switch lets them pass: address resolution, DHCP and
// DHCPv6.
func (p *pair) wantExceptions() {
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
				// like a DHCP client
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
				// Package net caches interface indexes by name, perhaps from
				// another host.
				dst.Zone = strconv.Itoa(iface.Index)
			}
			_, err = c.WriteTo([]byte("discover"), dst)
			return err
		}))
	}
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	for name, is := range map[string]func(lab.Packet) bool{
		"DHCP":   func(p lab.Packet) bool { return udpTo(p) == dhcpServer },
		"DHCPv6": func(p lab.Packet) bool { return udpTo(p) == dhcp6Server },
		"ARP":    func(p lab.Packet) bool { return p.Layer(layers.LayerTypeARP) != nil },
		"neighbour discovery": func(p lab.Packet) bool {
			icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			return ok && icmp.TypeCode.Type() == layers.ICMPv6TypeNeighborSolicitation
		},
	} {
		if _, err := seen.Wait(ctx, is); err != nil {
			p.t.Errorf("%s does not leave: %v", name, err)
		}
	}
}

// UDP ports of servers.
const (
	dhcpServer  = 67
	dhcp6Server = 547
)

// udpTo returns the destination port of a UDP packet, and 0 for other packets.
func udpTo(p lab.Packet) layers.UDPPort {
	if udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP); ok {
		return udp.DstPort
	}
	return 0
}

// From the first packet to the proxy until `down`, only packets of the tunnel
// itself leave through the underlay, in all states.
func TestKillSwitch(t *testing.T) {
	p, behind := killSwitchHosts(t, options{client: killSwitch})
	file := p.invite("alice")
	p.stopProxy()
	before := p.snapshot(p.Client)
	talk := startChatter(t, p.Client, behind)
	p.wantChatter(talk, behind)

	seen := p.capture()
	wantNoLeaks := func(state string) {
		t.Helper()
		talk.awaitRounds()
		closed := false // since the first packet of the tunnel
		for _, packet := range seen.Packets() {
			l := leak(packet)
			if closed = closed || isTunnel(packet); closed && l != "" {
				t.Fatalf("%s: this left the host:\n%s", state, l)
			}
		}
		if !closed {
			t.Fatalf("%s: no packet of the tunnel was captured", state)
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
	p.wantExceptions()
	wantNoLeaks("connecting")

	p.startProxy()
	connected()
	wantNoLeaks("connected")

	p.killProxy()
	wantNoLeaks("the proxy is dead")
	p.startProxy()
	p.awaitReconnected(0)
	wantNoLeaks("reconnected")

	p.kill(running)
	wantNoLeaks("killed")
	c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
	out, _ := c.CombinedOutput()
	if c.ExitCode() != 3 || !strings.Contains(lastLine(out),
		"not running, and its kill switch is closed: connect with: masque-client up alice, or lift it with: masque-client down alice") {
		t.Errorf("status of a killed client: exit code %d\n%s", c.ExitCode(), out)
	}

	running = start()
	connected()
	wantNoLeaks("started again")

	// Flushing nftables opens the kill switch, and the client closes it again.
	check(t, p.Client.Command(p.ctx, "nft", "flush", "ruleset").Run())
	p.killProxy()
	p.startProxy()
	p.eventually("the kill switch is closed again", func() bool {
		return strings.Contains(p.snapshot(p.Client), "masquevpn-kill-alice")
	})
	seen = p.capture()
	connected()
	wantNoLeaks("closed again")

	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	<-running.Done()
	wantNoLeaks("refused")
	if line := lastLine([]byte(p.log(running))); running.ExitCode() != 4 ||
		!strings.Contains(line, "the proxy does not accept the c") ||
		!strings.HasSuffix(line, "; the kill switch stays closed, until: masque-client down alice") {
		t.Errorf("exit code %d, and the last line is %s", running.ExitCode(), line)
	}

	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
	p.wantChatter(talk, behind)
	c = p.Client.Command(p.ctx, program("masque-client"), "down", "alice")
	if _ = c.Run(); c.ExitCode() != 3 {
		t.Errorf("down once more: exit code %d, want 3", c.ExitCode())
	}
}

// The way in which a tunnel ends decides whether its kill switch opens.
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
		closed bool   // the kill switch stays closed
		want   string // in the log
	}{
		{"SIGTERM", func(c *lab.Cmd) {
			check(t, c.Signal(syscall.SIGTERM))
		}, true, "the kill switch stays closed, until: masque-client down alice"},
		{"SIGINT", func(c *lab.Cmd) {
			check(t, c.Signal(syscall.SIGINT))
		}, false, "kill switch lifted"},
		{"down", func(*lab.Cmd) { p.down(p.Client, "alice") }, false, "kill switch lifted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := start()
			tt.end(c)
			<-c.Done()
			if c.ExitCode() != 0 || closed() != tt.closed || !strings.Contains(p.log(c), tt.want) {
				t.Errorf("exit code %d, closed %t, want %t and %q:\n%s", c.ExitCode(), closed(),
					tt.closed, tt.want, p.log(c))
			}
			if !tt.closed {
				p.wantUnchanged(p.Client, before)
			}
		})
	}

	// `down` opens the kill switch of a killed client.
	c := start()
	p.kill(c)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)

	// A tunnel that does not come up keeps its kill switch closed.
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
		// The client may not run yet, and then the command fails.
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

	// A client without a kill switch opens the one that was closed before.
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

// A host with a local resolver, such as systemd-resolved, finds the proxy while
// nobody else may send queries. Allowed destinations are reached outside the
// tunnel.
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
	talk := startChatter(t, p.Client, behind)
	seen := p.capture()
	p.up(p.Client, file)
	closed := len(seen.Packets())
	talk.awaitRounds()
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
		t.Error("no query was captured: the test would not notice others")
	}
	got := leaks(seen)
	for from, to := range map[string]netip.Addr{lab.ClientIPv4.String(): lan4, "10.5.0.2": lan4,
		lab.ClientIPv6.String(): lan6, "fd05::2": lan6} {
		for _, kind := range []string{"UDP", "TCP"} {
			if f := fmt.Sprintf("%s->%s %s to %d", from, to, kind, chatterPort); got[f] == 0 {
				t.Errorf("%s did not leave although it is allowed: %v", f, got)
			}
		}
	}
	if log := p.clientLog("alice"); !strings.Contains(log,
		"kill_switch.allow lacks networks of routes.exclude") ||
		!strings.Contains(log, "203.0.113.99/32") {
		t.Errorf("the log does not warn that the kill switch drops packets to excluded networks:\n%s", log)
	}
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}
