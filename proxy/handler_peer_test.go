package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
	"masquevpn/internal/pki/pkitest"
)

// peerCA is an authority of peers' certificates.
type peerCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newPeerCA(t testing.TB) *peerCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "peers"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &peerCA{c, key}
}

func (ca *peerCA) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// issue returns a certificate for servers alone, that is for names.
func (ca *peerCA) issue(t testing.TB, names ...string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(50 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// owners answers for the owners of domains. It counts the questions.
type owners struct {
	mu        sync.Mutex // guards the fields below
	file      string     // body of every delegation file; "" for status 404
	down      bool       // nobody answers
	ahead     time.Duration
	questions int
}

func (o *owners) change(f func(*owners)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(o)
}

func (o *owners) asked() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.questions
}

func (o *owners) Lookup(context.Context, string, discovery.Type) (discovery.Answer, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.questions++
	return discovery.Answer{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.80")},
		TTL: time.Hour}, nil
}

func (o *owners) fetch(context.Context, *url.URL, []netip.Addr) (*discovery.Response, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.questions++
	if o.down {
		return nil, errors.New("no answer")
	}
	status := http.StatusOK
	if o.file == "" {
		status = http.StatusNotFound
	}
	return &discovery.Response{Status: status, Header: http.Header{},
		Body: io.NopCloser(strings.NewReader(o.file))}, nil
}

func (o *owners) now() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Now().Add(o.ahead)
}

func (o *owners) resolver() *discovery.Resolver {
	return &discovery.Resolver{DNS: o, Fetch: o.fetch, Now: o.now, NoJitter: true,
		Hosts: func(string) []netip.Addr { return nil },
		Rand:  mathrand.New(mathrand.NewPCG(1, 2))}
}

var netC = netip.MustParsePrefix("10.3.0.0/24")

// peerHub is a hub that stands for a.example, whose peers are b.example with
// netB, which reaches the site a, and c.example with netC.
type peerHub struct {
	*hub
	ca     *peerCA
	owners *owners
}

func newPeerHub(t testing.TB, change func(*Config)) *peerHub {
	h := &peerHub{ca: newPeerCA(t), owners: new(owners)}
	h.hub = newHub(t, func(c *Config) {
		c.Sites = c.Sites[:1]
		c.Federation = Federation{Domains: []string{"a.example", "a2.example"}, CA: h.ca.pool(),
			Resolver: h.owners.resolver()}
		c.Peers = []Peer{
			{Domain: "b.example", Networks: []netip.Prefix{netB}, WellKnown: true,
				Reach: []netip.Prefix{netA, netC, netProxy}},
			{Domain: "c.example", Networks: []netip.Prefix{netC},
				Reach: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}},
			{Domain: "late.example", Expires: time.Now().Add(-time.Hour),
				Networks: []netip.Prefix{netip.MustParsePrefix("10.4.0.0/24")}},
		}
		if change != nil {
			change(c)
		}
	})
	return h
}

// dialAs connects a peer with a certificate, nil for none.
func (h *peerHub) dialAs(cert *tls.Certificate) (*quic.Conn, *http3.ClientConn) {
	h.t.Helper()
	config := &tls.Config{RootCAs: h.roots, ServerName: "localhost",
		NextProtos: []string{http3.NextProtoH3}}
	if cert != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		}
	}
	conn, err := quic.DialAddr(h.t.Context(), h.Addrs()[0].String(), config,
		&quic.Config{EnableDatagrams: true})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.CloseWithError(0, "") })
	h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
	<-h3.ReceivedSettings()
	return conn, h3
}

// pairHeader returns the fields of a request for a pair.
func pairHeader(from, to string) http.Header {
	header := http.Header{}
	federation.Pair{From: from, To: to}.SetFields(header)
	return header
}

// link asks for a pair on h3 and advertises networks.
func (h *peerHub) link(h3 *http3.ClientConn, from, to string, networks ...netip.Prefix) *gateway {
	h.t.Helper()
	rsp, str := request(h.t, h3, "CONNECT", "connect-ip", anyPath, pairHeader(from, to))
	if rsp.StatusCode != 200 {
		h.t.Fatalf("status %d\n%s", rsp.StatusCode, strings.Join(h.log.Lines(""), "\n"))
	}
	g := h.gateway(str)
	if len(networks) > 0 {
		g.advertise(networks...)
	}
	return g
}

