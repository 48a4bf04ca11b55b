package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go.uber.org/goleak"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a proxy on loopback and returns an HTTP/3 connection to it.
func start(t *testing.T, change func(*Config)) *http3.ClientConn {
	t.Helper()
	_, h3 := startServer(t, change).dial(t, nil)
	return h3
}

// running is a proxy on loopback.
type running struct {
	*Server
	roots *x509.CertPool
	stop  func() // stops the proxy and waits for it; idempotent
}

// startServer runs a proxy on loopback until the test ends.
func startServer(t testing.TB, change func(*Config)) running {
	t.Helper()
	in := pkitest.New("localhost")
	cfg := Config{
		Name: "localhost", Listen: []string{"127.0.0.1:0"},
		TLS:     &tls.Config{Certificates: []tls.Certificate{in.Proxy}},
		Methods: []string{MethodNone}, Pool4: netip.MustParsePrefix("10.77.0.0/24"),
		Advertise: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"),
			netip.MustParsePrefix("::/0")},
		OpenDevice:  func() (Device, error) { return tuntest.New(1400), nil },
		OpenNetwork: func(Device) (Network, error) { return new(routingtest.Network), nil },
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r := running{Server: s, roots: in.Roots}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	t.Cleanup(r.stop)
	<-s.Ready()
	return r
}

// dial connects another client.
func (r running) dial(t testing.TB, change func(*quic.Config)) (*quic.Conn, *http3.ClientConn) {
	t.Helper()
	conf := &quic.Config{EnableDatagrams: true}
	if change != nil {
		change(conf)
	}
	conn, err := quic.DialAddr(t.Context(), r.Addrs()[0].String(),
		&tls.Config{RootCAs: r.roots, ServerName: "localhost",
			NextProtos: []string{http3.NextProtoH3}}, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseWithError(0, "") })
	h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
	<-h3.ReceivedSettings()
	return conn, h3
}

// send sends one request and returns its stream.
func send(t testing.TB, h3 *http3.ClientConn, method, protocol, path string,
	header http.Header) *http3.RequestStream {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://localhost"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if protocol != "" {
		req.Proto = protocol
	}
	for k, v := range header {
		req.Header[k] = v
	}
	str, err := h3.OpenRequestStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := str.SendRequestHeader(req); err != nil {
		t.Fatal(err)
	}
	return str
}

// request sends one request and returns the response and the stream.
func request(t testing.TB, h3 *http3.ClientConn, method, protocol, path string,
	header http.Header) (*http.Response, *http3.RequestStream) {
	t.Helper()
	str := send(t, h3, method, protocol, path, header)
	rsp, err := str.ReadResponse()
	if err != nil {
		t.Fatal(err)
	}
	return rsp, str
}

const anyPath = "/.well-known/masque/ip/*/*/"

func TestRequests(t *testing.T) {
	h3 := start(t, func(c *Config) { c.Template = "https://localhost/vpn{?target,ipproto}" })
	for _, tc := range []struct {
		name, method, protocol, path string
		status                       int
	}{
		{"default template", "CONNECT", "connect-ip", anyPath, 200},
		{"configured template", "CONNECT", "connect-ip", "/vpn?target=*&ipproto=*", 200},
		{"other protocol", "CONNECT", "websocket", anyPath, 501},
		{"plain request", "GET", "", anyPath, 404},
		{"other path", "CONNECT", "connect-ip", "/other", 404},
		{"empty target", "CONNECT", "connect-ip", "/.well-known/masque/ip//*/", 400},
		{"protocol out of range", "CONNECT", "connect-ip", "/.well-known/masque/ip/*/256/", 400},
		{"double encoding", "CONNECT", "connect-ip", "/.well-known/masque/ip/a%252F0/*/", 400},
		{"host bits", "CONNECT", "connect-ip", "/.well-known/masque/ip/192.0.2.1%2F24/*/", 400},
		{"colons", "CONNECT", "connect-ip", "/.well-known/masque/ip/::1/*/", 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// The request has no Capsule-Protocol, because it is not required.
			rsp, str := request(t, h3, tc.method, tc.protocol, tc.path, nil)
			if rsp.StatusCode != tc.status {
				t.Errorf("status %d, want %d", rsp.StatusCode, tc.status)
			}
			if got := rsp.Header.Get("Capsule-Protocol"); (got == "?1") != (tc.status == 200) {
				t.Errorf("Capsule-Protocol %q with status %d", got, tc.status)
			}
			str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
			str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeNoError))
		})
	}
}

// TestUnauthenticated checks that a client without valid credentials gets the
// same response for all requests.
func TestUnauthenticated(t *testing.T) {
	h3 := start(t, func(c *Config) { c.Methods, c.Users = []string{MethodToken}, noUsers{} })
	for name, path := range map[string]string{"good path": anyPath,
		"bad path": "/.well-known/masque/ip/*/256/", "unknown path": "/other"} {
		for _, authorization := range []string{"", "Bearer guess", "bearer", "Basic YTpi"} {
			t.Run(name+", "+authorization, func(t *testing.T) {
				rsp, _ := request(t, h3, "CONNECT", "connect-ip", path,
					http.Header{"Authorization": {authorization}})
				if rsp.StatusCode != 401 || rsp.Header.Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("status %d, header %v", rsp.StatusCode, rsp.Header)
				}
			})
		}
	}
}

