package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/qpack"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/client"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// The conformance tests check the bytes that our proxy and our client send, and
// their reactions to arbitrary bytes. The test itself is the peer. It writes
// and reads HTTP/3 frames by hand, because an HTTP library would not break the
// rules. This file holds the shared parts. Neither end has a kernel device.

// Types of frames, settings and streams of HTTP/3 (RFC 9114 sections 6.2.1 and
// 7.2, RFC 9220, RFC 9297 section 5.1).
const (
	frameData     = 0x0
	frameHeaders  = 0x1
	frameSettings = 0x4

	settingExtendedConnect = 0x8
	settingDatagram        = 0x33

	streamControl = 0x0
)

// settings is the content of a SETTINGS frame.
type settings map[uint64]uint64

// masqueSettings are the SETTINGS of a MASQUE endpoint.
var masqueSettings = settings{settingExtendedConnect: 1, settingDatagram: 1}

// rawConn is one end of an HTTP/3 connection.
type rawConn struct {
	*quic.Conn
	t        *testing.T
	settings chan settings // receives the peer's SETTINGS
}

// newRawConn takes over conn until the test ends. It sends s as SETTINGS, and
// none if s is nil.
func newRawConn(t *testing.T, conn *quic.Conn, s settings) *rawConn {
	t.Helper()
	c := &rawConn{Conn: conn, t: t, settings: make(chan settings, 1)}
	received := make(chan struct{})
	go func() {
		defer close(received)
		c.readControl()
	}()
	t.Cleanup(func() {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		<-received
	})
	if s != nil {
		c.sendSettings(s)
	}
	return c
}

// in returns c for a subtest, which fails in place of the test of c.
func (c *rawConn) in(t *testing.T) *rawConn {
	sub := *c
	sub.t = t
	return &sub
}

// readControl reads the SETTINGS of the peer and ignores its other
// unidirectional streams.
func (c *rawConn) readControl() {
	for {
		str, err := c.AcceptUniStream(context.Background())
		if err != nil {
			return
		}
		r := quicvarint.NewReader(str)
		if typ, err := quicvarint.Read(r); err != nil || typ != streamControl {
			continue
		}
		typ, payload, err := readFrame(r)
		if err != nil || typ != frameSettings {
			continue
		}
		got := settings{}
		for len(payload) > 0 {
			id, n, err := quicvarint.Parse(payload)
			if err != nil {
				break
			}
			value, m, err := quicvarint.Parse(payload[n:])
			if err != nil {
				break
			}
			got[id], payload = value, payload[n+m:]
		}
		c.settings <- got
	}
}

// sendSettings opens the control stream and sends SETTINGS.
func (c *rawConn) sendSettings(s settings) {
	c.t.Helper()
	str, err := c.OpenUniStream()
	if err != nil {
		c.t.Fatal(err)
	}
	var payload []byte
	for id, value := range s {
		payload = quicvarint.Append(quicvarint.Append(payload, id), value)
	}
	if _, err := str.Write(appendFrame([]byte{streamControl}, frameSettings, payload)); err != nil {
		c.t.Fatal(err)
	}
}

// open sends a request with the given fields.
func (c *rawConn) open(fields ...string) *rawStream {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	str, err := c.OpenStreamSync(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	s := newRawStream(c, str)
	s.sendHeaders(fields...)
	return s
}

// sendDatagram sends an HTTP Datagram of the stream with the given ID.
func (c *rawConn) sendDatagram(id quic.StreamID, payload []byte) {
	c.t.Helper()
	if err := c.SendDatagram(append(quicvarint.Append(nil, uint64(id)/4), payload...)); err != nil {
		c.t.Fatal(err)
	}
}

// rawStream is one end of a request stream. Read and Write carry the content of
// DATA frames.
type rawStream struct {
	*quic.Stream
	conn *rawConn
	r    quicvarint.Reader
	data []byte // received but not yet read

	finished bool // Close was called
}

// newRawStream returns the end of str on c. Reading from it fails after
// patience.
func newRawStream(c *rawConn, str *quic.Stream) *rawStream {
	_ = str.SetReadDeadline(time.Now().Add(patience))
	return &rawStream{Stream: str, conn: c, r: quicvarint.NewReader(str)}
}

// appendFrame appends an HTTP/3 frame to b.
func appendFrame(b []byte, typ uint64, payload []byte) []byte {
	return append(quicvarint.Append(quicvarint.Append(b, typ), uint64(len(payload))), payload...)
}

// readFrame reads an HTTP/3 frame.
func readFrame(r quicvarint.Reader) (typ uint64, payload []byte, err error) {
	if typ, err = quicvarint.Read(r); err != nil {
		return 0, nil, err
	}
	n, err := quicvarint.Read(r)
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r, payload)
	return typ, payload, err
}

