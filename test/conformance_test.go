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

// The conformance tests look at what our proxy and our client say, and how they
// take what they are told, byte by byte: the far end is the test itself, which
// writes and reads the frames of HTTP/3 by hand, because an HTTP library breaks
// no rules. This file holds what they share. Neither end has a kernel.

// Frames, settings and streams of HTTP/3 (RFC 9114 sections 6.2.1 and 7.2, RFC
// 9220, RFC 9297 section 5.1).
const (
	frameData     = 0x0
	frameHeaders  = 0x1
	frameSettings = 0x4

	settingExtendedConnect = 0x8
	settingDatagram        = 0x33

	streamControl = 0x0
)

// settings is what a SETTINGS frame holds.
type settings map[uint64]uint64

// masqueSettings is what a MASQUE endpoint sends.
var masqueSettings = settings{settingExtendedConnect: 1, settingDatagram: 1}

// rawConn is one end of an HTTP/3 connection.
type rawConn struct {
	*quic.Conn
	t        *testing.T
	settings chan settings // the peer's SETTINGS
}

// newRawConn takes over conn, until the test ends. SETTINGS are sent at once
// unless s is nil.
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

// readControl finds the SETTINGS of the peer; its other streams are of no
// interest.
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

// sendSettings opens the control stream.
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

// open begins a request.
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

// rawStream is one end of a request stream. Read gives the content of its DATA
// frames.
type rawStream struct {
	*quic.Stream
	conn *rawConn
	r    quicvarint.Reader
	data []byte // received, not read yet
	// finished: Close was called.
	finished bool
}

func newRawStream(c *rawConn, str *quic.Stream) *rawStream {
	_ = str.SetReadDeadline(time.Now().Add(patience))
	return &rawStream{Stream: str, conn: c, r: quicvarint.NewReader(str)}
}

func appendFrame(b []byte, typ uint64, payload []byte) []byte {
	return append(quicvarint.Append(quicvarint.Append(b, typ), uint64(len(payload))), payload...)
}

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

// sendHeaders sends a HEADERS frame with fields, each of which is "name:
// value".
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

// answer reads the answer to a request and returns its status, "" when there is
// none because the stream ended.
func (s *rawStream) answer() (status string, fields []string) {
	s.conn.t.Helper()
	fields, err := s.readHeaders()
	if err != nil {
		return "", nil
	}
	return field(fields, ":status"), fields
}

// field returns the value of a field, "" when there is none of the name.
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

// send writes capsules in one DATA frame.
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

// wantReset reads on until the peer resets the stream, which has to be with the
// given code, in both directions.
func (s *rawStream) wantReset(code http3.ErrCode) {
	s.conn.t.Helper()
	if _, err := io.Copy(io.Discard, s); !isError(err, code) {
		s.conn.t.Errorf("the stream ended with %v, want a reset with %v", err, code)
		return
	}
	if s.finished {
		return // there is nothing left to be refused
	}
	select {
	case <-s.Context().Done():
	case <-time.After(patience):
		s.conn.t.Error("the peer still takes what is written")
		return
	}
	if err := context.Cause(s.Context()); !isError(err, code) {
		s.conn.t.Errorf("the peer stopped reading with %v, want %v", err, code)
	}
}

// isError reports whether err is a stream error of the peer, or one that it
// took for one of the connection, which it may (RFC 9114 section 8).
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

// sendPacket sends an IP packet as a datagram.
func (s *rawStream) sendPacket(pkt []byte) {
	s.conn.t.Helper()
	s.conn.sendDatagram(s.StreamID(), append([]byte{0}, pkt...))
}

// packetCapsule is a capsule that carries an IP packet. It keeps its place
// among other capsules.
func packetCapsule(pkt []byte) *capsule.Datagram {
	return &capsule.Datagram{Payload: append([]byte{0}, pkt...)}
}

