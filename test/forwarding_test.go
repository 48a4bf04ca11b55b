package test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// hops returns the addresses that a traceroute to an address shows.
func (p *pair) hops(from *lab.Host, to netip.Addr) []netip.Addr {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	hops, err := from.Traceroute(ctx, to, 8, 5*time.Second)
	check(p.t, err)
	var out []netip.Addr
	for _, h := range hops {
		out = append(out, h.From)
	}
	return out
}

// Each kernel that forwards a packet decrements its hop limit, and so does the
// endpoint when a forwarded packet enters the tunnel. Packets of the host
// itself enter unchanged (RFC 9484 section 7.2).
func TestHopLimit(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")

	t.Run("client to target", func(t *testing.T) {
		if got := p.hops(p.Client, lab.TargetIPv4); !slices.Equal(got,
			[]netip.Addr{proxy4, lab.TargetIPv4}) {
			t.Errorf("hops %v", got)
		}
		if got := p.hops(p.Client, lab.TargetIPv6); !slices.Equal(got,
			[]netip.Addr{proxy6, lab.TargetIPv6}) {
			t.Errorf("hops %v", got)
		}
		p.wantHopLimit(p.Client, lab.TargetIPv4, p.Target, "eth0", 63)
		p.wantHopLimit(p.Client, lab.TargetIPv6, p.Target, "eth0", 63)
	})
	t.Run("target to client", func(t *testing.T) {
		near4, near6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:3::1")
		if got := p.hops(p.Target, client4); !slices.Equal(got,
			[]netip.Addr{near4, proxy4, client4}) {
			t.Errorf("hops %v", got)
		}
		if got := p.hops(p.Target, client6); !slices.Equal(got,
			[]netip.Addr{near6, proxy6, client6}) {
			t.Errorf("hops %v", got)
		}
		p.wantHopLimit(p.Target, client4, p.Client, "masque0", 62)
		p.wantHopLimit(p.Target, client6, p.Client, "masque0", 62)
	})
	t.Run("proxy to client", func(t *testing.T) {
		p.wantHopLimit(p.Proxy, client4, p.Client, "masque0", 64)
	})
}

// wantHopLimit checks the hop limit with which an echo request arrives at an
// interface. It is sent with 64.
func (p *pair) wantHopLimit(from *lab.Host, to netip.Addr, at *lab.Host, iface string, want uint8) {
	p.t.Helper()
	c, err := at.Capture(iface, nil)
	check(p.t, err)
	defer c.Close()
	p.ping(from, to)
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	var got uint8
	_, err = c.Wait(ctx, func(pkt lab.Packet) bool {
		if l, ok := pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok &&
			l.DstIP.String() == to.String() {
			got = l.TTL
			return true
		}
		if l, ok := pkt.Layer(layers.LayerTypeIPv6).(*layers.IPv6); ok &&
			l.DstIP.String() == to.String() {
			got = l.HopLimit
			return true
		}
		return false
	})
	if err != nil || got != want {
		p.t.Errorf("a packet from %s to %v arrives with hop limit %d, want %d (%v)", from.Name(),
			to, got, want, err)
	}
}

// On a path with an MTU of 1400 bytes, packets that are too big for the tunnel
// are answered with the MTU of the tunnel, and TCP works.
func TestPathMTU(t *testing.T) {
	p := newPair(t, options{mtu: 1400})
	p.connect(p.Client, "alice")
	mtu := p.status(p.Client, "alice").MTU
	if mtu < 1280 || mtu > 1400-48 {
		t.Fatalf("the tunnel's MTU is %d on a path of 1400", mtu)
	}
	for to, size := range map[netip.Addr]int{client4: 1390, client6: 1390} {
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		a, err := p.Target.Probe(ctx, lab.Probe{To: to, Size: size, DontFragment: true})
		cancel()
		typ, code := 3, 4
		if to.Is6() {
			typ, code = 2, 0
		}
		// Path MTU discovery may have raised the MTU since it was read.
		if err != nil || a.Type != typ || a.Code != code || a.MTU < mtu || a.MTU > 1400-48 {
			t.Errorf("%d bytes to %v: %v, %v; want type %d code %d and an MTU of %d", size, to, a,
				err, typ, code, mtu)
		}
	}
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 10<<20)
	p.transfer(p.Target, p.Client, client6, 10<<20)
}

