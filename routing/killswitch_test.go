package routing

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// closeKillSwitch closes a kill switch of the host except for iface.
func (h *host) closeKillSwitch(k *KillSwitch, iface string) {
	h.t.Helper()
	h.do(func() {
		if err := k.Close(iface); err != nil {
			h.t.Fatal(err)
		}
	})
}

// liftKillSwitch opens a kill switch and reports whether it was closed.
func (h *host) liftKillSwitch(k *KillSwitch) (found bool) {
	h.t.Helper()
	h.do(func() {
		var err error
		if found, err = k.Lift(); err != nil {
			h.t.Fatal(err)
		}
	})
	return found
}

// canSend reports whether the kernel lets a UDP packet leave. Otherwise the
// write must fail with EPERM.
func (h *host) canSend(from, to string, mark uint32) (passed bool) {
	h.t.Helper()
	h.do(func() {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)),
			Control: MarkSocket(mark)}
		c, err := d.DialContext(context.Background(), "udp", to)
		if err != nil {
			h.t.Fatalf("from %s to %s: %v", from, to, err)
		}
		defer c.Close()
		_, err = c.Write([]byte("out"))
		if passed = err == nil; !passed && !errors.Is(err, syscall.EPERM) {
			h.t.Errorf("from %s to %s: %v, want operation not permitted", from, to, err)
		}
	})
	return passed
}