// peer connects a peer with a certificate for its domain and links it.
func (h *peerHub) peer(domain string, networks ...netip.Prefix) *gateway {
	h.t.Helper()
	_, h3 := h.dialAs(h.ca.issue(h.t, domain))
	return h.link(h3, domain, "a.example", networks...)
}

// TestPeerAnswers checks the answers to requests for pairs, in their order.
func TestPeerAnswers(t *testing.T) {
	b := []string{"b.example"}
	for _, tc := range []struct {
		name        string
		names       []string // in the certificate; nil for none
		header      http.Header
		protocol    string // default: connect-ip
		path        string // default: any destination
		want        int
		proxyStatus string
		class       string
	}{
		{name: "a pair", names: b, header: pairHeader("b.example", "a.example"), want: 200},
		{name: "upper case", names: b, header: pairHeader("B.Example", "A.EXAMPLE."), want: 200},
		{name: "no to", names: b, header: http.Header{federation.FromHeader: {"b.example"}},
			want:        400,
			proxyStatus: "http_request_error"},
		{name: "two domains", header: http.Header{federation.FromHeader: {"b.example", "c.example"},
			federation.ToHeader: {"a.example"}}, want: 400, proxyStatus: "http_request_error"},
		{name: "no name", header: pairHeader("192.0.2.1", "a.example"), want: 400,
			proxyStatus: "http_request_error"},
		{name: "a scope", names: b, header: pairHeader("b.example", "a.example"), want: 400,
			path: "/.well-known/masque/ip/10.1.0.0%2F24/*/", proxyStatus: "http_request_error"},
		{name: "a stranger", names: []string{"x.example"}, header: pairHeader("x.example",
			"a.example"), want: 401, class: classUnknownPeer},
		{name: "a stranger, for a domain that is not ours", names: []string{"x.example"},
			header: pairHeader("x.example", "x.example"), want: 401, class: classUnknownPeer},
		{name: "no certificate", header: pairHeader("b.example", "a.example"), want: 401,
			class: federation.ClassMissing},
		{name: "a certificate for another", names: []string{"c.example"},
			header: pairHeader("b.example", "a.example"), want: 401,
			class: federation.ClassNotDelegated},
		{name: "a domain that is not ours", names: b, header: pairHeader("b.example", "x.example"),
			want: 421},
		{name: "a domain of ours that is not linked", names: b,
			header: pairHeader("b.example", "a2.example"), want: 403,
			proxyStatus: "http_request_denied"},
		{name: "expired", names: []string{"late.example"},
			header: pairHeader("late.example", "a.example"), want: 403,
			proxyStatus: "http_request_denied"},
		{name: "UDP", names: b, header: pairHeader("b.example", "a.example"),
			protocol: "connect-udp", path: "/.well-known/masque/udp/192.0.2.1/53/", want: 403,
			proxyStatus: "http_request_denied"},
		{name: "UDP of a stranger", header: pairHeader("x.example", "a.example"),
			protocol: "connect-udp", path: "/.well-known/masque/udp/192.0.2.1/53/", want: 401,
			class: classUnknownPeer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := newPeerHub(t, func(c *Config) { c.ConnectUDP = true })
			var cert *tls.Certificate
			if tc.names != nil {
				cert = h.ca.issue(t, tc.names...)
			}
			_, h3 := h.dialAs(cert)
			protocol, path := tc.protocol, tc.path
			if protocol == "" {
				protocol = "connect-ip"
			}
			if path == "" {
				path = anyPath
			}
			rsp, _ := request(t, h3, "CONNECT", protocol, path, tc.header)
			got := rsp.Header.Get("Proxy-Status")
			if rsp.StatusCode != tc.want || !strings.Contains(got, tc.proxyStatus) ||
				tc.proxyStatus == "" && got != "" {
				t.Errorf("status %d, Proxy-Status %q; want %d, %q", rsp.StatusCode, got, tc.want,
					tc.proxyStatus)
			}
			if tc.want == 401 && rsp.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("the answer to a peer differs from the answer to a user: %v", rsp.Header)
			}
			if lines := h.log.Lines("class=" + tc.class); tc.class != "" && len(lines) != 1 {
				t.Errorf("lines with class %s: %q", tc.class, lines)
			}
		})
	}
}

