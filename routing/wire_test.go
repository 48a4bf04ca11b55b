package routing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// These tests send packets between a host and a router, which also has the
// proxy's address.
const (
	hostAddr4, hostAddr6     = "192.168.5.2", "2001:db8:5::2"
	routerAddr4, routerAddr6 = "192.168.5.1", "2001:db8:5::1"
	proxyAddr4, proxyAddr6   = "203.0.113.1", "2a00::1"

	// patience limits the time to wait for an expected packet.
	patience = 20 * time.Second
)

// connect creates a host with the interface up0 and the router at the other end
// of the link.
func connect(t *testing.T) (h, router *host) {
	t.Helper()
	h, router = newHost(t), newHost(t)
	h.do(func() {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "down0",
			PeerNamespace: netlink.NsFd(router.ns),
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	h.ip("link set up0 addrgenmode none up")
	router.ip("link set down0 addrgenmode none up")
	h.waitFor("up0", netlink.OperUp)
	router.waitFor("down0", netlink.OperUp)
	h.ip("addr add " + hostAddr4 + "/24 dev up0")
	h.ip("addr add " + hostAddr6 + "/64 dev up0 nodad")
	h.ip("route add default via " + routerAddr4)
	h.ip("-6 route add default via " + routerAddr6)
	router.ip("addr add " + routerAddr4 + "/24 dev down0")
	router.ip("addr add " + routerAddr6 + "/64 dev down0 nodad")
	router.ip("addr add " + proxyAddr4 + "/32 dev lo")
	router.ip("addr add " + proxyAddr6 + "/128 dev lo nodad")
	return h, router
}

// listen opens a UDP socket on the host. Reads fail after patience.
func (h *host) listen(addr string, mark uint32) *net.UDPConn {
	h.t.Helper()
	var c net.PacketConn
	h.do(func() {
		var err error
		lc := net.ListenConfig{Control: MarkSocket(mark)}
		if c, err = lc.ListenPacket(context.Background(), "udp", addr); err != nil {
			h.t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
	})
	h.t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

func port(c *net.UDPConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func send(t *testing.T, c *net.UDPConn, text string, to netip.AddrPort) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(text), to); err != nil {
		t.Fatalf("send %q to %v: %v", text, to, err)
	}
}

func receive(t *testing.T, c *net.UDPConn) (text string, from netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 2000)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return string(buf[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// reverseFiltered returns the number of packets dropped by the reverse path
// filter.
func (h *host) reverseFiltered() (n int) {
	h.t.Helper()
	h.do(func() {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			h.t.Fatal(err)
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if fields[0] != "TcpExt:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i, name := range names {
				if name == "IPReversePathFilter" {
					n, err = strconv.Atoi(fields[i])
				}
			}
		}
		if names == nil || err != nil {
			h.t.Fatalf("no counter of the reverse path filter: %v", err)
		}
	})
	return n
}

// With a full tunnel and strict reverse path filters, outer sockets receive
// replies and ICMP errors.
func TestStrictReversePathFilter(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	h.sysctl("net/ipv4/conf/all/rp_filter", "1")
	h.sysctl("net/ipv4/conf/up0/rp_filter", "1")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())

	for _, proxy := range []string{proxyAddr4, proxyAddr6} {
		t.Run(proxy, func(t *testing.T) {
			h, router := h.in(t), router.in(t)
			server := router.listen(net.JoinHostPort(proxy, "0"), 0)
			outer := h.listen(":0", DefaultMark)
			for range 3 {
				send(t, outer, "request",
					netip.AddrPortFrom(netip.MustParseAddr(proxy), port(server)))
				text, from := receive(t, server)
				if text != "request" {
					t.Errorf("the proxy received %q", text)
				}
				send(t, server, "reply", from)
				if text, _ := receive(t, outer); text != "reply" {
					t.Errorf("the outer socket received %q", text)
				}
			}
			// A closed port is answered with ICMP port unreachable.
			to := netip.AddrPortFrom(netip.MustParseAddr(proxy), port(server))
			server.Close()
			var c net.Conn
			h.do(func() {
				d := net.Dialer{Control: MarkSocket(DefaultMark)}
				var err error
				if c, err = d.Dial("udp", to.String()); err != nil {
					t.Fatal(err)
				}
			})
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			if _, err := c.Write([]byte("anyone?")); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("read from a socket to a closed port: %v, want connection refused", err)
			}
		})
	}
	if n := h.reverseFiltered(); n != 0 {
		t.Errorf("%d packets were dropped by the reverse path filter", n)
	}

	// Without the chains of Apply, the filter drops the reply.
	h.run("nft", "flush chain inet masque-one restore; flush chain inet masque-one outer")
	server := router.listen(net.JoinHostPort(proxyAddr4, "0"), 0)
	outer := h.listen(":0", DefaultMark)
	send(t, outer, "request", netip.AddrPortFrom(netip.MustParseAddr(proxyAddr4), port(server)))
	_, from := receive(t, server)
	send(t, server, "reply", from)
	for deadline := time.Now().Add(patience); h.reverseFiltered() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the filter drops nothing without the chains either: the test is void")
		}
	}
}

