package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/masque-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"github.com/yosida95/uritemplate/v3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/logtest"
)

// flow is a UDP flow of a client of masque-go.
type flow struct {
	*masque.Conn
	rsp *http.Response
}

// openFlow opens a flow to target4.
func openFlow(t *testing.T, h3 *http3.ClientConn, header http.Header) flow {
	t.Helper()
	return openFlowTo(t, h3, target4.String(), header)
}

func openFlowTo(t *testing.T, h3 *http3.ClientConn, target string, header http.Header) flow {
	t.Helper()
	req, err := masque.NewRequest(t.Context(),
		uritemplate.MustNew("https://localhost"+udpPath+"{target_host}/{target_port}/"), target)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header()[k] = v
	}
	c, rsp, err := masque.NewClientConn(h3).Dial(req)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return flow{c, rsp}
}

// exchange sends payload and waits until it comes back.
func (f flow) exchange(t *testing.T, payload []byte) {
	t.Helper()
	if _, err := f.WriteTo(payload, nil); err != nil {
		t.Fatal(err)
	}
	if got := f.receive(t); !bytes.Equal(got, payload) {
		t.Fatalf("sent %d bytes, received %d others", len(payload), len(got))
	}
}

func (f flow) receive(t *testing.T) []byte {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, _, err := f.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// awaitEnd waits until the proxy ends the flow.
func (f flow) awaitEnd(t *testing.T) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, _, err := f.ReadFrom(make([]byte, 1<<16))
	if !errors.Is(err, io.EOF) {
		t.Errorf("the flow ended with %v, want %v", err, io.EOF)
	}
}

// awaitSessions waits until the proxy has n sessions, and returns them.
func awaitSessions(t *testing.T, s running, n int) []SessionStatus {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		list := s.Sessions()
		if len(list) == n {
			return list
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d sessions, want %d", len(list), n)
		}
	}
}

// TestUDPCarries checks that packets pass in both directions and are counted,
// for each form of the target.
func TestUDPCarries(t *testing.T) {
	var log logtest.Buffer
	s := startServer(t, withUDP(echo(t), func(c *Config) {
		c.Resolver = names{"dns.example": {"2001:db8::7"}}
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	}))
	_, h3 := s.dial(t, nil)
	for target, at := range map[string]string{
		"192.0.2.7:53":     "192.0.2.7:53",
		"[2001:db8::7]:53": "[2001:db8::7]:53",
		"dns.example:53":   "[2001:db8::7]:53",
	} {
		t.Run(target, func(t *testing.T) {
			before := s.Status()
			f := openFlowTo(t, h3, target, nil)
			if got := f.RemoteAddr().String(); got != at {
				t.Errorf("the proxy sends to %s, want %s", got, at)
			}
			f.exchange(t, []byte("hello"))
			f.exchange(t, nil)
			f.exchange(t, bytes.Repeat([]byte{1}, 1200))
			session := awaitSessions(t, s, 1)[0]
			if session.Kind != KindUDP || session.Target != target || session.State != "connected" {
				t.Errorf("session %+v", session)
			}
			_ = f.Close()
			awaitSessions(t, s, 0)
			after := s.Status()
			if after.Packets.RX-before.Packets.RX != 3 || after.Packets.TX-before.Packets.TX != 3 ||
				after.Bytes.RX-before.Bytes.RX != 1205 || after.Bytes.TX-before.Bytes.TX != 1205 {
				t.Errorf("the proxy counted %+v packets, %+v bytes before, then %+v, %+v",
					before.Packets, before.Bytes, after.Packets, after.Bytes)
			}
		})
	}
	// Flows are logged at debug level only.
	if strings.Contains(log.String(), "session") {
		t.Errorf("logged:\n%s", log.String())
	}
}

