package routing

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dropped returns the number of packets counted by rules with the comment.
func (h *host) dropped(comment string) (packets int) {
	h.t.Helper()
	var list struct {
		Nftables []struct {
			Rule *struct {
				Comment string
				Expr    []struct{ Counter *struct{ Packets int } }
			}
		}
	}
	if err := json.Unmarshal([]byte(h.run("nft", "-j", "list", "ruleset")), &list); err != nil {
		h.t.Fatal(err)
	}
	for _, o := range list.Nftables {
		if o.Rule == nil || !strings.Contains(o.Rule.Comment, comment) {
			continue
		}
		for _, e := range o.Rule.Expr {
			if e.Counter != nil {
				packets += e.Counter.Packets
			}
		}
	}
	return packets
}

// waitDropped waits until a rule with the comment has counted a packet.
func (h *host) waitDropped(comment string) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); h.dropped(comment) == 0; {
		if time.Now().After(deadline) {
			h.t.Fatalf("no packet was dropped by %q:\n%s", comment, h.run("nft", "list", "ruleset"))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// lan creates a host on a network behind h. name is the interface of h.
func (h *host) lan(name string) *host {
	h.t.Helper()
	lan := newHost(h.t)
	h.do(func() {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0",
			PeerNamespace: netlink.NsFd(lan.ns),
		})
		if err != nil {
			h.t.Fatal(err)
		}
	})
	h.ip("link set " + name + " addrgenmode none up")
	lan.ip("link set eth0 addrgenmode none up")
	h.waitFor(name, netlink.OperUp)
	lan.waitFor("eth0", netlink.OperUp)
	h.ip("addr add 10.9.0.1/24 dev " + name)
	h.ip("addr add fd09::1/64 dev " + name + " nodad")
	// The kernel needs a link-local address to resolve the neighbours to which
	// it forwards.
	h.ip("addr add fe80::9/64 dev " + name + " nodad")
	lan.ip("addr add 10.9.0.2/24 dev eth0")
	lan.ip("addr add fd09::2/64 dev eth0 nodad")
	lan.ip("route add default via 10.9.0.1")
	lan.ip("-6 route add default via fd09::1")
	return lan
}

// proxyState returns the State of a proxy with address translation.
func proxyState() State {
	return State{
		Addresses: prefixes("10.77.0.1/32", "fd77::1/128"),
		Routes:    prefixes("10.77.0.0/24", "fd77::/64"),
		Forward:   true, Masquerade: prefixes("10.77.0.0/24", "fd77::/64"), Listen: []uint16{443},
	}
}

// A host on which Apply turned forwarding on does not forward for its
// neighbours.
func TestNeighboursAreNotForwarded(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before func(h *host)
		later  bool // lan0 is created after Apply
		passes bool // packets are forwarded
	}{
		{"turned on by Apply", func(*host) {}, false, false},
		{"turned on before", func(h *host) {
			h.sysctl("net/ipv4/ip_forward", "1")
			h.sysctl("net/ipv6/conf/all/forwarding", "1")
		}, false, true},
		{"interface of another program, created later", func(*host) {}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := connect(t)
			h.tun("masque0")
			tt.before(h)
			var lan *host
			if !tt.later {
				lan = h.lan("lan0")
			}
			before := h.snapshot()
			m := h.open(Config{Instance: "one", Interface: "masque0",
				Journal: t.TempDir() + "/one.json"})
			h.apply(m, proxyState())
			if tt.later {
				lan = h.lan("lan0")
			}
			for _, family := range []struct{ name, from, to, via string }{
				{"IPv4", routerAddr4, "10.9.0.2", hostAddr4},
				{"IPv6", routerAddr6, "fd09::2", hostAddr6},
			} {
				router.ip("route add " + family.to + " via " + family.via)
				service := lan.listen(net.JoinHostPort(family.to, "0"), 0)
				neighbour := router.listen(net.JoinHostPort(family.from, "0"), 0)
				send(t, neighbour, "through",
					netip.AddrPortFrom(netip.MustParseAddr(family.to), port(service)))
				if tt.passes {
					receive(t, service)
				} else {
					h.waitDropped(family.name + " was not forwarded before")
				}
			}
			h.close(m)
			if !tt.later {
				h.wantSnapshot(before)
			}
		})
	}
}