// A packet with a source that is not assigned to the client is dropped, counted
// and answered.
func TestSpoofedSource(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	c, err := p.Target.Capture("eth0", nil)
	check(t, err)
	defer c.Close()
	out, _ := p.Client.Command(p.ctx, "ping", "-c", "2", "-i", "0.2", "-W", "2", "-I",
		lab.ClientIPv4.String(), lab.TargetIPv4.String()).CombinedOutput()
	if !strings.Contains(string(out), "Packet filtered") {
		t.Errorf("not answered with Communication Administratively Prohibited:\n%s", out)
	}
	if n := p.status(p.Client, "alice").Drops["source"]; n < 2 {
		t.Errorf("%d packets counted as dropped for their source", n)
	}
	p.ping(p.Client, lab.TargetIPv4) // the right source passes
	for _, pkt := range c.Packets() {
		if l, ok := pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok &&
			l.SrcIP.String() == lab.ClientIPv4.String() {
			t.Errorf("a packet with the source %v reached the target", lab.ClientIPv4)
		}
	}
}

// Clients that are connected at the same time have different addresses, and
// reach each other only if the proxy allows it.
func TestThreeClients(t *testing.T) {
	for name, open := range map[string]bool{"isolated": false, "client to client": true} {
		t.Run(name, func(t *testing.T) {
			o := options{clients: 3}
			if open {
				o.proxy = "[routes]\nadvertise = [\"0.0.0.0/0\", \"::/0\"]\nclient_to_client = true\n"
			}
			p := newPair(t, o)
			var addrs []netip.Addr
			for i, user := range []string{"alice", "bob", "carol"} {
				p.connect(p.Clients[i], user)
				s := p.status(p.Clients[i], user)
				for _, a := range s.Addresses {
					if slices.Contains(addrs, a.Addr()) {
						t.Errorf("%v is given out twice", a)
					}
					addrs = append(addrs, a.Addr())
				}
			}
			if len(addrs) != 6 {
				t.Fatalf("addresses %v, want two for each client", addrs)
			}
			for i, host := range p.Clients {
				p.ping(host, lab.TargetIPv4, lab.TargetIPv6)
				other4, other6 := addrs[(2*i+2)%6], addrs[(2*i+3)%6]
				if open {
					p.ping(host, other4, other6)
					continue
				}
				p.wantUnreachable(host, other4, 3, 13)
				p.wantUnreachable(host, other6, 1, 1)
			}
		})
	}
}

// Clients cannot reach the proxy's own addresses outside the tunnel, nor unused
// addresses of the pool.
func TestUnreachable(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	p.ping(p.Client, proxy4, proxy6) // in the tunnel
	p.wantUnreachable(p.Client, netip.MustParseAddr("192.0.2.1"), 3, 13)
	p.wantUnreachable(p.Client, netip.MustParseAddr("2001:db8:3::1"), 1, 1)
	p.wantUnreachable(p.Target, netip.MustParseAddr("10.77.0.99"), 3, 1)
	p.wantUnreachable(p.Target, netip.MustParseAddr("fd77::99"), 1, 3)
}

// With address translation the target needs no route to the pool. Afterwards
// both hosts are as before.
func TestMasquerade(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	before, beforeProxy := p.snapshot(p.Client), p.snapshot(p.Proxy)
	p.editProxyConfig("masquerade = false", "masquerade = true")
	p.startProxy()
	p.connect(p.Client, "alice")
	c, err := p.Target.Capture("eth0", nil)
	check(t, err)
	defer c.Close()
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	for _, pkt := range c.Packets() {
		if l, ok := pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok &&
			pool4.Contains(netip.AddrFrom4([4]byte(l.SrcIP.To4()))) {
			t.Errorf("the target saw %v", l.SrcIP)
		}
	}
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 10<<20)
	p.down(p.Client, "alice")
	p.stopProxy()
	p.wantUnchanged(p.Client, before)
	p.wantUnchanged(p.Proxy, beforeProxy)
}