func TestKillSwitch(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	h.ip("addr add 10.77.0.2/24 dev masque0")
	h.ip("addr add fd77::2/64 dev masque0 nodad")
	h.ip("link set masque0 up")
	before := h.snapshot()
	k := &KillSwitch{Instance: "one", Mark: DefaultMark,
		Allow: prefixes("198.51.100.0/24", "2001:db8:aa::/48")}
	// Use the index as zone, because package net caches the indexes of names,
	// perhaps from another namespace.
	lan := strconv.Itoa(h.index("up0"))
	check := func(state string, closed bool, tunnel bool) {
		t.Helper()
		for _, tt := range []struct {
			name, from, to string
			mark           uint32
			want           bool // the packet leaves
		}{
			{"IPv4", "0.0.0.0:0", proxyAddr4 + ":443", 0, !closed},
			{"IPv6", "[::]:0", "[" + proxyAddr6 + "]:443", 0, !closed},
			{"the LAN", "0.0.0.0:0", routerAddr4 + ":53", 0, !closed},
			{"the LAN, IPv6", "[::]:0", "[" + routerAddr6 + "]:53", 0, !closed},
			{"link-local", "[::]:0", "[fe80::1%" + lan + "]:53", 0, !closed},
			{"multicast", "0.0.0.0:0", "224.0.0.251:5353", 0, !closed},
			{"multicast, IPv6", "[::]:0", "[ff02::fb%" + lan + "]:5353", 0, !closed},
			{"one bit of the mark", "0.0.0.0:0", proxyAddr4 + ":443", outsideMark(DefaultMark),
				!closed},
			{"other bits", "0.0.0.0:0", proxyAddr4 + ":443", 0x4080, !closed},
			{"marked, with other bits", "0.0.0.0:0", proxyAddr4 + ":443",
				DefaultMark | 0x4080, true},
			{"marked", "0.0.0.0:0", proxyAddr4 + ":443", DefaultMark, true},
			{"marked, IPv6", "[::]:0", "[" + proxyAddr6 + "]:443", DefaultMark, true},
			{"loopback", "127.0.0.1:0", "127.0.0.1:53", 0, true},
			{"loopback, IPv6", "[::1]:0", "[::1]:53", 0, true},
			{"address of the host", "0.0.0.0:0", hostAddr4 + ":53", 0, true},
			{"allowed", "0.0.0.0:0", "198.51.100.7:53", 0, true},
			{"allowed, IPv6", "[::]:0", "[2001:db8:aa::7]:53", 0, true},
			{"next to the allowed prefix", "0.0.0.0:0", "198.51.101.7:53", 0, !closed},
			{"DHCP", "0.0.0.0:68", routerAddr4 + ":67", 0, true},
			{"DHCP from another port", "0.0.0.0:0", routerAddr4 + ":67", 0, !closed},
			{"DHCPv6", "[::]:546", "[ff02::1:2%" + lan + "]:547", 0, true},
			{"the tunnel", "0.0.0.0:0", "10.77.0.1:53", 0, !closed || tunnel},
			{"the tunnel, IPv6", "[::]:0", "[fd77::1]:53", 0, !closed || tunnel},
		} {
			t.Run(state+", "+tt.name, func(t *testing.T) {
				if got := h.in(t).canSend(tt.from, tt.to, tt.mark); got != tt.want {
					t.Errorf("got %t, want %t", got, tt.want)
				}
			})
		}
	}
	check("before", false, false)
	h.ip("neigh flush all")
	h.ip("-6 neigh flush all")
	h.closeKillSwitch(k, "")
	check("without an interface", true, false)
	if n := h.changes(func() {
		if err := k.Close(""); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("second Close: %d notifications, want none", n)
	}
	// As in another process.
	other := &KillSwitch{Instance: "one", Mark: DefaultMark, Allow: slices.Clone(k.Allow)}
	h.closeKillSwitch(other, "masque0")
	check("with an interface", true, true)

	// Marked packets arrive, so ARP and neighbour discovery work.
	for _, to := range []string{proxyAddr4, proxyAddr6} {
		server := router.listen(net.JoinHostPort(to, "0"), 0)
		outer := h.listen(":0", DefaultMark)
		send(t, outer, "through", netip.AddrPortFrom(netip.MustParseAddr(to), port(server)))
		if text, _ := receive(t, server); text != "through" {
			t.Errorf("%s received %q", to, text)
		}
	}
	h.do(func() {
		if closed, err := k.Closed(); !closed || err != nil {
			t.Errorf("closed: %t, %v", closed, err)
		}
	})
	if !h.liftKillSwitch(k) {
		t.Error("Lift found no kill switch")
	}
	check("lifted", false, false)
	h.wantSnapshot(before)
	if h.liftKillSwitch(k) {
		t.Error("the second Lift found a kill switch")
	}
}

// Forwarded packets are rejected with an ICMP error.
func TestKillSwitchForward(t *testing.T) {
	h, router := connect(t)
	h.ip("addr add fe80::5/64 dev up0 nodad") // for neighbour discovery while forwarding
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, State{
		Addresses: prefixes("10.77.0.1/32", "fd77::1/128"),
		Routes:    prefixes("10.77.0.0/24", "fd77::/64"), Forward: true,
	})
	k := &KillSwitch{Instance: "one", Mark: DefaultMark,
		Allow: prefixes(routerAddr4+"/32", routerAddr6+"/128")}
	h.closeKillSwitch(k, "masque0")
	for _, tt := range []struct {
		name, from, to, allowed string
	}{
		{"IPv4", "10.77.0.9", proxyAddr4, routerAddr4},
		{"IPv6", "fd77::9", proxyAddr6, routerAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			router := router.in(t)
			blocked := router.listen(net.JoinHostPort(tt.to, "4000"), 0)
			open := router.listen(net.JoinHostPort(tt.allowed, "4000"), 0)
			// The exception for the port of DHCP is only for the host itself.
			from := netip.AddrPortFrom(netip.MustParseAddr(tt.from), 68)
			for _, to := range []string{tt.to, tt.allowed} {
				if _, err := device.Write(udpPacket(t, from,
					netip.AddrPortFrom(netip.MustParseAddr(to), 4000), "to "+to)); err != nil {
					t.Fatal(err)
				}
			}
			if text, _ := receive(t, open); text != "to "+tt.allowed {
				t.Errorf("received %q", text)
			}
			blocked.SetReadDeadline(time.Now())
			if n, err := blocked.Read(make([]byte, 100)); err == nil {
				t.Errorf("%d bytes were forwarded to %s", n, tt.to)
			}
			if got := readTUN(t, device, "to "+tt.to); !isProhibited(got, tt.to) {
				t.Errorf("the sender got %x, want Administratively Prohibited", got)
			}
		})
	}
}

// isProhibited reports whether packet is an ICMP error, Administratively
// Prohibited, about a packet to the address to.
func isProhibited(packet []byte, to string) bool {
	icmp := packet[20:]
	want := []byte{layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeCommAdminProhibited}
	if packet[0]>>4 == 6 {
		icmp, want = packet[40:], []byte{layers.ICMPv6TypeDestinationUnreachable,
			layers.ICMPv6CodeAdminProhibited}
	}
	return slices.Equal(icmp[:2], want) &&
		strings.Contains(string(icmp), string(netip.MustParseAddr(to).AsSlice()))
}