// TestUDPContexts checks that datagrams with unknown contexts and unknown
// capsules are ignored (RFC 9298 section 4).
func TestUDPContexts(t *testing.T) {
	s := startServer(t, withUDP(echo(t), nil))
	_, h3 := s.dial(t, nil)
	rsp, str := request(t, h3, "CONNECT", udpProtocol, udpPath+"192.0.2.7/53/", nil)
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	unknown := []byte{0x17, 0x05, 'h', 'e', 'l', 'l', 'o'} // a capsule
	if _, err := str.Write(unknown); err != nil {
		t.Fatal(err)
	}
	for _, datagram := range []string{"\x02unknown", "\x40\x03unknown", "\x00known"} {
		if err := str.SendDatagram([]byte(datagram)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, err := str.ReceiveDatagram(ctx)
	if err != nil || string(got) != "\x00known" {
		t.Errorf("received %q, %v", got, err)
	}
	_ = str.Close()
	awaitSessions(t, s, 0)
	if n := s.Status().Packets.RX; n != 1 {
		t.Errorf("%d packets were counted, want 1", n)
	}
}

// TestUDPFlowsAreApart checks that packets of the flows on one connection do
// not mix.
func TestUDPFlowsAreApart(t *testing.T) {
	s := startServer(t, withUDP(echo(t), nil))
	_, h3 := s.dial(t, nil)
	var wg sync.WaitGroup
	for i := range 8 {
		f := openFlow(t, h3, nil)
		wg.Go(func() {
			for j := range 20 {
				f.exchange(t, []byte{byte(i), byte(j)})
			}
		})
	}
	awaitSessions(t, s, 8)
	wg.Wait()
}

// TestUDPTooLarge checks that a packet that is too large is dropped and
// counted, in either direction, and that the flow goes on. Packets that are too
// large only for a datagram arrive in a capsule, which this client skips.
func TestUDPTooLarge(t *testing.T) {
	target, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	s := startServer(t, withUDP(target, func(c *Config) {
		dial := c.DialUDP
		c.DialUDP = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			conn, err := dial(ctx, to)
			return narrow{conn}, err
		}
	}))
	_, h3 := s.dial(t, nil)
	f := openFlow(t, h3, nil)
	for _, payload := range []string{strings.Repeat("x", 1001), "small"} {
		if _, err := f.WriteTo([]byte(payload), nil); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 1<<16)
	n, from, err := target.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "small" {
		t.Fatalf("the target received %d bytes, %v", n, err)
	}
	for _, size := range []int{1500, 2047, 2048, 9000, 5} {
		if _, err := target.WriteTo(buf[:size], from); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.receive(t); len(got) != 5 {
		t.Errorf("the client received %d bytes", len(got))
	}
	if drops := awaitSessions(t, s, 1)[0].Drops; drops["too_big"] != 2 || len(drops) != 1 {
		t.Errorf("drops %v, want 2 too big", drops)
	}
}

// TestUDPCapsules checks that payloads of all sizes pass in both directions, in
// capsules if they are too large for datagrams.
func TestUDPCapsules(t *testing.T) {
	s := startServer(t, withUDP(echo(t), nil))
	_, h3 := s.dial(t, nil)
	rsp, raw := request(t, h3, "CONNECT", udpProtocol, udpPath+"192.0.2.7/53/", nil)
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	str := connectip.NewUDPStream(raw)
	got := make(chan []byte, 10)
	var receiving sync.WaitGroup
	deliver := func(payload []byte) { got <- bytes.Clone(payload) }
	ctx, stop := context.WithCancel(t.Context())
	receiving.Go(func() { str.ReceiveDatagrams(ctx, deliver) })
	receiving.Go(func() {
		str.ReceiveCapsules(deliver, func() { t.Error("a payload is too long") })
	})
	for _, size := range []int{0, 1, 1100, 1400, 2048, 4096, connectip.MaxUDPPayload} {
		payload := bytes.Repeat([]byte{byte(size)}, size)
		if err := str.Send(payload); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		select {
		case back := <-got:
			if !bytes.Equal(back, payload) {
				t.Errorf("%d bytes came back, want %d", len(back), size)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%d bytes do not come back", size)
		}
	}
	// The proxy ignores capsules that it cannot use, and the flow goes on.
	for _, b := range [][]byte{
		append(quicvarint.Append([]byte{0}, 10001), make([]byte, 10001)...), // too long
		{0, 2, 2, 'x'},      // unknown context
		{0, 0},              // no context
		{0x17, 2, 'x', 'y'}, // unknown type
		{0, 6, 0, 'k', 'n', 'o', 'w', 'n'},
	} {
		if _, err := raw.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if back := <-got; string(back) != "known" {
		t.Errorf("%q came back", back)
	}
	if drops := awaitSessions(t, s, 1)[0].Drops; drops["too_big"] != 1 || len(drops) != 1 {
		t.Errorf("drops %v, want 1 too big", drops)
	}
	str.Close()
	stop()
	receiving.Wait()
	awaitSessions(t, s, 0)
}

// narrow is a socket whose path carries 1000 bytes and whose routers report
// larger packets.
type narrow struct{ net.Conn }

func (n narrow) Write(b []byte) (int, error) {
	if len(b) > 1000 {
		return 0, &net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EMSGSIZE)}
	}
	return n.Conn.Write(b)
}

// TestUDPEnds checks that for each cause the client is told the end of its
// flow, and that the proxy releases the session.
func TestUDPEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config)
		end    func(t *testing.T, s running, target net.PacketConn)
	}{
		"kicked": {end: func(t *testing.T, s running, _ net.PacketConn) {
			if !s.Kick(s.Sessions()[0].ID) {
				t.Error("there was no session")
			}
		}},
		"revoked": {
			change: func(c *Config) { c.Methods, c.Users = []string{MethodToken}, &leaver{} },
			end: func(t *testing.T, s running, _ net.PacketConn) {
				s.cfg().Users.(*leaver).gone.Store(true)
				s.UsersChanged()
			},
		},
		"idle": {change: func(c *Config) {
			c.UDPIdleTimeout = 40 * time.Millisecond
		}, end: func(*testing.T, running, net.PacketConn) {}},
		"target denied": {
			change: func(c *Config) {
				var reads atomic.Int32 // the first is at the start
				c.LocalNetworks = func() ([]netip.Prefix, error) {
					if reads.Add(1) == 1 {
						return nil, nil
					}
					return []netip.Prefix{netip.PrefixFrom(target4.Addr(), 24)}, nil
				}
			},
			end: func(t *testing.T, s running, _ net.PacketConn) {
				if err := errors.Join(s.host.readLocal(), s.host.refresh()); err != nil {
					t.Error(err)
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			target := echo(t)
			s := startServer(t, withUDP(target, tc.change))
			_, h3 := s.dial(t, nil)
			f := openFlow(t, h3, http.Header{"Authorization": {"Bearer secret"}})
			f.exchange(t, []byte("hello"))
			tc.end(t, s, target)
			f.awaitEnd(t)
			awaitSessions(t, s, 0)
		})
	}
}