// sendHeaders sends a HEADERS frame. Each field has the form "name: value".
func (s *rawStream) sendHeaders(fields ...string) {
	s.conn.t.Helper()
	var block bytes.Buffer
	enc := qpack.NewEncoder(&block)
	for _, f := range fields {
		i := strings.Index(f[1:], ": ") + 1
		if err := enc.WriteField(qpack.HeaderField{Name: f[:i], Value: f[i+2:]}); err != nil {
			s.conn.t.Fatal(err)
		}
	}
	if _, err := s.Stream.Write(appendFrame(nil, frameHeaders, block.Bytes())); err != nil {
		s.conn.t.Fatal(err)
	}
}

// readHeaders reads a HEADERS frame and returns its fields in order.
func (s *rawStream) readHeaders() (fields []string, err error) {
	typ, payload, err := readFrame(s.r)
	if err != nil {
		return nil, err
	}
	if typ != frameHeaders {
		s.conn.t.Fatalf("a frame of type %#x instead of HEADERS", typ)
	}
	next := qpack.NewDecoder().Decode(payload)
	for {
		f, err := next()
		if err == io.EOF {
			return fields, nil
		}
		if err != nil {
			return nil, err
		}
		fields = append(fields, f.Name+": "+f.Value)
	}
}

// response reads the response to a request and returns its status, or "" if the
// stream ended without a response.
func (s *rawStream) response() (status string, fields []string) {
	s.conn.t.Helper()
	fields, err := s.readHeaders()
	if err != nil {
		return "", nil
	}
	return field(fields, ":status"), fields
}

// field returns the value of the field with the given name, or "" if there is
// none.
func field(fields []string, name string) string {
	for _, f := range fields {
		if v, ok := strings.CutPrefix(f, name+": "); ok {
			return v
		}
	}
	return ""
}

