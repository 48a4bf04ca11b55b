package proxy

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	"masquevpn/tun/tuntest"
)

// peer is a client with one tunnel, operated by the test.
type peer struct {
	*http3.RequestStream
	conn   *quic.Conn
	h3     *http3.ClientConn
	device *tuntest.Device
	reader *capsule.Reader
	addr   netip.Addr
}

// hostile starts a proxy and returns its device.
func hostile(t *testing.T, change func(*Config)) (running, *tuntest.Device) {
	t.Helper()
	device := tuntest.New(1400)
	return startServer(t, func(c *Config) {
		c.OpenDevice = func() (Device, error) { return device, nil }
		if change != nil {
			change(c)
		}
	}), device
}

// tunnel connects a client that gets an address.
func tunnel(t *testing.T, s running, device *tuntest.Device, change func(*quic.Config)) *peer {
	t.Helper()
	conn, h3 := s.dial(t, change)
	_, str := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
	p := &peer{RequestStream: str, conn: conn, h3: h3, device: device,
		reader: capsule.NewReader(str, 1<<16)}
	if _, err := str.Write(asking(1)); err != nil {
		t.Fatal(err)
	}
	for !p.addr.IsValid() {
		c, err := p.reader.Next()
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := c.(*capsule.AddressAssign); ok {
			p.addr = a.Addresses[0].Prefix.Addr()
		}
	}
	return p
}

// asking returns an ADDRESS_REQUEST for any IPv4 address.
func asking(id uint64) []byte {
	return (&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: id,
		Prefix: netip.MustParsePrefix("0.0.0.0/32")}}}).Append(nil)
}

var lastEcho atomic.Uint32

// lives checks that packets pass in both directions. Packets may get lost, so
// it sends until one arrives.
func (p *peer) lives(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	target := netip.MustParseAddr("192.0.2.1")
	up, down := uint16(lastEcho.Add(1)), uint16(lastEcho.Add(1))
	untilArrived(t, ctx, func() error {
		return p.SendDatagram(ippacket.AppendEcho([]byte{0}, p.addr, target, 64, true, up, 1, nil))
	}, func(ctx context.Context) ([]byte, error) { return p.device.Receive(ctx) }, up)
	untilArrived(t, ctx, func() error {
		p.device.Inject(ippacket.AppendEcho(nil, target, p.addr, 64, false, down, 1, nil))
		return nil
	}, func(ctx context.Context) ([]byte, error) {
		b, err := p.ReceiveDatagram(ctx)
		return bytes.TrimPrefix(b, []byte{0}), err
	}, down)
}

// untilArrived sends until it receives an echo with the given ID.
func untilArrived(t *testing.T, ctx context.Context, send func() error,
	receive func(context.Context) ([]byte, error), id uint16) {
	t.Helper()
	for ctx.Err() == nil {
		if err := send(); err != nil {
			t.Fatal(err)
		}
		try, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		for {
			pkt, err := receive(try)
			if err != nil {
				break
			}
			p, err := ippacket.Parse(pkt)
			if err != nil {
				continue
			}
			if _, got, _, _, ok := ippacket.ParseEcho(pkt, p); ok && got == id {
				cancel()
				return
			}
		}
		cancel()
	}
	t.Fatal("no packet passes")
}

// manyRoutes returns the longest advertisement of IPv4 routes that the proxy
// accepts.
func manyRoutes() []byte {
	var c capsule.RouteAdvertisement
	a := netip.MustParseAddr("10.0.0.0")
	for range 6500 {
		c.Routes = append(c.Routes, capsule.Route{Start: a, End: a})
		a = a.Next().Next()
	}
	return c.Append(nil)
}