// With several tunnels on one host, the rules of one do not drop packets that
// another forwards, even if its interface existed before the rules.
func TestTunnelsForwardIndependently(t *testing.T) {
	h, router := connect(t)
	dir := t.TempDir()
	devices := map[string]*os.File{"masque0": h.device("masque0"), "masque1": h.device("masque1")}
	for name, pool := range map[string]string{"masque0": "10.77.0.0/24",
		"masque1": "10.78.0.0/24"} {
		m := h.open(Config{Instance: name, Interface: name, Journal: dir + "/" + name + ".json"})
		h.apply(m, State{Routes: prefixes(pool), Forward: true, Masquerade: prefixes(pool)})
	}
	for name, client := range map[string]string{"masque0": "10.77.0.9:4000",
		"masque1": "10.78.0.9:4000"} {
		t.Run(name, func(t *testing.T) {
			server := router.in(t).listen(net.JoinHostPort(proxyAddr4, "0"), 0)
			packet := udpPacket(t, netip.MustParseAddrPort(client),
				netip.AddrPortFrom(netip.MustParseAddr(proxyAddr4), port(server)), "from "+name)
			if _, err := devices[name].Write(packet); err != nil {
				t.Fatal(err)
			}
			text, from := receive(t, server)
			if text != "from "+name || from.Addr().String() != hostAddr4 {
				t.Errorf("received %q from %v", text, from)
			}
			send(t, server, "to "+name, from)
			readTUN(t, devices[name], "to "+name)
		})
	}
}

// Other hosts cannot open connections to clients whose addresses are
// translated.
func TestNoConnectionsIntoTheTunnel(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, proxyState())
	for _, tt := range []struct{ name, from, client, via, pool string }{
		{"IPv4", routerAddr4, "10.77.0.9", hostAddr4, "10.77.0.0/24"},
		{"IPv6", routerAddr6, "fd77::9", hostAddr6, "fd77::/64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := h.in(t), router.in(t)
			router.ip("route add " + tt.client + " via " + tt.via)
			neighbour := router.listen(net.JoinHostPort(tt.from, "0"), 0)
			send(t, neighbour, "unsolicited",
				netip.AddrPortFrom(netip.MustParseAddr(tt.client), 4000))
			h.waitDropped("nobody begins a connection to " + tt.pool)
		})
	}
}

// Translated packets never get a port on which a server of the host listens.
func TestTranslatedPorts(t *testing.T) {
	h, router := connect(t)
	device := h.device("masque0")
	wireguard := h.listen(":51820", 0)
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, proxyState())
	for _, tt := range []struct{ name, client, server, host string }{
		{"IPv4", "10.77.0.9", proxyAddr4, hostAddr4},
		{"IPv6", "fd77::9", proxyAddr6, hostAddr6},
	} {
		server := router.listen(net.JoinHostPort(tt.server, "0"), 0)
		for _, from := range []uint16{443, 53, 1024, port(wireguard), 40000, 65535} {
			t.Run(fmt.Sprintf("%s, port %d", tt.name, from), func(t *testing.T) {
				src := netip.AddrPortFrom(netip.MustParseAddr(tt.client), from)
				if _, err := device.Write(udpPacket(t, src,
					netip.AddrPortFrom(netip.MustParseAddr(tt.server), port(server)),
					"x")); err != nil {
					t.Fatal(err)
				}
				_, got := receive(t, server)
				if got.Addr().String() != tt.host || got.Port() < 32768 ||
					got.Port() >= port(wireguard) {
					t.Errorf("translated to %v, want %s and a port from 32768 to %d", got,
						tt.host, port(wireguard)-1)
				}
				if from == 40000 && got.Port() != from {
					t.Errorf("translated to port %d, want the same", got.Port())
				}
			})
		}
	}
	// Packets to a port in State.Listen are not tracked, so no packet is
	// translated to a client of the tunnel.
	own := h.listen(":443", 0)
	asker := router.listen(net.JoinHostPort(proxyAddr4, "0"), 0)
	send(t, asker, "to the proxy", netip.AddrPortFrom(netip.MustParseAddr(hostAddr4), 443))
	_, from := receive(t, own)
	send(t, own, "from the proxy", from)
	if text, _ := receive(t, asker); text != "from the proxy" {
		t.Errorf("received %q", text)
	}
	h.do(func() {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.DstPort == 443 ||
				f.Forward.SrcPort == 443 && f.Forward.SrcIP.String() == hostAddr4 {
				t.Errorf("tracked: %v", f)
			}
		}
	})
}

