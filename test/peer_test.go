package test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/federation"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
)

// The networks of the peers b.example and c.example.
var (
	netOfB = netip.MustParsePrefix("10.2.0.0/24")
	netOfC = netip.MustParsePrefix("10.3.0.0/24")
)

// peerConfig links a.example with b.example and c.example. The DNS server is on
// the target.
const peerConfig = `
[routes]
advertise = ["192.0.2.0/24"]
[federation]
domains = ["a.example"]
ca = "peers.crt"
nameservers = ["192.0.2.2"]
[[peer]]
domain = "b.example"
networks = ["10.2.0.0/24"]
reach = ["192.0.2.0/24", "10.3.0.0/24"]
[[peer]]
domain = "c.example"
networks = ["10.3.0.0/24"]
reach = ["192.0.2.0/24"]
`

// peering is a proxy with peers, which the test plays, on the hosts of clients.
type peering struct {
	*pair
	authority *pki.Authority // signs the certificates of peers
}

func newPeering(t *testing.T) *peering {
	t.Helper()
	p := &peering{pair: newHosts(t, options{clients: 2,
		behind: []netip.Prefix{netOfB, netOfC}})}
	p.must(p.Proxy, "masque-proxy", "init", "--name", lab.ProxyName, p.dir)
	authority, ca, err := pki.NewAuthority("peers", time.Now())
	check(t, err)
	p.authority = authority
	check(t, os.WriteFile(filepath.Join(p.dir, "peers.crt"), ca.Cert, 0o600))
	p.writeProxyConfig(peerConfig)
	p.startProxy()
	return p
}

// server returns a certificate for servers alone, signed by the peers'
// authority.
func (p *peering) server(name string) *tls.Certificate {
	p.t.Helper()
	pair, err := p.authority.Server(name, nil, time.Now())
	check(p.t, err)
	c := pkitest.KeyPair(pair)
	return &c
}

// dial connects a host to the proxy, with a certificate or nil.
func (p *peering) dial(host *lab.Host, cert *tls.Certificate) *http3.ClientConn {
	p.t.Helper()
	socket, err := host.ListenPacket("udp4", "0.0.0.0:0")
	check(p.t, err)
	transport := &quic.Transport{Conn: socket}
	p.t.Cleanup(func() {
		_ = transport.Close()
		_ = socket.Close()
	})
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(readFile(p.t, filepath.Join(p.dir, "ca.crt")))
	config := &tls.Config{RootCAs: roots, ServerName: lab.ProxyName,
		NextProtos: []string{http3.NextProtoH3}}
	if cert != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		}
	}
	conn, err := transport.Dial(p.ctx, net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.ProxyIPv4,
		443)), config, &quic.Config{EnableDatagrams: true})
	check(p.t, err)
	h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
	<-h3.ReceivedSettings()
	return h3
}

// ask requests a tunnel with the fields of header, and returns the answer.
func (p *peering) ask(h3 *http3.ClientConn, header http.Header) (*http.Response,
	*http3.RequestStream) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.ctx, http.MethodConnect,
		"https://"+lab.ProxyName+"/.well-known/masque/ip/*/*/", nil)
	check(p.t, err)
	req.Proto, req.Header = "connect-ip", header
	str, err := h3.OpenRequestStream(p.ctx)
	check(p.t, err)
	check(p.t, str.SendRequestHeader(req))
	rsp, err := str.ReadResponse()
	check(p.t, err)
	return rsp, str
}

// fieldsOf returns the header of a request for a pair.
func fieldsOf(from, to string) http.Header {
	h := http.Header{}
	federation.Pair{From: from, To: to}.SetFields(h)
	return h
}

// link connects a peer from a host, which advertises a network, and waits until
// the proxy routes it.
func (p *peering) link(host *lab.Host, domain string, network netip.Prefix) *http3.RequestStream {
	p.t.Helper()
	rsp, str := p.ask(p.dial(host, p.server(domain)), fieldsOf(domain, "a.example"))
	if rsp.StatusCode != http.StatusOK {
		p.t.Fatalf("status %d for %s", rsp.StatusCode, domain)
	}
	_, err := str.Write((&capsule.RouteAdvertisement{
		Routes: capsule.Routes([]netip.Prefix{network}, 0)}).Append(nil))
	check(p.t, err)
	p.eventually("the proxy routes "+network.String(), func() bool {
		return slices.ContainsFunc(p.sessions(), func(s proxy.SessionStatus) bool {
			return slices.Contains(s.Networks, network)
		})
	})
	return str
}