// noUsers are Users without a user.
type noUsers struct{}

func (noUsers) ByName(string) (User, bool)         { return User{}, false }
func (noUsers) ByToken(string) (User, bool)        { return User{}, false }
func (noUsers) Reserved(netip.Prefix, string) bool { return false }

func TestSessionLimits(t *testing.T) {
	h3 := start(t, func(c *Config) { c.MaxSessions = 2 })
	for i, want := range []int{200, 200, 503} {
		rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
		if rsp.StatusCode != want {
			t.Errorf("request %d: status %d, want %d", i+1, rsp.StatusCode, want)
		}
		if s := rsp.Header.Get("Proxy-Status"); want == 503 &&
			!strings.Contains(s, "error=connection_limit_reached") {
			t.Errorf("Proxy-Status %q", s)
		}
	}
}

// TestTakeOver checks that a session replaces the old session of the same
// client instance and gets its addresses.
func TestTakeOver(t *testing.T) {
	h3 := start(t, func(c *Config) { c.MaxSessions = 1 })
	header := http.Header{connectip.InstanceHeader: {"abc"}}
	want := netip.MustParsePrefix("10.77.0.9/32")
	var first *http3.RequestStream
	for i := range 2 {
		rsp, str := request(t, h3, "CONNECT", "connect-ip", anyPath, header)
		if rsp.StatusCode != 200 {
			t.Fatalf("request %d: status %d", i+1, rsp.StatusCode)
		}
		ask := capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 7, Prefix: want}}}
		if _, err := str.Write(ask.Append(nil)); err != nil {
			t.Fatal(err)
		}
		if got := assignment(t, str); len(got) != 1 || got[0].Prefix != want ||
			got[0].RequestID != 7 {
			t.Fatalf("request %d: assigned %v, want %v", i+1, got, want)
		}
		if i == 0 {
			first = str
		}
	}
	if err := first.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, first); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the first session goes on")
	}
}

// assignment reads capsules until addresses are assigned.
func assignment(t *testing.T, str *http3.RequestStream) []capsule.Address {
	t.Helper()
	r := capsule.NewReader(str, 1<<16)
	for {
		c, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := c.(*capsule.AddressAssign); ok {
			return a.Addresses
		}
	}
}

// TestRoutesAdvertised checks that the proxy advertises its own address, and no
// routes of a family without addresses.
func TestRoutesAdvertised(t *testing.T) {
	h3 := start(t, func(c *Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8::/32")}
	})
	_, str := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
	c, err := capsule.NewReader(str, 1<<16).Next()
	if err != nil {
		t.Fatal(err)
	}
	got, ok := c.(*capsule.RouteAdvertisement)
	want := capsule.Routes([]netip.Prefix{netip.MustParsePrefix("10.77.0.1/32"),
		netip.MustParsePrefix("192.0.2.0/24")}, 0)
	if !ok || len(got.Routes) != 2 || got.Routes[0] != want[0] || got.Routes[1] != want[1] {
		t.Errorf("advertised %v, want %v", c, want)
	}
}

// TestClientsGrantThemselvesNothing checks that a client gains nothing from the
// addresses that it assigns, which would be reachable although denied, and the
// routes that it advertises, which would be valid sources.
func TestClientsGrantThemselvesNothing(t *testing.T) {
	device := tuntest.New(1400)
	h3 := start(t, func(c *Config) {
		c.OpenDevice = func() (Device, error) { return device, nil }
		c.Deny = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	})
	_, str := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
	denied := netip.MustParsePrefix("198.51.100.7/32")
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	b := (&capsule.AddressAssign{Addresses: []capsule.Address{{Prefix: denied}}}).Append(nil)
	b = (&capsule.RouteAdvertisement{Routes: capsule.Routes(everything, 0)}).Append(b)
	b = (&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
		Prefix: netip.MustParsePrefix("0.0.0.0/32")}}}).Append(b)
	if _, err := str.Write(b); err != nil {
		t.Fatal(err)
	}
	mine := assignment(t, str)[0].Prefix.Addr()
	target := netip.MustParseAddr("192.0.2.1")
	for _, p := range []struct{ src, dst netip.Addr }{
		{netip.MustParseAddr("203.0.113.9"), target}, // spoofed
		{mine, denied.Addr()},
		{mine, target}, // the only packet that is allowed
	} {
		pkt := ippacket.AppendEcho([]byte{0}, p.src, p.dst, 64, true, 1, 1, nil)
		if _, err := str.Write((&capsule.Datagram{Payload: pkt}).Append(nil)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	pkt, err := device.Receive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := ippacket.Parse(pkt); err != nil || p.Src != mine || p.Dst != target {
		t.Errorf("the proxy let a packet from %v to %v pass, %v", p.Src, p.Dst, err)
	}
}
