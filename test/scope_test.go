package test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// targetName is a name that only the proxy resolves, to the target's addresses.
const targetName = "target.example"

// newScoped makes a pair whose client has the given table [scope] and whose
// proxy resolves targetName.
func newScoped(t *testing.T, scope string) *pair {
	p := newPair(t, options{client: "\n[scope]\n" + scope + "\n"})
	check(t, p.Proxy.Resolve(targetName, lab.TargetIPv4, lab.TargetIPv6))
	return p
}

// wantRefused checks that a TCP connection from a host is answered by an ICMP
// error of the given type and code, which arrives at the interface.
func (p *pair) wantRefused(from *lab.Host, iface string, to netip.AddrPort, typ, code uint8) {
	p.t.Helper()
	c, err := from.Capture(iface, nil)
	check(p.t, err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	dialing, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		if conn, err := from.DialContext(dialing, "tcp", to.String()); err == nil {
			p.t.Errorf("a TCP connection from %s to %v succeeded", from.Name(), to)
			conn.Close()
		}
	}()
	_, err = c.Wait(ctx, func(pkt lab.Packet) bool {
		t, c, quoted := icmpError(pkt)
		return t == typ && c == code && quoted.proto == layers.IPProtocolTCP &&
			quoted.dst == to.Addr()
	})
	if err != nil {
		p.t.Errorf("a TCP connection from %s to %v: no ICMP error of type %d code %d: %v",
			from.Name(), to, typ, code, err)
	}
}

// quote is the packet that an ICMP error quotes.
type quote struct {
	dst   netip.Addr
	proto layers.IPProtocol
}

// icmpError returns the type, code and quoted packet of an ICMP error of either
// family.
func icmpError(pkt lab.Packet) (typ, code uint8, about quote) {
	var body []byte
	first := gopacket.LayerType(layers.LayerTypeIPv4)
	if l, ok := pkt.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		typ, code, body = l.TypeCode.Type(), l.TypeCode.Code(), l.Payload
	} else if l, ok := pkt.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok &&
		len(l.Payload) > 4 {
		typ, code, body = l.TypeCode.Type(), l.TypeCode.Code(), l.Payload[4:]
		first = layers.LayerTypeIPv6
	}
	quoted := gopacket.NewPacket(body, first, gopacket.Lazy)
	if l, ok := quoted.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
		about.dst, _ = netip.AddrFromSlice(l.DstIP.To4())
		about.proto = l.Protocol
	} else if l, ok := quoted.Layer(layers.LayerTypeIPv6).(*layers.IPv6); ok {
		about.dst, _ = netip.AddrFromSlice(l.DstIP)
		about.proto = l.NextHeader
	}
	return typ, code, about
}

// IP flow forwarding (RFC 9484 section 8.3): a tunnel to one host, by a name
// that the proxy resolves, for UDP only.
func TestIPFlowForwarding(t *testing.T) {
	p := newScoped(t, `target = "`+targetName+`"`+"\nipproto = 17")
	p.connect(p.Client, "alice")
	if s := p.status(p.Client, "alice"); len(s.Routes) != 2 ||
		s.Routes[0].Start != lab.TargetIPv4 || s.Routes[1].End != lab.TargetIPv6 ||
		s.Routes[0].Protocol != 17 {
		t.Errorf("routes %v", s.Routes)
	}
	for _, a := range []netip.Addr{lab.TargetIPv4, lab.TargetIPv6} {
		p.exchangeUDP(p.Client, p.Target, a, 8)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.ping(p.Target, client4, client6)
	for _, a := range []netip.Addr{client4, client6} {
		p.exchangeUDP(p.Target, p.Client, a, 8)
	}
	p.wantRefused(p.Client, "masque0", netip.AddrPortFrom(lab.TargetIPv4, 80), 3, 13)
	p.wantRefused(p.Client, "masque0", netip.AddrPortFrom(lab.TargetIPv6, 80), 1, 1)
	p.wantRefused(p.Target, "eth0", netip.AddrPortFrom(client4, 80), 3, 13)
	p.wantRefused(p.Target, "eth0", netip.AddrPortFrom(client6, 80), 1, 1)
	if n := p.status(p.Client, "alice").Drops["destination"]; n < 2 {
		t.Errorf("%d packets counted as dropped for their protocol", n)
	}
}

// A tunnel to one network carries TCP in both directions. Packets to other
// destinations that are forced into it are answered.
func TestScopedToANetwork(t *testing.T) {
	p := newScoped(t, `target = "192.0.2.0/28"`)
	p.connect(p.Client, "alice")
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 5<<20)
	p.transfer(p.Target, p.Client, client4, 5<<20)
	p.wantRoute(lab.TargetIPv4, "masque0")
	p.wantRoute(netip.MustParseAddr("192.0.2.17"), "eth0")
	p.throughDevice("192.0.2.17", "Net Unreachable") // no route, 3/0
	p.throughDevice("192.0.2.1", "Packet filtered")  // in the scope, but denied, 3/13
	// The proxy's own address is outside the scope too.
	p.throughDevice(proxy4.String(), "Net Unreachable")
}

// throughDevice pings an address through the interface of the tunnel, whatever
// the routes, and checks the error that ping prints.
func (p *pair) throughDevice(to, want string) {
	p.t.Helper()
	out, err := p.Client.Command(p.ctx, "ping", "-c", "1", "-W", "5", "-I", "masque0",
		to).CombinedOutput()
	if err == nil || !strings.Contains(string(out), want) {
		p.t.Errorf("ping of %s: %v, want %q\n%s", to, err, want, out)
	}
}