func TestWidest(t *testing.T) {
	for _, tt := range []struct {
		name  string
		all   portRange
		taken []portRange
		want  portRange
	}{
		{"nothing taken", portRange{32768, 65535}, nil, portRange{32768, 65535}},
		{"one in the middle", portRange{32768, 65535}, []portRange{{51820, 51820}},
			portRange{32768, 51819}},
		{"one near the start", portRange{32768, 65535}, []portRange{{32770, 32770}},
			portRange{32771, 65535}},
		{"in any order, overlapping", portRange{1000, 2000},
			[]portRange{{1500, 1600}, {1100, 1550}, {1, 999}}, portRange{1601, 2000}},
		{"the ends", portRange{1000, 2000}, []portRange{{2000, 2000}, {1000, 1000}},
			portRange{1001, 1999}},
		{"beside", portRange{1000, 2000}, []portRange{{1, 999}, {2001, 65535}},
			portRange{1000, 2000}},
		{"all taken", portRange{1000, 2000}, []portRange{{1, 65535}}, portRange{1000, 2000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			low, high := widest(tt.all, slices.Clone(tt.taken))
			if got := (portRange{low, high}); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// clientPacket returns a packet from a client of the tunnel to the proxy's
// network.
func clientPacket(t *testing.T, ipv6 bool, protocol layers.IPProtocol,
	rest ...gopacket.SerializableLayer) []byte {
	t.Helper()
	var ip gopacket.SerializableLayer = &layers.IPv4{
		Version: 4, TTL: 64, Protocol: protocol, SrcIP: net.ParseIP("10.77.0.9"),
		DstIP: net.ParseIP(proxyAddr4),
	}
	if ipv6 {
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: protocol,
			SrcIP: net.ParseIP("fd77::9"), DstIP: net.ParseIP(proxyAddr6)}
	}
	for _, l := range rest {
		if l, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			if err := l.SetNetworkLayerForChecksum(ip.(gopacket.NetworkLayer)); err != nil {
				t.Fatal(err)
			}
		}
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf,
		gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		append([]gopacket.SerializableLayer{ip}, rest...)...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// Packets that connection tracking considers invalid leave with the host's
// address or are dropped.
func TestNothingLeavesUntranslated(t *testing.T) {
	h, router := connect(t)
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, proxyState())
	const seen = "table inet seen { chain in { type filter hook prerouting priority raw; " +
		"ip saddr 10.77.0.0/24 counter comment \"untranslated\"; " +
		"ip6 saddr fd77::/64 counter comment \"untranslated\"; }; }"
	router.run("nft", seen)
	tcp := func(change func(*layers.TCP)) gopacket.SerializableLayer {
		l := &layers.TCP{SrcPort: 4000, DstPort: 80, Window: 1000}
		change(l)
		return l
	}
	for _, tt := range []struct {
		name     string
		ipv6     bool
		protocol layers.IPProtocol
		rest     []gopacket.SerializableLayer
	}{
		{"RST", false, layers.IPProtocolTCP, []gopacket.SerializableLayer{tcp(func(l *layers.TCP) {
			l.RST = true
		})}},
		{"FIN", false, layers.IPProtocolTCP, []gopacket.SerializableLayer{tcp(func(l *layers.TCP) {
			l.FIN, l.ACK = true, true
		})}},
		{"SYN and FIN", false, layers.IPProtocolTCP,
			[]gopacket.SerializableLayer{tcp(func(l *layers.TCP) {
				l.SYN, l.FIN = true, true
			})}},
		{"echo reply", false, layers.IPProtocolICMPv4,
			[]gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(0, 0)}}},
		{"UDP-Lite", false, layers.IPProtocolUDPLite,
			[]gopacket.SerializableLayer{gopacket.Payload{0x0f, 0xa0, 0, 80, 0, 8, 0, 0}}},
		{"RST, IPv6", true, layers.IPProtocolTCP,
			[]gopacket.SerializableLayer{tcp(func(l *layers.TCP) {
				l.RST = true
			})}},
		{"FIN, IPv6", true, layers.IPProtocolTCP,
			[]gopacket.SerializableLayer{tcp(func(l *layers.TCP) {
				l.FIN, l.ACK = true, true
			})}},
		{"echo reply, IPv6", true, layers.IPProtocolICMPv6,
			[]gopacket.SerializableLayer{&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(129,
				0)}, gopacket.Payload{0, 1, 0, 1}}},
		{"UDP-Lite, IPv6", true, layers.IPProtocolUDPLite,
			[]gopacket.SerializableLayer{gopacket.Payload{0x0f, 0xa0, 0, 80, 0, 8, 0, 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := device.Write(clientPacket(t, tt.ipv6, tt.protocol,
				tt.rest...)); err != nil {
				t.Fatal(err)
			}
			// A translated packet that follows on the same path.
			to := proxyAddr4
			from := "10.77.0.9"
			if tt.ipv6 {
				to, from = proxyAddr6, "fd77::9"
			}
			server := router.in(t).listen(net.JoinHostPort(to, "0"), 0)
			last := udpPacket(t, netip.AddrPortFrom(netip.MustParseAddr(from), 4000),
				netip.AddrPortFrom(netip.MustParseAddr(to), port(server)), "last")
			if _, err := device.Write(last); err != nil {
				t.Fatal(err)
			}
			receive(t, server)
			if n := router.in(t).dropped("untranslated"); n != 0 {
				t.Errorf("%d packets left with addresses of the tunnel", n)
			}
		})
	}
}

// Packets from a gateway's tunnel are forwarded to the networks that the
// gateway advertises, and to hosts that sent packets into the tunnel.
func TestReach(t *testing.T) {
	h, router := connect(t)
	lan := h.lan("lan0")
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, State{
		Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("10.77.0.0/24", "10.66.0.0/16"),
		Forward: true, Reach: prefixes("10.9.0.0/25"),
	})
	service := lan.listen("10.9.0.2:0", 0)
	far := netip.MustParseAddrPort("10.66.0.9:4000")
	if _, err := device.Write(udpPacket(t, far,
		netip.AddrPortFrom(netip.MustParseAddr("10.9.0.2"), port(service)),
		"in reach")); err != nil {
		t.Fatal(err)
	}
	if text, _ := receive(t, service); text != "in reach" {
		t.Errorf("received %q", text)
	}
	server := router.listen(net.JoinHostPort(proxyAddr4, "0"), 0)
	if _, err := device.Write(udpPacket(t, far,
		netip.AddrPortFrom(netip.MustParseAddr(proxyAddr4), port(server)),
		"out of reach")); err != nil {
		t.Fatal(err)
	}
	h.waitDropped("reaches nothing else")
	// Replies pass.
	lan.ip("addr add 10.9.0.200/24 dev eth0")
	asker := lan.listen("10.9.0.200:0", 0)
	send(t, asker, "question", far)
	readTUN(t, device, "question")
	if _, err := device.Write(udpPacket(t, far,
		netip.AddrPortFrom(netip.MustParseAddr("10.9.0.200"), port(asker)), "answer")); err != nil {
		t.Fatal(err)
	}
	if text, _ := receive(t, asker); text != "answer" {
		t.Errorf("received %q", text)
	}
}