// Packets to a tunnel address are accepted from the tunnel and the host itself,
// but not from the LAN.
func TestTunnelAddressIsGuarded(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	for _, tt := range []struct{ name, tunnel, lan, via, from string }{
		{"IPv4", "10.77.0.2", hostAddr4, hostAddr4, routerAddr4},
		{"IPv6", "fd77::2", hostAddr6, hostAddr6, routerAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := h.in(t), router.in(t)
			router.ip("route add " + tt.tunnel + " via " + tt.via)
			service := h.listen(":0", 0)
			attacker := router.listen(net.JoinHostPort(tt.from, "0"), 0)
			send(t, attacker, "to the tunnel",
				netip.AddrPortFrom(netip.MustParseAddr(tt.tunnel), port(service)))
			send(t, attacker, "to the LAN",
				netip.AddrPortFrom(netip.MustParseAddr(tt.lan), port(service)))
			if text, _ := receive(t, service); text != "to the LAN" {
				t.Errorf("received %q from the LAN at %s", text, tt.tunnel)
			}
			local := h.listen(net.JoinHostPort(tt.tunnel, "0"), 0)
			send(t, local, "from the host",
				netip.AddrPortFrom(netip.MustParseAddr(tt.tunnel), port(service)))
			if text, _ := receive(t, service); text != "from the host" {
				t.Errorf("received %q from the host itself at %s", text, tt.tunnel)
			}
		})
	}
}

// A packet from the tunnel must not have a source address of this host, except
// the tunnel's address, which ICMP errors of the tunnel's end have.
func TestTunnelDoesNotSpoofTheHost(t *testing.T) {
	h, _ := connect(t)
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	for _, tt := range []struct{ name, own, lan string }{
		{"IPv4", "10.77.0.2", hostAddr4},
		{"IPv6", "fd77::2", hostAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			service := h.listen(":0", 0)
			dst := netip.AddrPortFrom(netip.MustParseAddr(tt.own), port(service))
			for _, src := range []string{tt.lan, tt.own} {
				if _, err := device.Write(udpPacket(t,
					netip.AddrPortFrom(netip.MustParseAddr(src), 9),
					dst, "from "+src)); err != nil {
					t.Fatal(err)
				}
			}
			if text, _ := receive(t, service); text != "from "+tt.own {
				t.Errorf("received %q from the tunnel", text)
			}
		})
	}
}

// A proxy forwards packets between the tunnel and its network, and translates
// the addresses of clients to its own.
func TestForwardAndMasquerade(t *testing.T) {
	h, router := connect(t)
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, State{
		Addresses: prefixes("10.77.0.1/32", "fd77::1/128"),
		Routes:    prefixes("10.77.0.0/24", "fd77::/64"),
		Forward:   true, Masquerade: prefixes("10.77.0.0/24", "fd77::/64"),
	})
	for _, tt := range []struct{ name, client, server, proxy string }{
		{"IPv4", "10.77.0.9", proxyAddr4, hostAddr4},
		{"IPv6", "fd77::9", proxyAddr6, hostAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			router := router.in(t)
			server := router.listen(net.JoinHostPort(tt.server, "0"), 0)
			src := netip.AddrPortFrom(netip.MustParseAddr(tt.client), 4000)
			dst := netip.AddrPortFrom(netip.MustParseAddr(tt.server), port(server))
			if _, err := device.Write(udpPacket(t, src, dst, "request")); err != nil {
				t.Fatal(err)
			}
			text, from := receive(t, server)
			if text != "request" || from.Addr().String() != tt.proxy {
				t.Errorf("the server received %q from %v, want it from %s", text, from, tt.proxy)
			}
			send(t, server, "reply", from)
			if got := readTUN(t, device, "reply"); !bytes.Equal(got[len(got)-5:],
				[]byte("reply")) ||
				!bytes.Contains(got, src.Addr().AsSlice()) {
				t.Errorf("reply in the tunnel: %x, want it to %v", got, src)
			}
		})
	}
	// Addresses are not translated between clients.
	if _, err := device.Write(udpPacket(t, netip.MustParseAddrPort("10.77.0.9:1"),
		netip.MustParseAddrPort("10.77.0.8:2"), "hello")); err != nil {
		t.Fatal(err)
	}
	got := readTUN(t, device, "hello")
	if !bytes.Contains(got, []byte{10, 77, 0, 9, 10, 77, 0, 8}) {
		t.Errorf("between clients: %x, want source and destination unchanged", got)
	}
}