// TestPeerStranger checks that nobody can make the proxy ask for the domains of
// strangers, nor for a peer's by a certificate that no authority signed.
func TestPeerStranger(t *testing.T) {
	h := newPeerHub(t, nil)
	other := newPeerCA(t)
	for _, tc := range []struct {
		name string
		from string
		cert *tls.Certificate
	}{
		{"a stranger", "x.example", h.ca.issue(t, "x.example")},
		{"another authority", "b.example", other.issue(t, "b.example")},
		{"no certificate", "b.example", nil},
		{"a peer without delegation", "c.example", h.ca.issue(t, "gw.hoster.example")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, h3 := h.dialAs(tc.cert)
			rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
				pairHeader(tc.from, "a.example"))
			if n := h.owners.asked(); rsp.StatusCode != 401 || n != 0 {
				t.Errorf("status %d after %d questions, want 401 after none", rsp.StatusCode, n)
			}
		})
	}
}

// TestPeerCarriesPackets checks the packets, the routes and the status of a
// pair.
func TestPeerCarriesPackets(t *testing.T) {
	h := newPeerHub(t, func(c *Config) { c.DNS.Servers = []netip.Addr{netProxy.Addr().Next()} })
	a := h.connect("a", "", netA)
	b := h.peer("b.example", netB, netip.MustParsePrefix("10.5.0.0/24"))
	c := h.peer("c.example", netC)
	h.awaitInstalled(netA, netB, netC)

	t.Run("routes of the peer", func(t *testing.T) {
		b.awaitExactly(netA, netProxy) // not netC, which belongs to a peer
		c.awaitExactly(netA, netProxy)
	})
	t.Run("routes of the site", func(t *testing.T) { a.awaitRoutes(netB, netC, netProxy) })
	t.Run("packets", func(t *testing.T) {
		h.awaitAllowed(b, "10.2.0.5", "10.1.0.5")
		h.awaitDelivery(b, "10.1.0.5", "10.2.0.5")
		h.awaitDelivery(c, "10.1.0.5", "10.3.0.5")
	})
	t.Run("no transit", func(t *testing.T) {
		b.send("10.2.0.5", "10.3.0.5")
		b.awaitProhibited("10.2.0.5", "10.3.0.5")
	})
	t.Run("a source of another pair", func(t *testing.T) {
		before := h.sourceDrops()
		b.send("10.3.0.5", "10.1.0.5")
		h.eventually("the packet is dropped", func() bool {
			return h.sourceDrops() > before
		})
	})
	t.Run("a source that is advertised but not ours to give", func(t *testing.T) {
		before := h.sourceDrops()
		b.send("10.5.0.5", "10.1.0.5")
		h.eventually("the packet is dropped", func() bool {
			return h.sourceDrops() > before
		})
	})
	t.Run("status", func(t *testing.T) {
		i := slices.IndexFunc(h.Sessions(), func(s SessionStatus) bool {
			return s.Kind == KindPeer
		})
		s := h.Sessions()[i]
		if s.User != "b.example" || !slices.Equal(s.Networks, []netip.Prefix{netB}) ||
			len(s.DNS.Servers) != 0 {
			t.Errorf("got %+v", s)
		}
		if got := h.Status().Sessions; got != 3 {
			t.Errorf("%d sessions, want 3", got)
		}
	})
	t.Run("counts", func(t *testing.T) {
		got := h.Counters().Peers
		ok := PeerVerification{"certificate", "ok"}
		if got.Pairs["certificate"] != 2 || got.Requests[200] != 2 || got.Verifications[ok] != 2 {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("log", func(t *testing.T) {
		lines := h.log.Lines("peer connected")
		if len(lines) != 2 || !strings.Contains(lines[0], "domain=b.example local=a.example "+
			"identity=certificate policy=trusted connection=c1") {
			t.Errorf("got %q", lines)
		}
	})
}

// sourceDrops returns the number of packets dropped because of their source.
func (h *peerHub) sourceDrops() uint64 {
	return h.Counters().Stats.Receive.Drops()[connectip.DropSource.String()]
}

// awaitExactly waits until the proxy advertises want, and not its own address.
func (g *gateway) awaitExactly(want ...netip.Prefix) {
	g.hub.t.Helper()
	wanted := capsule.Routes(want, 0)
	var got []capsule.Route
	for {
		select {
		case got = <-g.routes:
			if slices.Equal(got, wanted) {
				return
			}
		case <-time.After(10 * time.Second):
			g.hub.t.Fatalf("the proxy advertised %v last, want %v", got, wanted)
		}
	}
}

// TestPeerStandsBy checks that the newest session of a pair carries its
// packets, and that the older one takes over when it ends.
func TestPeerStandsBy(t *testing.T) {
	h := newPeerHub(t, nil)
	first := h.peer("b.example", netB)
	h.awaitInstalled(netB)
	h.awaitDelivery(first, "192.0.2.9", "10.2.0.5")
	second := h.peer("b.example", netB)
	h.awaitDelivery(second, "192.0.2.9", "10.2.0.5")
	if got := len(h.peers.bindings.of(pairKey{"b.example", "a.example"})); got != 2 {
		t.Errorf("%d sessions are bound, want 2", got)
	}
	second.close()
	h.awaitDelivery(first, "192.0.2.9", "10.2.0.5")
	h.awaitInstalled(netB)
}

// TestPeerByDelegation checks identity by the delegation file: its loss ends
// the pair, and a failure of the web server does not.
func TestPeerByDelegation(t *testing.T) {
	h := newPeerHub(t, nil)
	h.owners.change(func(o *owners) { o.file = `{"masque.peer": "gw.hoster.example"}` })
	_, h3 := h.dialAs(h.ca.issue(t, "gw.hoster.example"))
	g := h.link(h3, "b.example", "a.example", netB)
	if lines := h.log.Lines("identity=well-known"); len(lines) != 1 {
		t.Fatalf("lines %q", lines)
	}
	pass := func(d time.Duration) {
		asked := h.owners.asked()
		h.owners.change(func(o *owners) { o.ahead += d })
		h.eventually("the owner is asked again", func() bool { return h.owners.asked() > asked })
	}
	h.owners.change(func(o *owners) { o.down = true })
	pass(20 * time.Hour) // the last fifth of the file's lifetime
	h.awaitAllowed(g, "10.2.0.5", "192.0.2.7")
	h.owners.change(func(o *owners) { o.down, o.file = false, `{"masque.peer": "x.example"}` })
	pass(2 * time.Hour)
	g.awaitReset()
	h.awaitInstalled()
	rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, pairHeader("b.example", "a.example"))
	if rsp.StatusCode != 401 {
		t.Errorf("status %d, want 401", rsp.StatusCode)
	}
}

// awaitReset waits until the proxy resets the stream with the code of a
// revocation.
func (g *gateway) awaitReset() {
	g.hub.t.Helper()
	select {
	case err := <-g.ended:
		var reset *http3.Error
		if !errors.As(err, &reset) || reset.ErrorCode != http3.ErrCodeRequestCanceled ||
			!reset.Remote {
			g.hub.t.Errorf("the stream ended with %v, want a reset with %v", err,
				http3.ErrCodeRequestCanceled)
		}
	case <-time.After(10 * time.Second):
		g.hub.t.Fatal("the stream does not end")
	}
}

// TestPeerReload checks which pairs a reload ends, and that others go on.
func TestPeerReload(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		ends   bool
		class  string
	}{
		{"nothing", func(*Config) {}, false, ""},
		{"removed", func(c *Config) { c.Peers = c.Peers[1:] }, true, "removed"},
		{"other local domain", func(c *Config) {
			c.Peers[0].Local = "a2.example"
		}, true, "removed"},
		{"other authority", func(c *Config) {
			c.Peers[0].CA = newPeerCA(t).pool()
		}, true, "identity"},
		{"same authority again", func(c *Config) { c.Peers[0].CA = c.Federation.CA.Clone() }, false,
			""},
		{"expired", func(c *Config) { c.Peers[0].Expires = time.Now().Add(-time.Minute) }, true,
			"expired"},
		{"less reach", func(c *Config) { c.Peers[0].Reach = []netip.Prefix{netProxy} }, false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := newPeerHub(t, nil)
			b, c := h.peer("b.example", netB), h.peer("c.example", netC)
			h.awaitInstalled(netB, netC)
			cfg := h.cfg
			cfg.Peers = slices.Clone(cfg.Peers)
			tc.change(&cfg)
			if _, err := h.Reload(cfg); err != nil {
				t.Fatal(err)
			}
			if tc.ends {
				b.awaitReset()
				h.awaitInstalled(netC)
				if got := h.Counters().Peers.Revocations[tc.class]; got != 1 {
					t.Errorf("%d revocations are counted, want 1", got)
				}
				lines := h.log.Lines("pair revoked")
				if len(lines) != 1 || !strings.Contains(lines[0], "class="+tc.class) {
					t.Errorf("lines %q", lines)
				}
			}
			h.awaitAllowed(c, "10.3.0.5", "192.0.2.7")
			if !tc.ends {
				h.awaitDelivery(b, "192.0.2.9", "10.2.0.5")
			}
		})
	}
}