// TestHostileClients checks that no attack of a client stops the traffic of
// other sessions or uses much memory.
func TestHostileClients(t *testing.T) {
	repeat := func(b []byte) func(*peer) error {
		b = bytes.Repeat(b, max(1, (32<<10)/len(b)))
		return func(p *peer) error {
			_, err := p.Write(b)
			return err
		}
	}
	// again opens a new request for each volley, because the proxy resets the
	// stream.
	again := func(b []byte) func(*peer) error {
		return func(p *peer) error {
			str, err := p.h3.OpenRequestStream(p.conn.Context())
			if err != nil {
				return err
			}
			defer str.CancelWrite(0)
			defer str.CancelRead(0)
			req := &http.Request{Method: http.MethodConnect, Proto: "connect-ip", Host: "localhost",
				URL: &url.URL{Scheme: "https", Host: "localhost", Path: anyPath}}
			if err := str.SendRequestHeader(req); err != nil {
				return err
			}
			_, _ = str.Write(b)
			if _, err := str.ReadResponse(); err == nil {
				_, _ = io.Copy(io.Discard, str)
			}
			return nil
		}
	}
	datagrams := func(send func(*peer) error) func(*peer) error {
		return func(p *peer) error {
			for range 100 {
				if err := send(p); err != nil {
					return err
				}
			}
			return nil
		}
	}
	var ids uint64 = 1
	for name, attack := range map[string]struct {
		first  []byte
		volley func(*peer) error

		// paced means that the proxy slows the attack down, because handling it
		// costs more than sending it.
		paced bool
	}{
		"unknown capsule without end": {quicvarint.Append([]byte{0x2b}, quicvarint.Max),
			repeat([]byte{0}), false},
		"unknown capsules without end": {nil, repeat([]byte{0x2b, 0}), false},
		"a byte in each frame": {nil, func(p *peer) error {
			for _, b := range bytes.Repeat((&capsule.AddressAssign{}).Append(nil), 1000) {
				if _, err := p.Write([]byte{b}); err != nil {
					return err
				}
			}
			return nil
		}, true},
		"assignments":         {nil, repeat((&capsule.AddressAssign{}).Append(nil)), true},
		"advertisements":      {nil, repeat((&capsule.RouteAdvertisement{}).Append(nil)), true},
		"long advertisements": {nil, repeat(manyRoutes()), true},
		"DNS":                 {nil, repeat((&capsule.DNSAssign{}).Append(nil)), true},
		"requests for addresses": {nil, func(p *peer) error {
			ids++
			_, err := p.Write(asking(ids))
			return err
		}, false},
		"long packets in capsules": {nil,
			repeat((&capsule.Datagram{Payload: make([]byte, 60<<10)}).Append(nil)), false},
		"malformed capsules": {nil, again((&capsule.AddressRequest{}).Append(nil)), false},
		"long capsules":      {nil, again(quicvarint.Append([]byte{3}, 1<<40)), false},
		"unknown contexts": {nil, datagrams(func(p *peer) error {
			return p.SendDatagram([]byte{2, 0x45})
		}), false},
		"spoofed packets": {nil, datagrams(func(p *peer) error {
			return p.SendDatagram(ippacket.AppendEcho([]byte{0}, netip.MustParseAddr("203.0.113.1"),
				p.addr, 64, true, 1, 1, make([]byte, 1000)))
		}), false},
		"datagrams for no stream": {nil, datagrams(func(p *peer) error {
			return p.conn.SendDatagram(append(quicvarint.Append(nil, 1<<20), 0, 0x45))
		}), false},
	} {
		t.Run(name, func(t *testing.T) {
			s, device := hostile(t, nil)
			other, evil := tunnel(t, s, device, nil), tunnel(t, s, device, nil)
			other.lives(t)
			before := heap()
			ctx, cancel := context.WithCancel(t.Context())
			var volleys atomic.Int32
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := evil.Write(attack.first); err != nil {
					t.Error(err)
				}
				for ctx.Err() == nil && attack.volley(evil) == nil {
					volleys.Add(1)
				}
			})
			// The proxy slows some attacks down after the first volleys, so
			// they get some time.
			const enough = 300
			for i := 0; i < 50 && volleys.Load() < enough; i++ {
				other.lives(t)
				time.Sleep(10 * time.Millisecond)
			}
			if n := volleys.Load(); attack.paced && n >= enough {
				t.Errorf("the proxy accepted %d volleys in half a second", n)
			}
			if after := heap(); after > before+32<<20 {
				t.Errorf("%d bytes are in use during the attack, %d before it", after, before)
			}
			cancel()
			evil.CancelWrite(0)
			_ = evil.conn.CloseWithError(0, "")
			wg.Wait()
			other.lives(t)
		})
	}
}

// heap returns the number of bytes in use.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestClientThatDoesNotRead checks that a client that does not read capsules
// delays nothing but its own session, and that the operator can end the
// session.
func TestClientThatDoesNotRead(t *testing.T) {
	s, device := hostile(t, nil)
	other := tunnel(t, s, device, nil)
	evil := tunnel(t, s, device, func(c *quic.Config) {
		c.InitialStreamReceiveWindow, c.MaxStreamReceiveWindow = 256, 256
	})
	var asked []byte
	for id := range uint64(40) {
		asked = append(asked, asking(id+2)...)
	}
	if _, err := evil.Write(asked); err != nil {
		t.Fatal(err)
	}
	// The answers exceed the window, so the proxy is blocked writing one of
	// them from now on.
	for i := range 3 {
		servers := []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
		if err := s.SetDNS(DNS{Servers: servers}); err != nil {
			t.Fatal(err)
		}
		for {
			c, err := other.reader.Next()
			if err != nil {
				t.Fatal(err)
			}
			if d, ok := c.(*capsule.DNSAssign); ok {
				if got := d.Configurations[0].Nameservers[0].Addresses[0]; got != servers[0] {
					t.Errorf("told %v, want %v", got, servers)
				}
				break
			}
		}
		if err := s.host.refresh(); err != nil {
			t.Fatal(err)
		}
		other.lives(t)
	}
	sessions := s.Sessions()
	if len(sessions) != 2 {
		t.Fatalf("%d sessions", len(sessions))
	}
	if !s.Kick(sessions[1].ID) {
		t.Error("Kick found no session")
	}
	other.lives(t)
}

// TestRefusedRequestsInLog checks that the log line about a refused request has
// a bounded length.
func TestRefusedRequestsInLog(t *testing.T) {
	var out logtest.Buffer
	s := startServer(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&out, nil)) })
	_, h3 := s.dial(t, nil)
	rsp, _ := request(t, h3, "GET", "", "/"+strings.Repeat("x", 8<<10), nil)
	if rsp.StatusCode != 404 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 1000 {
			t.Errorf("a line of %d bytes: %s", len(line), line[:200])
		}
	}
	if !strings.Contains(out.String(), "request refused") {
		t.Error("the request is not in the log")
	}
}