// Write sends b in a DATA frame.
func (s *rawStream) Write(b []byte) (int, error) {
	if _, err := s.Stream.Write(appendFrame(nil, frameData, b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// send sends capsules in one DATA frame.
func (s *rawStream) send(capsules ...capsule.Capsule) {
	s.conn.t.Helper()
	var b []byte
	for _, c := range capsules {
		b = c.Append(b)
	}
	if _, err := s.Write(b); err != nil {
		s.conn.t.Fatal(err)
	}
}

// Read reads the content of DATA frames and skips other frames.
func (s *rawStream) Read(b []byte) (int, error) {
	for len(s.data) == 0 {
		typ, payload, err := readFrame(s.r)
		if err != nil {
			return 0, err
		}
		if typ == frameData {
			s.data = payload
		}
	}
	n := copy(b, s.data)
	s.data = s.data[n:]
	return n, nil
}

// wantReset checks that the peer resets both directions of the stream with the
// given code.
func (s *rawStream) wantReset(code http3.ErrCode) {
	s.conn.t.Helper()
	if _, err := io.Copy(io.Discard, s); !isError(err, code) {
		s.conn.t.Errorf("the stream ended with %v, want a reset with %v", err, code)
		return
	}
	if s.finished {
		return // the peer has nothing left to refuse
	}
	select {
	case <-s.Context().Done():
	case <-time.After(patience):
		s.conn.t.Error("the peer still reads from the stream")
		return
	}
	if err := context.Cause(s.Context()); !isError(err, code) {
		s.conn.t.Errorf("the peer stopped reading with %v, want %v", err, code)
	}
}

// isError reports whether err is a stream error of the peer with the given
// code, or the connection error that the peer may replace it by (RFC 9114
// section 8).
func isError(err error, code http3.ErrCode) bool {
	var reset *quic.StreamError
	var closed *quic.ApplicationError
	return errors.As(err, &reset) && reset.Remote && http3.ErrCode(reset.ErrorCode) == code ||
		errors.As(err, &closed) && closed.Remote && http3.ErrCode(closed.ErrorCode) == code
}

// Close finishes the stream.
func (s *rawStream) Close() error {
	s.finished = true
	return s.Stream.Close()
}

// sendPacket sends an IP packet in a QUIC datagram.
func (s *rawStream) sendPacket(pkt []byte) {
	s.conn.t.Helper()
	s.conn.sendDatagram(s.StreamID(), append([]byte{0}, pkt...))
}

// packetCapsule returns a DATAGRAM capsule with an IP packet. It arrives in
// order with other capsules of the stream.
func packetCapsule(pkt []byte) *capsule.Datagram {
	return &capsule.Datagram{Payload: append([]byte{0}, pkt...)}
}

// readPacket returns the next IP packet that arrives in a QUIC datagram of this
// stream.
func (s *rawStream) readPacket(ctx context.Context) ([]byte, error) {
	for {
		b, err := s.conn.ReceiveDatagram(ctx)
		if err != nil {
			return nil, err
		}
		quarter, n, err := quicvarint.Parse(b)
		if err != nil || quic.StreamID(4*quarter) != s.StreamID() {
			continue
		}
		if contextID, m, err := quicvarint.Parse(b[n:]); err == nil && contextID == 0 {
			return b[n+m:], nil
		}
	}
}

// wireProxy is our proxy with a device in memory.
type wireProxy struct {
	*proxy.Server
	t      *testing.T
	pki    pkitest.Installation
	device *tuntest.Device
}

var (
	proxy4Inside = netip.MustParseAddr("10.77.0.1")
	proxy6Inside = netip.MustParseAddr("fd77::1")
)

// startWireProxy runs a proxy until the test ends. It accepts all clients and
// advertises all addresses, unless change sets something else; nil changes
// nothing.
func startWireProxy(t *testing.T, change func(*proxy.Config)) *wireProxy {
	t.Helper()
	p := &wireProxy{t: t, pki: pkitest.New(proxyName), device: tuntest.New(1400)}
	cfg := proxy.Config{
		Name: proxyName, Listen: []string{"127.0.0.1:0"},
		TLS:     &tls.Config{Certificates: []tls.Certificate{p.pki.Proxy}},
		Methods: []string{proxy.MethodNone},
		Pool4:   netip.MustParsePrefix("10.77.0.0/24"), Pool6: netip.MustParsePrefix("fd77::/64"),
		Advertise:  []netip.Prefix{allIPv4, allIPv6},
		OpenDevice: func() (proxy.Device, error) { return p.device, nil },
		OpenNetwork: func(proxy.Device) (proxy.Network, error) {
			return new(routingtest.Network), nil
		},
		LocalNetworks: func() ([]netip.Prefix, error) { return nil, nil },
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if p.Server, err = proxy.New(cfg); err != nil {
		t.Fatal(err)
	}
	runProxy(t, p.Server)
	return p
}

// dial connects to the proxy. It sends s as SETTINGS, and none if s is nil.
func (p *wireProxy) dial(s settings) *rawConn {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	conn, err := quic.DialAddr(ctx, p.Addrs()[0].String(),
		&tls.Config{RootCAs: p.pki.Roots, ServerName: proxyName,
			NextProtos: []string{http3.NextProtoH3}},
		&quic.Config{EnableDatagrams: true, InitialPacketSize: 1350})
	if err != nil {
		p.t.Fatal(err)
	}
	return newRawConn(p.t, conn, s)
}

// anyPath is the path of a request without a scope.
const anyPath = "/.well-known/masque/ip/*/*/"

// connectIP returns the fields of a request for a tunnel.
func connectIP(path string, more ...string) []string {
	return append([]string{
		":method: CONNECT", ":protocol: connect-ip", ":scheme: https", ":authority: " + proxyName,
		":path: " + path,
	}, more...)
}

// wireTunnel is the client end of a tunnel to our proxy, with an address of
// each family.
type wireTunnel struct {
	*rawStream
	p            *wireProxy
	capsules     *capsule.Reader
	addr4, addr6 netip.Addr
}

// tunnel opens a tunnel on a new connection.
func (p *wireProxy) tunnel() *wireTunnel {
	p.t.Helper()
	return p.tunnelOn(p.dial(masqueSettings))
}

// tunnelOn opens a tunnel on c.
func (p *wireProxy) tunnelOn(c *rawConn) *wireTunnel { return p.tunnelFor(c, connectIP(anyPath)) }

// tunnelFor opens a tunnel on c by a request with the given fields.
func (p *wireProxy) tunnelFor(c *rawConn, fields []string) *wireTunnel {
	c.t.Helper()
	u := &wireTunnel{rawStream: c.open(fields...), p: p}
	if status, fields := u.response(); status != "200" {
		c.t.Fatalf("no tunnel: %v", fields)
	}
	u.capsules = capsule.NewReader(u, 1<<16)
	u.send(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1000, Prefix: any4},
		{RequestID: 1001, Prefix: any6}}})
	assigned := nextCapsule[*capsule.AddressAssign](c.t, u.capsules).Addresses
	if len(assigned) != 2 || assigned[0].Refused() || assigned[1].Refused() {
		c.t.Fatalf("assigned %v", assigned)
	}
	u.addr4, u.addr6 = assigned[0].Prefix.Addr(), assigned[1].Prefix.Addr()
	return u
}

// nextCapsule reads capsules up to the first of type C.
func nextCapsule[C capsule.Capsule](t *testing.T, r *capsule.Reader) C {
	t.Helper()
	for {
		next, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if c, ok := next.(C); ok {
			return c
		}
	}
}

// echoID is the last identifier that newEcho used.
var echoID atomic.Uint32

// newEcho returns an echo request with a unique identifier, and that
// identifier.
func newEcho(src, dst netip.Addr) (pkt []byte, id uint16) {
	id = uint16(echoID.Add(1))
	return ippacket.AppendEcho(nil, src, dst, 64, true, id, 1, echoData), id
}

// awaitID reads packets up to the echo with the given identifier.
func awaitID(t *testing.T, read func(context.Context) ([]byte, error), id uint16) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		pkt, err := read(ctx)
		if err != nil {
			t.Fatalf("the packet does not arrive: %v", err)
		}
		if hasID(pkt, id) {
			return pkt
		}
	}
}