// TestPeerIsProvedAgain checks that a connection on which a peer was proved,
// and whose pair has ended, is judged by the configuration of a reload.
func TestPeerIsProvedAgain(t *testing.T) {
	h := newPeerHub(t, nil)
	_, h3 := h.dialAs(h.ca.issue(t, "b.example"))
	h.link(h3, "b.example", "a.example").close()
	h.eventually("the pair has ended", func() bool { return len(h.Sessions()) == 0 })
	cfg := h.cfg
	cfg.Peers = slices.Clone(cfg.Peers)
	cfg.Peers[0].CA = newPeerCA(t).pool()
	if _, err := h.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, pairHeader("b.example", "a.example"))
	if rsp.StatusCode != 401 {
		t.Errorf("status %d, want 401", rsp.StatusCode)
	}
}

// TestPeerByPin checks that a key in pins needs no authority, until a reload
// removes it.
func TestPeerByPin(t *testing.T) {
	for _, policy := range []federation.Policy{federation.Trusted, federation.Encrypted} {
		t.Run(policy.String(), func(t *testing.T) {
			cert := newPeerCA(t).issue(t, "whoever.example")
			leaf, err := x509.ParseCertificate(cert.Certificate[0])
			if err != nil {
				t.Fatal(err)
			}
			h := newPeerHub(t, func(c *Config) {
				c.Peers[0].Policy = policy
				c.Peers[0].Pins = [][32]byte{federation.PinOf(leaf)}
			})
			_, h3 := h.dialAs(cert)
			g := h.link(h3, "b.example", "a.example", netB)
			if n := len(h.log.Lines("identity=pin policy=" + policy.String())); n != 1 {
				t.Errorf("%d lines have the identity, want 1", n)
			}
			cfg := h.cfg
			cfg.Peers = slices.Clone(cfg.Peers)
			cfg.Peers[0].Pins = [][32]byte{{1}}
			if _, err := h.Reload(cfg); err != nil {
				t.Fatal(err)
			}
			g.awaitReset()
		})
	}
}