// Other programs use other bits of marks, and may load their chains later.
func TestForeignMarks(t *testing.T) {
	for _, tt := range []struct{ name, rules string }{
		{"none", "add table ip other"},
		{"bit for incoming packets",
			"table ip other { chain pre { type filter hook prerouting priority -150; " +
				"fib daddr type local ct mark set ct mark or 0x80; }; }"},
		{"bit for outgoing packets",
			"table ip other { chain post { type filter hook postrouting priority -140; " +
				"ct mark set ct mark or 0x10000; }; }"},
		{"reverse path filter",
			"table ip other { chain rpf { type filter hook prerouting priority -150; " +
				"iif up0 fib saddr . mark . iif oif missing drop; }; }"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := connect(t)
			h.tun("masque0")
			h.sysctl("net/ipv4/conf/all/rp_filter", "1")
			// Resolve the neighbour first, because a strict filter drops ARP
			// requests from the proxy's address.
			router.run("ping", "-c1", hostAddr4)
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			h.apply(m, fullState())
			h.run("nft", tt.rules)
			ssh := h.echoServer(":22")
			if err := checkEcho(router.connectTo(proxyAddr4, hostAddr4, ssh), "from outside",
				patience); err != nil {
				t.Errorf("a connection from outside: %v", err)
			}
			server := router.listen(net.JoinHostPort(proxyAddr4, "0"), 0)
			outer := h.listen(":0", DefaultMark)
			for range 2 {
				send(t, outer, "request",
					netip.AddrPortFrom(netip.MustParseAddr(proxyAddr4), port(server)))
				_, from := receive(t, server)
				send(t, server, "reply", from)
				if text, _ := receive(t, outer); text != "reply" {
					t.Errorf("the outer socket received %q", text)
				}
			}
		})
	}
}

