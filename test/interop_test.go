package test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	foreign "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/yosida95/uritemplate/v3"

	"masquevpn/client"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// connect-ip-go as the peer of our proxy and of our client. Both ends run in
// the test process, with devices and networks in memory.

var (
	inside4  = netip.MustParseAddr("10.77.0.2")
	inside6  = netip.MustParseAddr("fd77::2")
	beyond4  = netip.MustParseAddr("192.0.2.2")
	beyond6  = netip.MustParseAddr("2001:db8:3::2")
	allIPv4  = netip.MustParsePrefix("0.0.0.0/0")
	allIPv6  = netip.MustParsePrefix("::/0")
	any4     = netip.PrefixFrom(netip.IPv4Unspecified(), 32)
	any6     = netip.PrefixFrom(netip.IPv6Unspecified(), 128)
	echoData = []byte("interop")
)

// foreignClient runs our proxy and connects connect-ip-go to it. Both end with
// the test.
func foreignClient(t *testing.T, ctx context.Context, change func(*proxy.Config)) (*foreign.Conn,
	*proxy.Server, *tuntest.Device) {
	t.Helper()
	p := startWireProxy(t, func(cfg *proxy.Config) {
		cfg.Template = "https://" + proxyName + "/vpn"
		if change != nil {
			change(cfg)
		}
	})
	req, err := foreign.NewRequest(ctx, uritemplate.MustNew("https://"+proxyName+"/vpn"))
	if err != nil {
		t.Fatal(err)
	}
	transport := foreign.Transport{
		TLSClientConfig: &tls.Config{RootCAs: p.pki.Roots, ServerName: proxyName,
			NextProtos: []string{http3.NextProtoH3}},
		DialAddr: func(ctx context.Context, _ string, tlsConf *tls.Config,
			conf *quic.Config) (*quic.Conn, error) {
			return quic.DialAddr(ctx, p.Addrs()[0].String(), tlsConf, conf)
		},
	}
	conn, rsp, err := transport.Dial(req)
	if err != nil {
		t.Fatalf("%v, answer %v", err, rsp)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn, p.Server, p.device
}

// connect-ip-go as the client gets addresses and routes from our proxy, and
// packets pass in both directions.
func TestForeignClient(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, _, device := foreignClient(t, ctx, nil)
	if _, err := conn.RequestAddresses([]netip.Prefix{any4, any6}); err != nil {
		t.Fatal(err)
	}
	assigned, err := conn.ReceiveAddressAssignment(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(assigned) != 2 || assigned[0].IPPrefix.Addr() != inside4 ||
		assigned[1].IPPrefix.Addr() != inside6 {
		t.Errorf("assigned %v", assigned)
	}
	routes, err := conn.Routes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(routes) != 2 || routes[0].EndIP != netip.MustParseAddr("255.255.255.255") ||
		!routes[1].StartIP.Is6() {
		t.Errorf("routes %v", routes)
	}
	for _, pair := range [][2]netip.Addr{{inside4, beyond4}, {inside6, beyond6}} {
		up := ippacket.AppendEcho(nil, pair[0], pair[1], 64, true, 1, 1, echoData)
		if icmp, err := conn.WritePacket(up); err != nil || icmp != nil {
			t.Fatalf("%v, ICMP % x", err, icmp)
		}
		awaitEcho(t, ctx, device.Receive, pair[0], pair[1])
		device.Inject(ippacket.AppendEcho(nil, pair[1], pair[0], 64, false, 1, 1, echoData))
		awaitEcho(t, ctx, func(context.Context) ([]byte, error) {
			buf := make([]byte, 1500)
			n, err := conn.ReadPacket(buf)
			return buf[:n], err
		}, pair[1], pair[0])
	}
}

// foreignProxy runs connect-ip-go as a proxy, connects our client to it, and
// grants addresses and routes. Both end with the test.
func foreignProxy(t *testing.T, ctx context.Context) (*foreign.Conn, *client.Client,
	*tuntest.Device) {
	t.Helper()
	in := pkitest.New(proxyName)
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	template := "https://" + socket.LocalAddr().String() + "/vpn"
	conns := make(chan *foreign.Conn, 1)
	server := &http3.Server{
		EnableDatagrams: true,
		TLSConfig:       http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{in.Proxy}}),
		QUICConfig:      &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			req, err := foreign.ParseProxyRequest(r, uritemplate.MustNew(template))
			if err != nil {
				t.Errorf("connect-ip-go refuses our request: %v", err)
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			conn, err := (&foreign.Proxy{}).Proxy(w, req)
			if err != nil {
				t.Error(err)
				return
			}
			conns <- conn
		}),
	}
	served := make(chan struct{})
	go func() {
		_ = server.Serve(socket)
		close(served)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
		_ = socket.Close()
	})

	device := tuntest.New(1400)
	c, err := client.New(client.Config{
		Name: "interop", Proxy: template,
		TLS:           &tls.Config{RootCAs: in.Roots, ServerName: proxyName},
		InstallRoutes: true,
		OpenDevice:    func() (client.Device, error) { return device, nil },
		OpenNetwork: func(client.Device) (client.Network, error) {
			return new(routingtest.Network), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	runClient(t, c)

	var conn *foreign.Conn
	select {
	case conn = <-conns:
	case <-ctx.Done():
		t.Fatalf("no request came: %+v", c.Status())
	}
	t.Cleanup(func() { _ = conn.Close() })
	request, err := conn.ReceiveAddressRequest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got := request.Prefixes; !slices.Equal(got, []netip.Prefix{any4, any6}) {
		t.Errorf("requested %v", got)
	}
	if err := request.Respond([]netip.Prefix{netip.PrefixFrom(inside4, 32),
		netip.PrefixFrom(inside6, 128)}, nil); err != nil {
		t.Fatal(err)
	}
	if err := conn.AdvertiseRoute([]foreign.IPRoute{
		{StartIP: netip.IPv4Unspecified(), EndIP: netip.MustParseAddr("255.255.255.255")},
		{StartIP: netip.IPv6Unspecified(),
			EndIP: netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
	}); err != nil {
		t.Fatal(err)
	}
	return conn, c, device
}

// Our client connects to connect-ip-go as the proxy, and packets pass in both
// directions.
func TestForeignProxy(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, c, device := foreignProxy(t, ctx)
	// connect-ip-go does not answer the echo request on the link. The test
	// answers the other probe in place of an IP stack: a packet with hop limit
	// 1.
	read := func(context.Context) ([]byte, error) {
		buf := make([]byte, 1500)
		n, err := conn.ReadPacket(buf)
		return buf[:n], err
	}
	probe := awaitPacket(t, ctx, read, func(p ippacket.Packet) bool {
		return p.HopLimit == 1 && p.Src == inside4
	})
	p, err := ippacket.Parse(probe)
	if err != nil {
		t.Fatal(err)
	}
	expired, ok := ippacket.AppendICMPError(nil, probe, p, ippacket.HopLimitExceeded,
		netip.MustParseAddr("10.77.0.1"), 0)
	if !ok {
		t.Fatal("no Time Exceeded")
	}
	if _, err := conn.WritePacket(expired); err != nil {
		t.Fatal(err)
	}
	awaitState(t, ctx, c, client.StateConnected)

	for _, pair := range [][2]netip.Addr{{inside4, beyond4}, {inside6, beyond6}} {
		device.Inject(ippacket.AppendEcho(nil, pair[0], pair[1], 64, true, 1, 1, echoData))
		awaitEcho(t, ctx, read, pair[0], pair[1])
		if _, err := conn.WritePacket(ippacket.AppendEcho(nil, pair[1], pair[0], 64, false, 1, 1,
			echoData)); err != nil {
			t.Fatal(err)
		}
		awaitEcho(t, ctx, device.Receive, pair[1], pair[0])
	}
}

// awaitPacket reads packets up to the first that wanted accepts.
func awaitPacket(t *testing.T, ctx context.Context, read func(context.Context) ([]byte, error),
	wanted func(ippacket.Packet) bool) []byte {
	t.Helper()
	for {
		pkt, err := read(ctx)
		if err != nil {
			t.Fatal(err)
		}
		p, err := ippacket.Parse(pkt)
		if err != nil {
			t.Fatalf("%v in % x", err, pkt)
		}
		if wanted(p) {
			return pkt
		}
	}
}

// awaitEcho waits for an echo packet from src to dst.
func awaitEcho(t *testing.T, ctx context.Context, read func(context.Context) ([]byte, error), src,
	dst netip.Addr) {
	t.Helper()
	awaitPacket(t, ctx, read, func(p ippacket.Packet) bool {
		return p.Src == src && p.Dst == dst && p.HopLimit > 1
	})
}