// udpPacket returns an IP packet with a UDP datagram.
func udpPacket(t *testing.T, src, dst netip.AddrPort, text string) []byte {
	t.Helper()
	udp := &layers.UDP{SrcPort: layers.UDPPort(src.Port()), DstPort: layers.UDPPort(dst.Port())}
	var ip interface {
		gopacket.SerializableLayer
		gopacket.NetworkLayer
	}
	if src.Addr().Is4() {
		ip = &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP,
			SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
	} else {
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP,
			SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
	}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, opts, ip, udp, gopacket.Payload(text)); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// readTUN returns the next packet from the device that ends with text.
func readTUN(t *testing.T, device *os.File, text string) []byte {
	t.Helper()
	buf := make([]byte, 2000)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		p := []unix.PollFd{{Fd: int32(device.Fd()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 100); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		} else if n <= 0 {
			continue
		}
		n, err := device.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if n > 20 && buf[0]>>4 == 4 && buf[9] == unix.IPPROTO_ICMP &&
			buf[20] == layers.ICMPv4TypeRedirect {
			t.Errorf("ICMP redirect into the tunnel: %x", buf[:n])
		} else if bytes.HasSuffix(buf[:n], []byte(text)) {
			return buf[:n]
		}
	}
	t.Fatalf("no packet with %q came out of the tunnel", text)
	return nil
}

func TestMarkSocket(t *testing.T) {
	h := newHost(t)
	for _, mark := range []uint32{0, DefaultMark, 1 << 31} {
		t.Run(fmt.Sprintf("%#x", mark), func(t *testing.T) {
			c := h.in(t).listen("127.0.0.1:0", mark)
			raw, err := c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var got int
			if cerr := raw.Control(func(fd uintptr) {
				got, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
			}); cerr != nil || err != nil {
				t.Fatal(cerr, err)
			}
			if uint32(got) != mark {
				t.Errorf("mark of the socket is %#x, want %#x", got, mark)
			}
		})
	}
}

// With HoldDNS, DNS queries outside the tunnel fail immediately, except those
// with the mark. Packets to other ports pass.
func TestHoldDNS(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	state := State{Addresses: prefixes("10.77.0.2/32", "fd77::2/128"),
		Routes: prefixes("0.0.0.0/0", "::/0"), HostRoutes: HostAll, HoldDNS: true}
	h.apply(m, state)
	for _, addr := range []string{routerAddr4, routerAddr6} {
		for _, port := range []uint16{53, 853, 54} {
			t.Run(fmt.Sprintf("%s, port %d", addr, port), func(t *testing.T) {
				h, router := h.in(t), router.in(t)
				to := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
				server := router.listen(to.String(), 0)
				for _, mark := range []uint32{DefaultMark, 0} {
					var err error
					h.do(func() {
						d := net.Dialer{Control: MarkSocket(mark)}
						var c net.Conn
						if c, err = d.Dial("udp", to.String()); err != nil {
							return
						}
						defer c.Close()
						if _, err = c.Write([]byte("query")); err == nil {
							if text, _ := receive(t, server); text != "query" {
								t.Errorf("%v got %q", to, text)
							}
						}
					})
					if failed := err != nil; failed != (port != 54 && mark == 0) {
						t.Errorf("with mark %d: %v", mark, err)
					}
				}
				h.do(func() {
					c, err := net.DialTimeout("tcp", to.String(), patience)
					if err == nil {
						c.Close()
					}
					// The router refuses the connection, because it has no
					// server.
					if refused := errors.Is(err, syscall.ECONNREFUSED); refused != (port == 54) {
						t.Errorf("TCP: %v", err)
					}
				})
			})
		}
	}
	state.HoldDNS = false
	h.apply(m, state)
	h.do(func() {
		c, err := net.Dial("udp", routerAddr4+":53")
		if err == nil {
			defer c.Close()
			_, err = c.Write([]byte("query"))
		}
		if err != nil {
			t.Errorf("without HoldDNS: %v", err)
		}
	})
	h.close(m)
	h.wantSnapshot(before)
}