// readPacket returns the next IP packet that came in a datagram of this stream.
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
		if context, m, err := quicvarint.Parse(b[n:]); err == nil && context == 0 {
			return b[n+m:], nil
		}
	}
}

// wireProxy is our proxy, and the network behind it.
type wireProxy struct {
	*proxy.Server
	t      *testing.T
	in     pkitest.Installation
	device *tuntest.Device
}

var (
	proxy4Inside = netip.MustParseAddr("10.77.0.1")
	proxy6Inside = netip.MustParseAddr("fd77::1")
)

// startWireProxy runs a proxy that lets everybody in and advertises everything,
// unless change says otherwise.
func startWireProxy(t *testing.T, change func(*proxy.Config)) *wireProxy {
	t.Helper()
	p := &wireProxy{t: t, in: pkitest.New(proxyName), device: tuntest.New(1400)}
	cfg := proxy.Config{
		Name: proxyName, Listen: []string{"127.0.0.1:0"},
		TLS:     &tls.Config{Certificates: []tls.Certificate{p.in.Proxy}},
		Methods: []string{proxy.MethodNone},
		Pool4:   netip.MustParsePrefix("10.77.0.0/24"), Pool6: netip.MustParsePrefix("fd77::/64"),
		Advertise:     []netip.Prefix{allIPv4, allIPv6},
		OpenDevice:    func() (proxy.Device, error) { return p.device, nil },
		OpenNetwork:   func(proxy.Device) (proxy.Network, error) { return new(routingtest.Network), nil },
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

// dial connects to the proxy and sends SETTINGS unless s is nil.
func (p *wireProxy) dial(s settings) *rawConn {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	conn, err := quic.DialAddr(ctx, p.Addrs()[0].String(),
		&tls.Config{RootCAs: p.in.Roots, ServerName: proxyName,
			NextProtos: []string{http3.NextProtoH3}},
		&quic.Config{EnableDatagrams: true, InitialPacketSize: 1350})
	if err != nil {
		p.t.Fatal(err)
	}
	return newRawConn(p.t, conn, s)
}

const anyPath = "/.well-known/masque/ip/*/*/"

// connectIP is the fields of a request for a tunnel.
func connectIP(path string, more ...string) []string {
	return append([]string{
		":method: CONNECT", ":protocol: connect-ip", ":scheme: https", ":authority: " + proxyName,
		":path: " + path,
	}, more...)
}

// wireTunnel is a tunnel to our proxy, with an address of each family.
type wireTunnel struct {
	*rawStream
	p            *wireProxy
	capsules     *capsule.Reader
	addr4, addr6 netip.Addr
}

// tunnel opens a tunnel on a connection of its own.
func (p *wireProxy) tunnel() *wireTunnel {
	p.t.Helper()
	return p.tunnelOn(p.dial(masqueSettings))
}

// tunnelOn opens a tunnel on c.
func (p *wireProxy) tunnelOn(c *rawConn) *wireTunnel { return p.tunnelFor(c, connectIP(anyPath)) }

// tunnelFor opens a tunnel on c with the request of the given fields.
func (p *wireProxy) tunnelFor(c *rawConn, fields []string) *wireTunnel {
	p.t.Helper()
	u := &wireTunnel{rawStream: c.open(fields...), p: p}
	if status, fields := u.answer(); status != "200" {
		p.t.Fatalf("no tunnel: %v", fields)
	}
	u.capsules = capsule.NewReader(u, 1<<16)
	u.send(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1000, Prefix: any4},
		{RequestID: 1001, Prefix: any6}}})
	assigned := nextCapsule[*capsule.AddressAssign](p.t, u.capsules).Addresses
	if len(assigned) != 2 || assigned[0].Refused() || assigned[1].Refused() {
		p.t.Fatalf("assigned %v", assigned)
	}
	u.addr4, u.addr6 = assigned[0].Prefix.Addr(), assigned[1].Prefix.Addr()
	return u
}

// nextCapsule reads capsules until one of type C.
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