// A neighbour cannot reach the tunnel's address with the host's own source, and
// the host does not answer ARP requests for it.
func TestTunnelAddressIsNotOnTheLAN(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	t.Run("IPv6 with the host's own source", func(t *testing.T) {
		h.in(t).ip("addr add fe80::5/64 dev up0 nodad")
		router.in(t).ip("addr add fe80::1/64 dev down0 nodad")
		router.in(t).ip("route add fd77::2 via fe80::5 dev down0")
		router.in(t).ip("addr add " + hostAddr6 + "/128 dev lo nodad")
		spoofed := router.in(t).listen(net.JoinHostPort(hostAddr6, "0"), 0)
		send(t, spoofed, "to the tunnel", netip.MustParseAddrPort("[fd77::2]:9"))
		h.in(t).waitDropped("fd77::2 is reached through")
		router.in(t).ip("addr del " + hostAddr6 + "/128 dev lo")
		router.in(t).ip("-6 route del fd77::2")
	})
	t.Run("ARP", func(t *testing.T) {
		router.in(t).ip("addr add 10.77.0.99/24 dev down0")
		asker := router.in(t).listen("10.77.0.99:0", 0)
		send(t, asker, "who has", netip.MustParseAddrPort("10.77.0.2:9"))
		h.in(t).waitDropped("10.77.0.2 is on no network with ARP")
	})
	t.Run("neighbour solicitation", func(t *testing.T) {
		router.in(t).ip("addr add fd77::99/64 dev down0 nodad")
		asker := router.in(t).listen("[fd77::99]:0", 0)
		send(t, asker, "who has", netip.MustParseAddrPort("[fd77::2]:9"))
		deadline := time.Now().Add(patience)
		for {
			now := router.in(t).ip("-6 neigh show fd77::2")
			if strings.Contains(now, "FAILED") {
				break
			}
			if strings.Contains(now, "lladdr") || time.Now().After(deadline) {
				t.Fatalf("the neighbour is %s, want none", now)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}