// awaitOnly is awaitID, except that no other echo of these tests may arrive
// before.
func awaitOnly(t *testing.T, read func(context.Context) ([]byte, error), id uint16) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		pkt, err := read(ctx)
		if err != nil {
			t.Fatalf("the packet does not arrive: %v", err)
		}
		p, err := ippacket.Parse(pkt)
		if err != nil {
			t.Fatalf("%v in % x", err, pkt)
		}
		if _, got, _, data, ok := ippacket.ParseEcho(pkt, p); ok && got == id {
			return
		} else if ok && bytes.Equal(data, echoData) {
			t.Errorf("a packet from %v to %v came through", p.Src, p.Dst)
		}
	}
}

// hasID reports whether pkt is an echo with the given identifier.
func hasID(pkt []byte, id uint16) bool {
	p, err := ippacket.Parse(pkt)
	if err != nil {
		return false
	}
	_, got, _, _, ok := ippacket.ParseEcho(pkt, p)
	return ok && got == id
}

// checkAlive checks that the proxy reads the stream of the tunnel, and that
// packets pass in both directions.
func (u *wireTunnel) checkAlive() {
	u.conn.t.Helper()
	pkt, id := newEcho(u.addr4, beyond4)
	u.send(packetCapsule(pkt))
	awaitID(u.conn.t, u.p.device.Receive, id)
	pkt, id = newEcho(beyond6, u.addr6)
	u.p.device.Inject(pkt)
	awaitID(u.conn.t, u.readPacket, id)
}

// rawServer is a server that is played by the test.
type rawServer struct {
	t    *testing.T
	pki  pkitest.Installation
	ln   *quic.Listener
	addr string // address to dial
}

// startRawServer listens until the test ends and negotiates protocol by ALPN.
func startRawServer(t *testing.T, in pkitest.Installation, protocol string) *rawServer {
	t.Helper()
	ln, err := quic.ListenAddr("127.0.0.1:0",
		&tls.Config{Certificates: []tls.Certificate{in.Proxy}, NextProtos: []string{protocol}},
		&quic.Config{EnableDatagrams: true, InitialPacketSize: 1350})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return &rawServer{t: t, pki: in, ln: ln, addr: ln.Addr().String()}
}

// in returns r for a subtest, which fails in place of the test of r.
func (r *rawServer) in(t *testing.T) *rawServer {
	sub := *r
	sub.t = t
	return &sub
}