// echo sends an echo request into a tunnel.
func (p *peering) echo(str *http3.RequestStream, from, to string) {
	p.t.Helper()
	pkt := ippacket.AppendEcho([]byte{0}, netip.MustParseAddr(from), netip.MustParseAddr(to),
		64, true,
		7, 7, nil)
	check(p.t, str.SendDatagram(pkt))
}

// awaitEcho sends echo requests until an answer comes back.
func (p *peering) awaitEcho(str *http3.RequestStream, from, to string) {
	p.t.Helper()
	p.eventually(fmt.Sprintf("%s answers %s", to, from), func() bool {
		p.echo(str, from, to)
		ctx, cancel := context.WithTimeout(p.ctx, 200*time.Millisecond)
		defer cancel()
		for {
			b, err := str.ReceiveDatagram(ctx)
			if err != nil {
				return false
			}
			if pkt, err := ippacket.Parse(b[1:]); err == nil && pkt.Src.String() == to &&
				pkt.Dst.String() == from {
				return true
			}
		}
	})
}

// A peer whose certificate is for servers alone, as public authorities issue
// them, is accepted and carries packets both ways.
func TestPeerServerAuthOnly(t *testing.T) {
	p := newPeering(t)
	b := p.link(p.Client, "b.example", netOfB)
	p.awaitEcho(b, "10.2.0.5", lab.TargetIPv4.String())
	s := p.session()
	if s.Kind != "peer" || s.User != "b.example" {
		t.Errorf("the session is %s of %s, want peer of b.example", s.Kind, s.User)
	}
	if log := p.log(p.pair.server); !strings.Contains(log, `identity=certificate`) {
		t.Errorf("the log does not name the identity:\n%s", log)
	}
}

// A peer that asks for a domain which is not the proxy's gets 421, and the
// connection can still carry its pair. A stranger learns nothing.
func TestPeerNotHosted(t *testing.T) {
	p := newPeering(t)
	h3 := p.dial(p.Client, p.server("b.example"))
	for _, tc := range []struct {
		to   string
		want int
	}{{"x.example", 421}, {"a.example", 200}} {
		if rsp, _ := p.ask(h3, fieldsOf("b.example", tc.to)); rsp.StatusCode != tc.want {
			t.Errorf("status %d for %s, want %d", rsp.StatusCode, tc.to, tc.want)
		}
	}
	stranger := p.dial(p.Client, p.server("x.example"))
	if rsp, _ := p.ask(stranger, fieldsOf("x.example", "x.example")); rsp.StatusCode != 401 {
		t.Errorf("status %d for a stranger, want 401", rsp.StatusCode)
	}
}

// Packets of a peer to another peer, and from networks that are not its own, go
// nowhere.
func TestPeerForwardsNothingElse(t *testing.T) {
	p := newPeering(t)
	b := p.link(p.Client, "b.example", netOfB)
	c := p.link(p.Clients[1], "c.example", netOfC)
	p.awaitEcho(c, "10.3.0.5", lab.TargetIPv4.String())
	seen, err := p.Target.Capture("eth0", func(pkt lab.Packet) bool {
		return !pkt.Outgoing && pkt.Layer(layers.LayerTypeICMPv4) != nil
	})
	check(t, err)
	defer seen.Close()
	p.echo(b, "10.2.0.5", "10.3.0.5")                // transit
	p.echo(b, "10.3.0.5", lab.TargetIPv4.String())   // a source of another pair
	p.echo(b, "172.16.0.5", lab.TargetIPv4.String()) // a source of nobody
	p.echo(b, "10.2.0.5", "203.0.113.1")             // a destination out of reach
	p.awaitEcho(b, "10.2.0.5", lab.TargetIPv4.String())
	check(t, seen.Close())
	for _, pkt := range seen.Packets() {
		if src := pkt.NetworkLayer().NetworkFlow().Src().String(); src != "10.2.0.5" {
			t.Errorf("a packet from %s reached the target", src)
		}
	}
	ctx, cancel := context.WithTimeout(p.ctx, 300*time.Millisecond)
	defer cancel()
	for {
		d, err := c.ReceiveDatagram(ctx)
		if err != nil {
			break
		}
		if pkt, err := ippacket.Parse(d[1:]); err == nil && netOfB.Contains(pkt.Src) {
			t.Errorf("a packet from %v reached another peer", pkt.Src)
		}
	}
	drops := p.proxyStatus().Drops
	if drops["source"] < 2 {
		t.Errorf("drops %v, want 2 because of their source", drops)
	}
}

