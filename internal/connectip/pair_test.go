package connectip

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go.uber.org/goleak"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// device is a device that passes packets to the test.
type device chan []byte

func (d device) BatchSize() int { return 8 }

func (d device) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		d <- append([]byte(nil), b[offset:]...)
	}
	return len(bufs), nil
}

// next waits for a packet.
func (d device) next(t *testing.T) []byte {
	t.Helper()
	select {
	case pkt := <-d:
		return pkt
	case <-time.After(10 * time.Second):
		t.Fatal("no packet arrived")
		return nil
	}
}

// end is one endpoint of a pair.
type end struct {
	*Conn
	device  device
	stats   *Stats
	stream  Stream
	quic    *quic.Conn
	done    chan struct{} // closed when Run returns
	err     error         // result of Run, valid once done is closed
	assigns chan []capsule.Address
	routes  chan []capsule.Route
	dns     chan []capsule.DNSConfiguration
	pref64  chan []netip.Prefix
	stop    context.CancelFunc
}

func newEnd(str Stream, conn *quic.Conn, cfg Config) *end {
	e := &end{
		device: make(device, 64), stats: &Stats{}, stream: str, quic: conn,
		done:    make(chan struct{}),
		assigns: make(chan []capsule.Address, 16), routes: make(chan []capsule.Route, 16),
		dns: make(chan []capsule.DNSConfiguration, 16), pref64: make(chan []netip.Prefix, 16),
	}
	cfg.Device, cfg.Stats = e.device, e.stats
	cfg.Handler.Assigned = func(a []capsule.Address) error { e.assigns <- a; return nil }
	cfg.Handler.Routes = func(r []capsule.Route) error { e.routes <- r; return nil }
	cfg.Handler.DNS = func(d []capsule.DNSConfiguration) error { e.dns <- d; return nil }
	cfg.Handler.PREF64 = func(p []netip.Prefix) error { e.pref64 <- p; return nil }
	e.Conn = New(str, conn, cfg)
	return e
}

func (e *end) start(ctx context.Context) {
	ctx, e.stop = context.WithCancel(ctx)
	e.updateMTU() // for tests that send packets before Run calls it
	go func() {
		e.err = e.Run(ctx)
		close(e.done)
	}()
}

func (e *end) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-e.done:
		return e.err
	case <-time.After(10 * time.Second):
		t.Fatal("Run did not return")
		return nil
	}
}

// newPair connects a client and a proxy over loopback and runs them until the
// test ends.
func newPair(t *testing.T, clientCfg, proxyCfg Config) (client, proxy *end) {
	t.Helper()
	client, proxy = rawPair(t, clientCfg, proxyCfg)
	client.start(t.Context())
	proxy.start(t.Context())
	t.Cleanup(func() {
		client.stop()
		proxy.stop()
		client.wait(t)
		proxy.wait(t)
	})
	return client, proxy
}

// rawPair is like newPair, but does not run the endpoints.
func rawPair(t *testing.T, clientCfg, proxyCfg Config) (client, proxy *end) {
	t.Helper()
	return rawPairSize(t, clientCfg, proxyCfg, 1350)
}

// rawPairSize is like rawPair, with the size in bytes of the connection's first
// packets.
func rawPairSize(t *testing.T, clientCfg, proxyCfg Config, packetSize uint16) (client, proxy *end) {
	t.Helper()
	serverTLS, clientTLS := certificates(t)
	quicConf := &quic.Config{EnableDatagrams: true, InitialPacketSize: packetSize}
	type connKey struct{}
	accepted := make(chan *end, 1)
	finish := make(chan struct{})
	server := &http3.Server{
		EnableDatagrams: true, QUICConfig: quicConf, TLSConfig: serverTLS,
		ConnContext: func(ctx context.Context, c *quic.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			conn := r.Context().Value(connKey{}).(*quic.Conn)
			accepted <- newEnd(w.(http3.HTTPStreamer).HTTPStream(), conn, proxyCfg)
			<-finish
		}),
	}
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		_ = server.Serve(socket)
		close(served)
	}()
	conn, err := quic.DialAddr(t.Context(), socket.LocalAddr().String(), clientTLS, quicConf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.CloseWithError(0, "")
		close(finish)
		_ = server.Close()
		_ = socket.Close()
		<-served
	})
	h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
	<-h3.ReceivedSettings()
	str, err := h3.OpenRequestStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodConnect, "https://localhost/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Proto = Protocol
	if err := str.SendRequestHeader(req); err != nil {
		t.Fatal(err)
	}
	if _, err := str.ReadResponse(); err != nil {
		t.Fatal(err)
	}
	return newEnd(str, conn, clientCfg), <-accepted
}

// certificates returns a server configuration with a self-signed certificate
// for localhost, and a client configuration that trusts it.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	server = http3.ConfigureTLSConfig(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	})
	return server, &tls.Config{RootCAs: pool, NextProtos: []string{http3.NextProtoH3}}
}

var (
	clientAddr4 = netip.MustParseAddr("10.77.0.2")
	clientAddr6 = netip.MustParseAddr("fd77::2")
	proxyAddr4  = netip.MustParseAddr("10.77.0.1")
	proxyAddr6  = netip.MustParseAddr("fd77::1")
	target4     = netip.MustParseAddr("192.0.2.2")
	target6     = netip.MustParseAddr("2001:db8::2")
	elsewhere4  = netip.MustParseAddr("198.51.100.9")
)

// remoteAccess connects a pair and configures it for remote access: the proxy
// assigns addresses to the client and advertises default routes.
func remoteAccess(t *testing.T, proxyCfg Config) (client, proxy *end) {
	t.Helper()
	proxyCfg.Self = []netip.Addr{proxyAddr4, proxyAddr6}
	client, proxy = newPair(t, Config{}, proxyCfg)
	if err := proxy.Assign([]capsule.Address{{Prefix: host(clientAddr4)},
		{Prefix: host(clientAddr6)}}); err != nil {
		t.Fatal(err)
	}
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	if err := proxy.Advertise(capsule.Routes(everything, 0)); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	<-client.routes
	return client, proxy
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// echoPacket returns an echo request of size bytes behind tun.Headroom bytes.
func echoPacket(src, dst netip.Addr, hopLimit uint8, size int) []byte {
	header := 28
	if src.Is6() {
		header = 48
	}
	return ippacket.AppendEcho(make([]byte, tun.Headroom), src, dst, hopLimit, true, 7, 1,
		make([]byte, max(0, size-header)))
}

func parse(t *testing.T, pkt []byte) ippacket.Packet {
	t.Helper()
	p, err := ippacket.Parse(pkt)
	if err != nil {
		t.Fatalf("%v in % x", err, pkt)
	}
	return p
}