// The kill switch drops packets that another program reroutes outside the
// tunnel after the output hook.
func TestKillSwitchChecksFinalRoute(t *testing.T) {
	h, _ := connect(t)
	h.tun("masque0")
	h.ip("addr add 10.77.0.2/32 dev masque0")
	h.ip("link set masque0 up")
	h.ip("route add " + proxyAddr4 + " dev masque0")
	h.ip("route add default via " + routerAddr4 + " table 100")
	h.ip("rule add fwmark 7 lookup 100")
	h.run("nft", "add table ip other; "+
		"add chain ip other out { type route hook output priority mangle; }; "+
		"add rule ip other out udp dport 9 meta mark set 7")
	k := &KillSwitch{Instance: "one", Mark: DefaultMark}
	h.closeKillSwitch(k, "masque0")
	if !h.canSend("0.0.0.0:0", proxyAddr4+":10", 0) {
		t.Error("a packet into the tunnel was dropped")
	}
	if h.canSend("0.0.0.0:0", proxyAddr4+":9", 0) {
		t.Error("a packet left outside the tunnel")
	}
	h.liftKillSwitch(k)
	if !h.canSend("0.0.0.0:0", proxyAddr4+":9", 0) {
		t.Error("the packet does not leave without the kill switch either: the test is void")
	}
}

// The kill switch also drops packets of raw sockets.
func TestKillSwitchDropsRawPackets(t *testing.T) {
	h, _ := connect(t)
	k := &KillSwitch{Instance: "one", Mark: DefaultMark}
	ping := func() (err error) {
		h.do(func() {
			fd, serr := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
			if serr != nil {
				t.Fatal(serr)
			}
			defer unix.Close(fd)
			echo := []byte{8, 0, 0, 0, 0, 1, 0, 1}
			binary.BigEndian.PutUint16(echo[2:], ^uint16(0x0802))
			err = unix.Sendto(fd, echo, 0,
				&unix.SockaddrInet4{Addr: netip.MustParseAddr(proxyAddr4).As4()})
		})
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	h.closeKillSwitch(k, "")
	if err := ping(); !errors.Is(err, unix.EPERM) {
		t.Errorf("ping: %v, want operation not permitted", err)
	}
}

// An operator can read the table, and nft can load its output again.
func TestKillSwitchAsText(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	k := &KillSwitch{Instance: "one", Mark: DefaultMark, Allow: prefixes("192.168.5.0/24")}
	h.closeKillSwitch(k, "masque0")
	ruleset := h.run("nft", "list", "table", "inet", "masquevpn-kill-one")
	for _, line := range []string{
		"meta mark & 0xa0000000 == 0xa0000000 accept",
		"udp sport 68 udp dport 67 accept",
		"udp sport 546 udp dport 547 accept",
		"ip6 hoplimit 255 icmpv6 type 133-136 accept",
		`oif "lo" accept`,
		`oif "masque0" accept`,
		"ip daddr 192.168.5.0/24 accept",
		"type filter hook output priority filter; policy drop;",
		"type filter hook forward priority filter; policy drop;",
		"policy drop;",
		"jump own",
		"jump all",
		"reject with icmpx",
	} {
		if !strings.Contains(ruleset, line) {
			t.Errorf("no %q in\n%s", line, ruleset)
		}
	}
	if err := k.Close("none0"); err == nil || !strings.Contains(err.Error(), `interface "none0"`) {
		t.Errorf("missing interface: %v", err)
	}
	if err := (&KillSwitch{Instance: "a/b"}).Close(""); err == nil ||
		!strings.Contains(err.Error(), `instance name "a/b"`) {
		t.Errorf("invalid name: %v", err)
	}
}

// Clean restores the host like Open, without an interface, and reports whether
// there was anything to restore.
func TestClean(t *testing.T) {
	h := newHost(t)
	h.underlay()
	before := h.snapshot()
	c := Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
		Journal: t.TempDir() + "/one.json"}
	clean := func() (found bool, err error) {
		h.do(func() {
			found, err = Clean(Config{Instance: c.Instance, Journal: c.Journal,
				Logger: testLogger(t)})
		})
		return found, err
	}
	h.startAndKill(c, fullState(), func() {
		if _, err := clean(); !errors.Is(err, ErrInUse) {
			t.Errorf("beside a live process: %v, want ErrInUse", err)
		}
	})
	for _, want := range []bool{true, false} { // the second call finds nothing
		if found, err := clean(); found != want || err != nil {
			t.Errorf("found %t, %v, want %t", found, err, want)
		}
		h.wantSnapshot(before)
	}
	if _, err := os.Stat(c.Journal); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("journal: %v, want none", err)
	}
}