// Strangers do not make the proxy ask DNS or a web server: the capture sees no
// question before one of a peer that needs a delegation.
func TestPeerStranger(t *testing.T) {
	p := newPeering(t)
	asks := func(pkt lab.Packet) bool {
		if udp, ok := pkt.TransportLayer().(*layers.UDP); ok {
			return udp.DstPort == 53
		}
		tcp, ok := pkt.TransportLayer().(*layers.TCP)
		return ok && (tcp.DstPort == 53 || tcp.DstPort == 443 || tcp.DstPort == 80)
	}
	capture := func(iface string) *lab.Capture {
		c, err := p.Proxy.Capture(iface, func(pkt lab.Packet) bool {
			return pkt.Outgoing && asks(pkt)
		})
		check(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	seen := []*lab.Capture{capture("eth0"), capture("eth1")}
	other := pkitest.New("b.example").Proxy
	for _, tc := range []struct {
		name, from string
		cert       *tls.Certificate
	}{
		{"an unknown domain", "x.example", p.server("x.example")},
		{"an unknown domain that looks like a peer's", "xb.example", p.server("b.example")},
		{"an unknown authority", "b.example", &other},
		{"no certificate", "b.example", nil},
	} {
		rsp, _ := p.ask(p.dial(p.Client, tc.cert), fieldsOf(tc.from, "a.example"))
		user, _ := p.ask(p.dial(p.Client, nil), http.Header{"Authorization": {"Bearer x"}})
		rsp.Header.Del("Date")
		user.Header.Del("Date")
		if rsp.StatusCode != 401 || user.StatusCode != 401 ||
			fmt.Sprint(rsp.Header) != fmt.Sprint(user.Header) {
			t.Errorf("%s: got %d %v, a user %d %v", tc.name, rsp.StatusCode, rsp.Header,
				user.StatusCode, user.Header)
		}
	}
	for _, c := range seen {
		check(t, c.Close()) // no packet is missing after that
		for _, pkt := range c.Packets() {
			t.Errorf("the proxy sent %v", pkt)
		}
	}
	control := capture("eth1")
	rsp, _ := p.ask(p.dial(p.Client, p.server("gw.hoster.example")),
		fieldsOf("b.example", "a.example"))
	if rsp.StatusCode != 401 {
		t.Errorf("status %d without delegation, want 401", rsp.StatusCode)
	}
	// A question is captured here, so the test would have noticed others.
	_, err := control.Wait(p.ctx, asks)
	check(t, err)
}

// Users with certificates and tokens connect beside peers as before. Failures
// have the classes that they have without peers.
func TestPeerBesideUsers(t *testing.T) {
	p := newPeering(t)
	var ca pki.Pair
	ca.Cert = readFile(t, filepath.Join(p.dir, "ca.crt"))
	ca.Key = readFile(t, filepath.Join(p.dir, "ca.key"))
	users, err := pki.ParseAuthority(ca)
	check(t, err)
	user := func(a *pki.Authority, name string, since time.Duration) *tls.Certificate {
		pair, err := a.Client(name, time.Now().Add(-since), time.Hour)
		check(t, err)
		c := pkitest.KeyPair(pair)
		return &c
	}
	invited := p.invite("alice")
	for _, tc := range []struct {
		name  string
		cert  *tls.Certificate
		class string
	}{
		{"nothing", nil, "no_credentials"},
		{"another authority", user(p.authority, "alice", 0), "bad_certificate"},
		{"a server's certificate of the right authority", p.serverOf(users), "bad_certificate"},
		{"expired", user(users, "alice", 3*time.Hour), "expired_certificate"},
		{"unknown", user(users, "mallory", 0), "unknown_user"},
		{"not the invited one", user(users, "alice", 0), "old_certificate"},
	} {
		rsp, _ := p.ask(p.dial(p.Client, tc.cert), http.Header{})
		if rsp.StatusCode != 401 {
			t.Errorf("%s: status %d, want 401", tc.name, rsp.StatusCode)
		}
		p.eventually(tc.name+" has the class "+tc.class, func() bool {
			return strings.Count(p.log(p.pair.server), "class="+tc.class) > 0
		})
	}
	p.up(p.Clients[1], invited)
	p.ping(p.Clients[1], lab.TargetIPv4)
	b := p.link(p.Client, "b.example", netOfB)
	p.awaitEcho(b, "10.2.0.5", lab.TargetIPv4.String())
	p.ping(p.Clients[1], lab.TargetIPv4)
}

// serverOf returns a certificate for servers of an authority.
func (p *peering) serverOf(a *pki.Authority) *tls.Certificate {
	p.t.Helper()
	pair, err := a.Server("alice", nil, time.Now())
	check(p.t, err)
	c := pkitest.KeyPair(pair)
	return &c
}
