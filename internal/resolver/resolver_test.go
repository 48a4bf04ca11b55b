package resolver

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
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
)

// TestVectors resolves the cases of discovery through a DNS server and a web
// server.
func TestVectors(t *testing.T) {
	web := newWeb(t)
	for _, v := range discoverytest.Vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			w := &discoverytest.World{}
			r := web.resolver(w, w.ServeDNS(t))
			if v.Sequence == nil {
				w.Become(v.World, 0)
				discoverytest.Check(t, v.Expect, discoverytest.Outcome(t.Context(), &v, r))
				return
			}
			for _, s := range v.Sequence {
				w.Become(s.World, time.Duration(s.At)*time.Second)
				discoverytest.Check(t, s.Expect, discoverytest.Outcome(t.Context(), &v, r))
			}
		})
	}
}

// A web is a web server for all names, of which it proves those that it should.
type web struct {
	server *httptest.Server
	port   string
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	pool   *x509.CertPool

	mu       sync.Mutex
	requests []*http.Request
	worlds   map[string]*discoverytest.World // keyed by User-Agent
	broken   map[string]bool                 // hosts with a bad certificate
}

func newWeb(t *testing.T) *web {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1),
		Subject:   pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	w := &web{key: key, pool: x509.NewCertPool(), worlds: make(map[string]*discoverytest.World),
		broken: make(map[string]bool)}
	if w.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	w.pool.AddCert(w.ca)
	w.server = httptest.NewUnstartedServer(http.HandlerFunc(w.serve))
	w.server.EnableHTTP2 = true
	w.server.TLS = &tls.Config{GetCertificate: w.certificate}
	w.server.StartTLS()
	t.Cleanup(w.server.Close)
	w.server.TLS.Certificates = nil
	_, w.port, _ = net.SplitHostPort(w.server.Listener.Addr().String())
	return w
}

// certificate makes a certificate for the name that the client asks for.
func (w *web) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := hello.ServerName
	w.mu.Lock()
	if w.broken[name] {
		name = "other.example"
	}
	w.mu.Unlock()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name},
		NotBefore: w.ca.NotBefore, NotAfter: w.ca.NotAfter}
	der, err := x509.CreateCertificate(rand.Reader, template, w.ca, w.key.Public(), w.key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: w.key}, err
}

// serve answers from the world of the resolver that asks.
func (w *web) serve(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.requests = append(w.requests, r)
	world := w.worlds[r.UserAgent()]
	w.mu.Unlock()
	host, _, _ := net.SplitHostPort(r.Host)
	resp, err := world.Fetch(r.Context(), &url.URL{Scheme: "https", Host: host, Path: r.URL.Path},
		[]netip.Addr{{}})
	if err != nil { // a timeout
		<-r.Context().Done()
		return
	}
	for k, v := range resp.Header {
		rw.Header()[k] = v
	}
	rw.WriteHeader(resp.Status)
	_, _ = io.Copy(rw, resp.Body)
}

// resolver returns a resolver that asks a DNS server, and w for all URLs that
// world has.
func (w *web) resolver(world *discoverytest.World, dns netip.AddrPort) *discovery.Resolver {
	c := Config{Servers: Trusted([]netip.AddrPort{dns}), CA: w.pool,
		UserAgent: "test/" + dns.String()}
	w.mu.Lock()
	w.worlds[c.UserAgent] = world
	w.mu.Unlock()
	r := New(c)
	r.Hosts, r.Local, r.NoJitter = world.LookupHosts, world.LookupLocal, true
	r.Now = world.Time
	r.Fetch = func(ctx context.Context, u *url.URL, _ []netip.Addr) (*discovery.Response, error) {
		page, ok := world.Page(u)
		if !ok || page.Error == "refused" {
			return nil, errors.New("connection refused")
		}
		here := *u
		here.Host = net.JoinHostPort(u.Hostname(), w.port)
		if page.Error == "certificate" {
			here.Host = net.JoinHostPort("bad."+u.Hostname(), w.port)
			w.mu.Lock()
			w.broken["bad."+u.Hostname()] = true
			w.mu.Unlock()
		}
		return c.fetch(ctx, &here, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	}
	return r
}

// TestRequest checks what the request for a delegation file says.
func TestRequest(t *testing.T) {
	web := newWeb(t)
	world := &discoverytest.World{HTTPS: map[string]discoverytest.Page{
		"https://example.org" + discovery.FilePath: {Status: 204}}}
	r := web.resolver(world, netip.MustParseAddrPort("127.0.0.1:53"))
	u := &url.URL{Scheme: "https", Host: "example.org", Path: discovery.FilePath}
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	resp, err := r.Fetch(t.Context(), u, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := web.requests[0]
	want := http.Header{"Accept": {"application/json"}, "Accept-Encoding": {"identity"},
		"User-Agent": {"test/127.0.0.1:53"}}
	for k, v := range got.Header {
		if strings.Join(v, ",") != strings.Join(want[k], ",") {
			t.Errorf("got the field %s: %v, want %v", k, v, want[k])
		}
	}
	if got.ProtoMajor != 2 || got.Method != http.MethodGet || got.URL.Path != discovery.FilePath {
		t.Errorf("got %s %s by %s", got.Method, got.URL.Path, got.Proto)
	}
}

// TestSecondAddress checks that a web server is reached when its first address
// does not answer.
func TestSecondAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c := Config{}
	conn, err := c.dial(t.Context(), []netip.Addr{netip.MustParseAddr("127.0.0.3"),
		netip.MustParseAddr("127.0.0.2")}, port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.RemoteAddr().String(); got != l.Addr().String() {
		t.Errorf("got a connection to %s, want one to %s", got, l.Addr())
	}
}