// TestPeerExpires checks that a pair ends when its time is over.
func TestPeerExpires(t *testing.T) {
	h := newPeerHub(t, func(c *Config) { c.Peers[0].Expires = time.Now().Add(2 * time.Second) })
	h.peer("b.example", netB).awaitReset()
}

// TestPeerKicked checks that the operator ends a pair by a reset.
func TestPeerKicked(t *testing.T) {
	h := newPeerHub(t, nil)
	g := h.peer("b.example", netB)
	if !h.Kick(h.Sessions()[0].ID) {
		t.Fatal("there is no session")
	}
	g.awaitReset()
}

// TestPeerLimits checks the limits of pairs and of requests on a connection.
func TestPeerLimits(t *testing.T) {
	h := newPeerHub(t, func(c *Config) { c.MaxSessionsPerUser = 1000 })
	_, h3 := h.dialAs(h.ca.issue(t, "b.example"))
	statuses := make(map[int]int)
	for range 40 {
		rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
			pairHeader("b.example", "a.example"))
		statuses[rsp.StatusCode]++
		if rsp.StatusCode == 429 && !strings.Contains(rsp.Header.Get("Proxy-Status"),
			"connection_limit_reached") {
			t.Fatalf("Proxy-Status %q", rsp.Header.Get("Proxy-Status"))
		}
	}
	if statuses[200] < 20 || statuses[200] > maxPairs || statuses[429] == 0 ||
		statuses[200]+statuses[429] != 40 {
		t.Errorf("got %v", statuses)
	}
}