// accept waits for the next connection. It sends s as SETTINGS, and none if s
// is nil.
func (r *rawServer) accept(s settings) *rawConn {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	conn, err := r.ln.Accept(ctx)
	if err != nil {
		r.t.Fatalf("no connection: %v", err)
	}
	return newRawConn(r.t, conn, s)
}

// request waits for the next request and returns its fields.
func (c *rawConn) request() (*rawStream, []string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	str, err := c.AcceptStream(ctx)
	if err != nil {
		c.t.Fatalf("no request: %v", err)
	}
	s := newRawStream(c, str)
	fields, err := s.readHeaders()
	if err != nil {
		c.t.Fatal(err)
	}
	return s, fields
}

// wireClient is our client with a device and a network in memory.
type wireClient struct {
	*client.Client
	t       *testing.T
	device  *tuntest.Device
	network *routingtest.Network
	cancel  context.CancelFunc
	done    chan struct{} // closed when Run has returned
	err     error         // result of Run; valid after done is closed
}

// stop ends the client and waits for its end.
func (c *wireClient) stop() {
	c.cancel()
	<-c.done
}

// startClient runs a client of r until the test ends.
func (r *rawServer) startClient(change func(*client.Config)) *wireClient {
	r.t.Helper()
	c := &wireClient{t: r.t, device: tuntest.New(1400), network: new(routingtest.Network),
		done: make(chan struct{})}
	cfg := client.Config{
		Name: "wire", Proxy: r.addr, TLS: &tls.Config{RootCAs: r.pki.Roots, ServerName: proxyName},
		InstallRoutes: true,
		OpenDevice:    func() (client.Device, error) { return c.device, nil },
		OpenNetwork:   func(client.Device) (client.Network, error) { return c.network, nil },
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if c.Client, err = client.New(cfg); err != nil {
		r.t.Fatal(err)
	}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(r.t.Context())
	go func() {
		c.err = c.Run(ctx)
		close(c.done)
	}()
	r.t.Cleanup(c.stop)
	return c
}

// failure waits until the client gives up and returns its error.
func (c *wireClient) failure() *client.Error {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		c.t.Fatalf("the client is still running: %+v", c.Status())
	}
	var e *client.Error
	if !errors.As(c.err, &e) {
		c.t.Fatalf("the client ended with %v", c.err)
	}
	return e
}

// wireSession is the proxy end of a session of our client.
type wireSession struct {
	*rawStream
	c        *wireClient
	capsules *capsule.Reader
}

// granted are the capsules that establish sends: addresses, and routes to all
// addresses.
var granted = []capsule.Capsule{
	&capsule.AddressAssign{Addresses: []capsule.Address{
		{RequestID: 1, Prefix: netip.PrefixFrom(inside4, 32)},
		{RequestID: 2, Prefix: netip.PrefixFrom(inside6, 128)},
	}},
	&capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{allIPv4, allIPv6}, 0)},
}

// establish waits for the request of c and plays the proxy until c is
// connected.
func (r *rawServer) establish(c *wireClient) *wireSession {
	r.t.Helper()
	s := &wireSession{c: c}
	s.rawStream, _ = r.accept(masqueSettings).request()
	s.sendHeaders(":status: 200")
	s.capsules = capsule.NewReader(s, 1<<16)
	nextCapsule[*capsule.AddressRequest](r.t, s.capsules)
	s.send(granted...)
	s.checkAlive()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	awaitState(r.t, ctx, c.Client, client.StateConnected)
	return s
}

// checkAlive checks that the client reads the stream.
func (s *wireSession) checkAlive() {
	s.c.t.Helper()
	pkt, id := newEcho(beyond4, inside4)
	s.send(packetCapsule(pkt))
	awaitID(s.c.t, s.c.device.Receive, id)
}

// awaitNetwork waits until ok accepts the state that the client applied last.
func (c *wireClient) awaitNetwork(ok func(routing.State) bool) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	if state, err := c.network.Await(ctx, ok); err != nil {
		c.t.Fatalf("the client applied %+v last: %v", state, err)
	}
}

// eventually waits until ok returns true. condition completes the sentence "it
// never happened that ...".
func eventually(t *testing.T, condition string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never happened that %s", condition)
		}
	}
}

// heapInUse returns the number of bytes in use on the heap.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// awaitDrops waits until drops counts at least n packets for reason.
func awaitDrops(t *testing.T, drops func() map[string]uint64, reason string, n uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d packets were dropped for %q", n, reason), func() bool {
		return drops()[reason] >= n
	})
}