// leaver is oneUser until gone is set.
type leaver struct {
	oneUser
	gone atomic.Bool
}

func (l *leaver) ByName(name string) (User, bool) {
	u, ok := l.oneUser.ByName(name)
	return u, ok && !l.gone.Load()
}

// TestUDPTargetUnreachable checks that a target that refuses packets ends the
// flow (RFC 9298 section 3.1).
func TestUDPTargetUnreachable(t *testing.T) {
	target, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := startServer(t, withUDP(target, nil))
	_, h3 := s.dial(t, nil)
	f := openFlow(t, h3, nil)
	target.Close()
	if _, err := f.WriteTo([]byte("hello"), nil); err != nil {
		t.Fatal(err)
	}
	f.awaitEnd(t)
	awaitSessions(t, s, 0)
}

// TestUDPShutdown checks that flows end when the proxy stops.
func TestUDPShutdown(t *testing.T) {
	s := startServer(t, withUDP(echo(t), nil))
	_, h3 := s.dial(t, nil)
	f := openFlow(t, h3, nil)
	f.exchange(t, []byte("hello"))
	s.stop()
	if _, _, err := f.ReadFrom(make([]byte, 1)); err == nil {
		t.Error("the flow goes on")
	}
}

// TestUDPReplaces checks that the flows of a client on a new connection replace
// its flows on the old one, and no other sessions.
func TestUDPReplaces(t *testing.T) {
	s := startServer(t, withUDP(echo(t), func(c *Config) { c.MaxSessions = 3 }))
	header := http.Header{connectip.InstanceHeader: {"abc"}}
	_, h3 := s.dial(t, nil)
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath, header); rsp.StatusCode != 200 {
		t.Fatalf("tunnel: status %d", rsp.StatusCode)
	}
	old := []flow{openFlow(t, h3, header), openFlow(t, h3, header)}
	awaitSessions(t, s, 3)
	_, h3 = s.dial(t, nil)
	again := openFlow(t, h3, header)
	for _, f := range old {
		f.awaitEnd(t)
	}
	again.exchange(t, []byte("hello"))
	list := awaitSessions(t, s, 2)
	if list[0].Kind != KindIP || list[1].Kind != KindUDP {
		t.Errorf("sessions left: %s, %s", list[0].Kind, list[1].Kind)
	}
}

// TestUDPIdle checks that a flow goes on while packets pass in either
// direction, and ends after the idle timeout that RFC 9298 section 3.1
// recommends.
func TestUDPIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ss := &udpSession{}
		ss.ctx, ss.stop = context.WithCancelCause(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			ss.awaitIdle(DefaultUDPIdleTimeout)
		}()
		var last time.Time
		for i := range 10 {
			time.Sleep(DefaultUDPIdleTimeout - time.Second)
			last = time.Now()
			if i%2 == 0 {
				ss.stats.Receive.Packets.Add(1)
			} else {
				ss.stats.Send.Packets.Add(1)
			}
		}
		<-done
		if quiet := time.Since(last); quiet < DefaultUDPIdleTimeout ||
			quiet > DefaultUDPIdleTimeout*5/4 {
			t.Errorf("ended %v after the last packet, want %v or a quarter more", quiet,
				DefaultUDPIdleTimeout)
		}
		if cause := context.Cause(ss.ctx); cause != errIdle {
			t.Errorf("ended for %v", cause)
		}
	})
}

// TestUDPRate checks that the packets of a flow arrive and count against the
// rates of its user.
func TestUDPRate(t *testing.T) {
	users := &oneChanging{alice: User{Name: "alice", RateUp: 1_000_000, RateDown: 2_000_000}}
	s := startServer(t, withUDP(echo(t), withUsers(users, nil)))
	_, h3 := s.dial(t, nil)
	f := openFlow(t, h3, asAlice)
	a := s.sessions.list()[0].base().userState
	start := time.Now()
	for range 100 {
		f.exchange(t, make([]byte, 1000))
	}
	// At these rates the packets take nearly a second up and half of that down.
	if up, down := a.up.Due(), a.down.Due(); up.Before(start) || down.Before(start) ||
		!up.After(down) {
		t.Errorf("the rates are used until %v after the start upwards and %v downwards",
			up.Sub(start), down.Sub(start))
	}
}