// TestPeerIsNoUser checks that a user with the name of a peer's domain and the
// peer do not share limits, and that neither ends the other.
func TestPeerIsNoUser(t *testing.T) {
	h := newPeerHub(t, func(c *Config) {
		c.Users = byToken{"a", "b.example"}
		c.MaxSessionsPerUser = 1
	})
	g := h.peer("b.example", netB)
	user := h.connect("b.example", "")
	h.UsersChanged()
	h.awaitInstalled(netB)
	h.awaitAllowed(g, "10.2.0.5", "192.0.2.7")
	h.awaitAllowed(user, user.own[0].String(), "192.0.2.7")
}

// TestFirstPeerByReload checks that a proxy which gets its first peer by a
// reload asks new connections for a certificate, and that users with
// certificates keep their access and their classes.
func TestFirstPeerByReload(t *testing.T) {
	in := pkitest.New("users")
	pair, err := in.Authority.Client("a", time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	user := pkitest.KeyPair(pair)
	h := newPeerHub(t, func(c *Config) {
		c.Methods = []string{MethodMTLS, MethodToken}
		c.TLS.ClientCAs = in.Roots
		c.Peers = nil
	})
	bad := h.ca.issue(t, "b.example")
	ask := func(cert *tls.Certificate, header http.Header) int {
		t.Helper()
		_, h3 := h.dialAs(cert)
		rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, header)
		return rsp.StatusCode
	}
	if got := ask(&user, http.Header{}); got != 200 {
		t.Errorf("a user before the reload: status %d", got)
	}
	cfg := h.cfg
	cfg.Peers = []Peer{{Domain: "b.example", Networks: []netip.Prefix{netB}}}
	if _, err := h.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		cert   *tls.Certificate
		header http.Header
		want   int
		class  string
	}{
		{"a user", &user, http.Header{}, 200, ""},
		{"a user with a token", nil, http.Header{"Authorization": {"Bearer a"}}, 200, ""},
		{"a user with both", &user, http.Header{"Authorization": {"Bearer a"}}, 200, ""},
		{"a user with the token of another", &user, http.Header{"Authorization": {"Bearer b"}}, 401,
			classMismatch},
		{"a user with a bad certificate", bad, http.Header{}, 401, classBadCertificate},
		{"a token with a bad certificate", bad, http.Header{"Authorization": {"Bearer a"}}, 401,
			classBadCertificate},
		{"the peer", bad, pairHeader("b.example", "a.example"), 200, ""},
		{"the peer with a user's certificate", &user, pairHeader("b.example", "a.example"), 401,
			federation.ClassBad},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := len(h.log.Lines("class=" + tc.class))
			if got := ask(tc.cert, tc.header); got != tc.want {
				t.Errorf("status %d, want %d", got, tc.want)
			}
			if tc.class != "" && len(h.log.Lines("class="+tc.class)) != before+1 {
				t.Errorf("no line with class %s", tc.class)
			}
		})
	}
}