// echoID gives each packet of these tests an ID of its own, by which it is
// known again.
var echoID atomic.Uint32

// newEcho makes an echo request and returns it with its ID.
func newEcho(src, dst netip.Addr) (pkt []byte, id uint16) {
	id = uint16(echoID.Add(1))
	return ippacket.AppendEcho(nil, src, dst, 64, true, id, 1, echoData), id
}

// awaitID reads packets until the echo with the given ID.
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

// awaitOnly is awaitID, and no other echo of these tests may come first.
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

// hasID reports whether pkt is the echo with the given ID.
func hasID(pkt []byte, id uint16) bool {
	p, err := ippacket.Parse(pkt)
	if err != nil {
		return false
	}
	_, got, _, _, ok := ippacket.ParseEcho(pkt, p)
	return ok && got == id
}

// checkAlive checks that the tunnel takes what is written to its stream, and carries
// packets both ways.
func (u *wireTunnel) checkAlive() {
	u.p.t.Helper()
	pkt, id := newEcho(u.addr4, beyond4)
	u.send(packetCapsule(pkt))
	awaitID(u.p.t, u.p.device.Receive, id)
	pkt, id = newEcho(beyond6, u.addr6)
	u.p.device.Inject(pkt)
	awaitID(u.p.t, u.readPacket, id)
}

// rawServer is a proxy that the test plays.
type rawServer struct {
	t    *testing.T
	in   pkitest.Installation
	ln   *quic.Listener
	addr string // address to dial
}

// startRawServer listens until the test ends; protocol is what it negotiates by
// ALPN.
func startRawServer(t *testing.T, in pkitest.Installation, protocol string) *rawServer {
	t.Helper()
	ln, err := quic.ListenAddr("127.0.0.1:0",
		&tls.Config{Certificates: []tls.Certificate{in.Proxy}, NextProtos: []string{protocol}},
		&quic.Config{EnableDatagrams: true, InitialPacketSize: 1350})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return &rawServer{t: t, in: in, ln: ln, addr: ln.Addr().String()}
}

// accept waits for the next connection, and sends SETTINGS unless s is nil.
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

// wireClient is our client, and the host it runs on.
type wireClient struct {
	*client.Client
	t       *testing.T
	device  *tuntest.Device
	network *routingtest.Network
	cancel  context.CancelFunc
	done    chan struct{}
	err     error // result of Run, once done is closed
}

// stop ends the client.
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
		Name: "wire", Proxy: r.addr, TLS: &tls.Config{RootCAs: r.in.Roots, ServerName: proxyName},
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

// failure waits until the client gives up, and returns why.
func (c *wireClient) failure() *client.Error {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		c.t.Fatalf("the client goes on: %+v", c.Status())
	}
	var e *client.Error
	if !errors.As(c.err, &e) {
		c.t.Fatalf("the client ended with %v", c.err)
	}
	return e
}

// wireSession is the far end of a session of our client.
type wireSession struct {
	*rawStream
	c        *wireClient
	capsules *capsule.Reader
}

// granted is what the far end says in establish: addresses, and routes to
// everywhere.
var granted = []capsule.Capsule{
	&capsule.AddressAssign{Addresses: []capsule.Address{
		{RequestID: 1, Prefix: netip.PrefixFrom(inside4, 32)},
		{RequestID: 2, Prefix: netip.PrefixFrom(inside6, 128)},
	}},
	&capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{allIPv4, allIPv6}, 0)},
}

// establish waits for c's request and plays the proxy until c is connected.
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

// checkAlive checks that the client takes what is written to the stream.
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

// awaitDone waits until done.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// heap returns how many bytes are in use.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// awaitDrops waits until drops has the reason n times.
func awaitDrops(t *testing.T, drops func() map[string]uint64, reason string, n uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d packets were dropped for %q", n, reason), func() bool {
		return drops()[reason] >= n
	})
}
