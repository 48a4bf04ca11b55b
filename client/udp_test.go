package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/masque-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/yosida95/uritemplate/v3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

const udpTarget = "192.0.2.7:53"

// echo is a UDP server on loopback that sends back what it gets.
func echo(t *testing.T) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

// startUDPProxy runs a proxy beyond which udpTarget is target.
func startUDPProxy(t *testing.T, target net.PacketConn, change func(*proxy.Config)) *far {
	t.Helper()
	return startProxy(t, func(c *proxy.Config) {
		c.ConnectUDP = true
		c.Deny = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		c.Resolver = noNames{}
		c.DialUDP = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			if to.String() != udpTarget {
				return nil, errors.New("no such target")
			}
			return new(net.Dialer).DialContext(ctx, "udp", target.LocalAddr().String())
		}
		if change != nil {
			change(c)
		}
	})
}

// noNames is DNS without any names.
type noNames struct{}

func (noNames) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// forwarder is a UDPForwarder that runs in the test.
type forwarder struct {
	*UDPForwarder
	stop context.CancelFunc
	done chan struct{}
	err  error
}

func startForwarder(t *testing.T, addr string, change func(*UDPConfig)) *forwarder {
	t.Helper()
	return startForwarderWith(t, addr, change, func(*UDPForwarder) {})
}

func startForwarderWith(t *testing.T, addr string, change func(*UDPConfig),
	adjust func(*UDPForwarder)) *forwarder {
	t.Helper()
	cfg := UDPConfig{
		Proxy: addr, Token: "secret",
		TLS:    &tls.Config{RootCAs: newInstallation().Roots, ServerName: proxyName},
		Listen: "127.0.0.1:0", Target: udpTarget, Reconnect: true,
	}
	if change != nil {
		change(&cfg)
	}
	u, err := NewUDPForwarder(cfg)
	if err != nil {
		t.Fatal(err)
	}
	adjust(u)
	f := &forwarder{UDPForwarder: u, done: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	f.stop = cancel
	go func() {
		f.err = u.Run(ctx)
		close(f.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-f.done
	})
	return f
}

func (f *forwarder) awaitReady(t *testing.T) {
	t.Helper()
	select {
	case <-f.Ready():
	case <-f.done:
		t.Fatalf("the forwarder ended with %v", f.err)
	case <-time.After(20 * time.Second):
		t.Fatal("the forwarder is not ready")
	}
}

// failure waits for the end of the forwarder and returns why.
func (f *forwarder) failure(t *testing.T) *Error {
	t.Helper()
	select {
	case <-f.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the forwarder goes on")
	}
	var e *Error
	if !errors.As(f.err, &e) {
		t.Fatalf("the forwarder ended with %v, which is no *Error", f.err)
	}
	return e
}

// count returns the number of flows.
func (f *forwarder) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.flows)
}

// peer is a local program that uses a forwarder.
type peer struct{ net.Conn }

func newPeer(t *testing.T, f *forwarder) peer {
	t.Helper()
	c, err := net.Dial("udp", f.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return peer{c}
}

// exchange sends payload until it comes back, as programs that use UDP do.
func (p peer) exchange(t *testing.T, payload string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	for range 200 {
		if _, err := p.Write([]byte(payload)); err != nil {
			t.Fatal(err)
		}
		_ = p.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			n, err := p.Read(buf)
			if err != nil {
				break
			}
			if string(buf[:n]) == payload {
				return
			}
		}
	}
	t.Fatalf("%q was not answered", payload)
}

// awaitFlows waits until the proxy has n sessions.
func (f *far) awaitFlows(t *testing.T, n int) []proxy.SessionStatus {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		list := f.Sessions()
		if len(list) == n {
			return list
		}
		if time.Now().After(deadline) {
			t.Fatalf("the proxy has %d sessions, want %d", len(list), n)
		}
	}
}

func TestForwardUDP(t *testing.T) {
	for name, change := range map[string]func(*UDPConfig){
		"token": nil,
		"certificate": func(c *UDPConfig) {
			c.Token, c.TLS.Certificates = "", []tls.Certificate{newInstallation().user}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := startUDPProxy(t, echo(t), nil)
			f := startForwarder(t, p.addr, change)
			f.awaitReady(t)
			p.awaitFlows(t, 0) // the first was only to see whether it is accepted
			var peers sync.WaitGroup
			for i := range 5 {
				c := newPeer(t, f)
				peers.Go(func() {
					for j := range 10 {
						c.exchange(t, strings.Repeat(string(rune('a'+i)), 100*j)+"end")
					}
				})
			}
			peers.Wait()
			for _, s := range p.awaitFlows(t, 5) {
				if s.Kind != proxy.KindUDP || s.Target != udpTarget || s.User != "alice" {
					t.Errorf("session %+v", s)
				}
			}
			f.stop()
			<-f.done
			if f.err != nil {
				t.Errorf("ended with %v", f.err)
			}
			p.awaitFlows(t, 0)
			// As many as the exchanges, or some more when an answer was late.
			if tx, rx := f.Stats().Send.Packets.Load(), f.Stats().Receive.Packets.Load(); tx < 50 ||
				rx < 50 {
				t.Errorf("the forwarder counted %d packets sent, %d received", tx, rx)
			}
			if s := p.Status(); s.Packets.RX < 50 || s.Packets.TX < 50 {
				t.Errorf("the proxy counted %+v packets", s.Packets)
			}
		})
	}
}

func TestForwardUDPFailures(t *testing.T) {
	p := startUDPProxy(t, echo(t), nil)
	off := startUDPProxy(t, echo(t), func(c *proxy.Config) { c.ConnectUDP = false })
	taken := echo(t).LocalAddr().String()
	_, otherCA, err := pki.NewAuthority("another CA", time.Now())
	must(err)
	otherCAs := x509.NewCertPool()
	otherCAs.AppendCertsFromPEM(otherCA.Cert)
	for name, tc := range map[string]struct {
		change func(*UDPConfig)
		kind   Kind
		says   string
	}{
		"wrong token": {func(c *UDPConfig) {
			c.Token = "guess"
		}, KindCredentials, "does not accept the credentials"},
		"unknown CA": {func(c *UDPConfig) {
			c.TLS.RootCAs = otherCAs
		}, KindIdentity, "unknown authority"},
		"closed port": {func(c *UDPConfig) {
			c.Proxy, c.Reconnect = "127.0.0.1:9", false
		}, KindUnreachable, "does not answer on UDP port 9"},
		"denied target": {func(c *UDPConfig) {
			c.Target = "198.51.100.1:53"
		}, KindRefused, "destination_ip_prohibited"},
		"loopback": {func(c *UDPConfig) {
			c.Target = "[::1]:53"
		}, KindRefused, "choose another target"},
		"unknown name": {func(c *UDPConfig) {
			c.Target = "no-such-host.example:53"
		}, KindRefused, "no address of the target's name"},
		"turned off": {func(c *UDPConfig) {
			c.Proxy = off.addr
		}, KindUsage, "does not forward UDP"},
		"taken port": {func(c *UDPConfig) {
			c.Listen = taken
		}, KindFailure, "address already in use"},
	} {
		t.Run(name, func(t *testing.T) {
			e := startForwarder(t, p.addr, tc.change).failure(t)
			if e.Kind != tc.kind || !strings.Contains(e.Error(), tc.says) ||
				strings.Contains(e.Error(), "\n") {
				t.Errorf("got kind %d, %q, want kind %d and one line with %q", e.Kind, e, tc.kind,
					tc.says)
			}
		})
	}
}

func TestNewUDPForwarderRefuses(t *testing.T) {
	good := UDPConfig{Proxy: "p", Listen: "127.0.0.1:0", Target: "192.0.2.7:53"}
	for key, changes := range map[string][]func(*UDPConfig){
		"proxy": {
			func(c *UDPConfig) { c.Proxy = "" },
			func(c *UDPConfig) { c.Proxy = "https://p/{+target}" },
		},
		"listen": {
			func(c *UDPConfig) { c.Listen = "" },
			func(c *UDPConfig) { c.Listen = "127.0.0.1" },
			func(c *UDPConfig) { c.Listen = "127.0.0.1:dns" },
			func(c *UDPConfig) { c.Listen = "127.0.0.1:65536" },
		},
		"target": {
			func(c *UDPConfig) { c.Target = "" },
			func(c *UDPConfig) { c.Target = "192.0.2.7" },
			func(c *UDPConfig) { c.Target = "192.0.2.7:0" },
			func(c *UDPConfig) { c.Target = ":53" },
			func(c *UDPConfig) { c.Target = "*:53" },
			func(c *UDPConfig) { c.Target = "192.0.2.0/24:53" },
			func(c *UDPConfig) { c.Target = "[fe80::1%eth0]:53" },
			func(c *UDPConfig) { c.Target = "2001:db8::7:53" },
		},
		"reconnect.max_delay": {func(c *UDPConfig) { c.MaxDelay = -1 }},
	} {
		for i, change := range changes {
			c := good
			change(&c)
			_, err := NewUDPForwarder(c)
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindUsage || !strings.HasPrefix(e.Reason, key+":") {
				t.Errorf("%s, %d: got %v", key, i+1, err)
			}
		}
	}
	if _, err := NewUDPForwarder(good); err != nil {
		t.Error(err)
	}
}

// A proxy that is gone and back is used again, by peers that were there before
// and by new ones.
func TestForwardUDPReconnects(t *testing.T) {
	target := echo(t)
	var f *forwarder
	var old peer
	var addr string
	outer := t
	t.Run("before", func(t *testing.T) {
		p := startUDPProxy(t, target, nil)
		addr = p.addr
		f = startForwarder(outer, addr, nil)
		f.awaitReady(t)
		old = newPeer(outer, f)
		old.exchange(t, "before")
	})
	p := startUDPProxy(t, target, func(c *proxy.Config) { c.Listen = []string{addr} })
	old.exchange(t, "after")
	newPeer(t, f).exchange(t, "new")
	p.awaitFlows(t, 2)
}

// When the proxy has a limit, a peer that is quiet makes room for one that is
// not.
func TestForwardUDPMakesRoom(t *testing.T) {
	p := startUDPProxy(t, echo(t), func(c *proxy.Config) { c.MaxUDPFlowsPerUser = 2 })
	f := startForwarder(t, p.addr, nil)
	f.awaitReady(t)
	first := newPeer(t, f)
	for _, c := range []peer{first, newPeer(t, f), newPeer(t, f), first} {
		c.exchange(t, "hello")
	}
	p.awaitFlows(t, 2)
}

// There are only so many flows at once.
func TestForwardUDPManyPeers(t *testing.T) {
	p := startUDPProxy(t, echo(t), func(c *proxy.Config) { c.MaxUDPFlowsPerUser = 2 * maxFlows })
	f := startForwarder(t, p.addr, nil)
	f.awaitReady(t)
	for range maxFlows + 2 {
		newPeer(t, f).exchange(t, "hello")
		if n := f.count(); n > maxFlows {
			t.Fatalf("%d flows", n)
		}
	}
	p.awaitFlows(t, maxFlows)
}

// While a proxy refuses flows, it is not asked for one with every packet.
func TestForwardUDPHoldsBack(t *testing.T) {
	var asked atomic.Int32
	p := foreign(t, func(n int32, w http.ResponseWriter, _ *http.Request) bool {
		asked.Store(n)
		if n > 1 {
			w.WriteHeader(http.StatusForbidden)
		}
		return n > 1
	})
	target := echo(t).LocalAddr().String()
	f := startForwarder(t, p.addr, func(c *UDPConfig) { c.Target = target })
	f.awaitReady(t)
	c := newPeer(t, f)
	start := time.Now()
	packets := 0
	for ; packets < 1000; packets++ {
		if _, err := c.Write([]byte("hello?")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Microsecond)
	}
	if n, most := int(asked.Load()), 3+int(time.Since(start)/holdTime); n > most {
		t.Errorf("%d requests for %d packets, want %d at most", n, packets, most)
	}
}

// A flow that nobody uses ends, and comes back when it is needed.
func TestForwardUDPIdle(t *testing.T) {
	p := startUDPProxy(t, echo(t), nil)
	f := startForwarder(t, p.addr, func(c *UDPConfig) { c.IdleTimeout = 40 * time.Millisecond })
	f.awaitReady(t)
	c := newPeer(t, f)
	for range 2 {
		c.exchange(t, "hello")
		p.awaitFlows(t, 0)
	}
}

// A connection without flows is used now and then, so that the proxy keeps it.
func TestForwardUDPKeepsTheConnection(t *testing.T) {
	far := startUDPProxy(t, echo(t), nil)
	startForwarderWith(t, far.addr, nil, func(u *UDPForwarder) { u.useInterval = time.Millisecond })
	for {
		for _, r := range far.Counters().Requests {
			if r.Reason == "accepted" && r.Count >= 4 {
				return
			}
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// A target that refuses packets ends a flow, but not the next one.
func TestForwardUDPTargetRefuses(t *testing.T) {
	var local atomic.Value
	local.Store("127.0.0.1:9")
	target := echo(t)
	p := startUDPProxy(t, target, func(c *proxy.Config) {
		c.DialUDP = func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", local.Load().(string))
		}
	})
	f := startForwarder(t, p.addr, nil)
	f.awaitReady(t)
	c := newPeer(t, f)
	if _, err := c.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	for p.Status().Packets.RX == 0 { // the sum has the flows that ended
		time.Sleep(time.Millisecond)
	}
	p.awaitFlows(t, 0)
	for deadline := time.Now().Add(20 * time.Second); f.count() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the flow is still there")
		}
	}
	local.Store(target.LocalAddr().String())
	c.exchange(t, "hello")
}

// Who is refused while it runs is told, and asks no more.
func TestForwardUDPRevoked(t *testing.T) {
	var gone atomic.Bool
	p := startUDPProxy(t, echo(t), func(c *proxy.Config) {
		c.Users, c.Methods = users{&gone}, []string{proxy.MethodMTLS}
	})
	f := startForwarder(t, p.addr, func(c *UDPConfig) {
		c.TLS.Certificates = []tls.Certificate{newInstallation().user}
	})
	f.awaitReady(t)
	c := newPeer(t, f)
	c.exchange(t, "hello")
	gone.Store(true)
	p.UsersChanged()
	p.awaitFlows(t, 0)
	for ended := false; !ended; {
		if _, err := c.Write([]byte("hello?")); err != nil &&
			!strings.Contains(err.Error(), "refused") {
			t.Fatal(err)
		}
		select {
		case <-f.done:
			ended = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	if e := f.failure(t); e.Kind != KindCredentials {
		t.Errorf("got %v", e)
	}
}

// Packets that are too large for a datagram go through all the same, both ways;
// one that is too long is dropped and counted, and its flow goes on.
func TestForwardUDPTooLarge(t *testing.T) {
	p := startUDPProxy(t, echo(t), nil)
	f := startForwarder(t, p.addr, nil)
	f.awaitReady(t)
	c := newPeer(t, f)
	for _, size := range []int{1500, 2047, 2048, 2049, 4096, connectip.MaxUDPPayload} {
		c.exchange(t, strings.Repeat("x", size))
	}
	if _, err := c.Write(make([]byte, connectip.MaxUDPPayload+1)); err != nil {
		t.Fatal(err)
	}
	c.exchange(t, "small")
	if drops := f.Stats().Send.Drops(); drops["too_big"] != 1 || len(drops) != 1 {
		t.Errorf("drops %v, want 1 too big", drops)
	}
	p.awaitFlows(t, 1)
}

// foreign is masque-go's own proxy. It does with the request for flow number n,
// from 1, what script says.
func foreign(t *testing.T, script func(n int32, w http.ResponseWriter,
	r *http.Request) (handled bool)) *far {
	t.Helper()
	var n atomic.Int32
	var relay masque.Proxy
	template := uritemplate.MustNew("https://" + proxyName + udpPath)
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		if script != nil && script(n.Add(1), w, r) {
			return
		}
		r.Host = proxyName // which has no port, as the template
		req, err := masque.ParseProxyRequest(r, template)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Capsule-Protocol", "?1")
		_ = relay.Proxy(w, req)
	})
	t.Cleanup(func() { _ = relay.Close() })
	return f
}

func TestForwardUDPThroughForeignProxy(t *testing.T) {
	target := echo(t).LocalAddr().String()
	p := foreign(t, nil)
	f := startForwarder(t, p.addr, func(c *UDPConfig) { c.Target = target })
	f.awaitReady(t)
	newPeer(t, f).exchange(t, "hello")
	newPeer(t, f).exchange(t, "hello again")
}

// What a proxy answers that is no proxy for UDP, or does not answer at all,
// ends no more than it has to.
func TestForwardUDPBadAnswers(t *testing.T) {
	for name, tc := range map[string]struct {
		answer func(w http.ResponseWriter)
		says   string // why the forwarder ends, "" when it goes on
	}{
		"success with content": {answer: func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			// the stream stays until the client ends it
			_, _ = io.Copy(io.Discard, w.(http3.HTTPStreamer).HTTPStream())
		}},
		"no content": {answer: func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusNoContent)
		}},
		"unavailable": {answer: func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusBadGateway)
		}},
		"forbidden": {answer: func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusForbidden)
		}},
		"credentials": {answer: func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusUnauthorized)
		}, says: "credentials"},
		"silence": {says: "does not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			done := make(chan struct{})
			defer close(done)
			p := foreign(t, func(n int32, w http.ResponseWriter, r *http.Request) bool {
				if n != 2 { // after the one that shows whether the target is accepted
					return false
				}
				if tc.answer == nil {
					<-r.Context().Done()
				} else {
					tc.answer(w)
				}
				return true
			})
			target := echo(t).LocalAddr().String()
			f := startForwarderWith(t, p.addr, func(c *UDPConfig) {
				c.Target, c.Reconnect = target, false
			},
				func(f *UDPForwarder) { f.answerTimeout = 200 * time.Millisecond })
			f.awaitReady(t)
			c := newPeer(t, f)
			if tc.says == "" {
				c.exchange(t, "hello")
				return
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if e := f.failure(t); !strings.Contains(e.Error(), tc.says) {
				t.Errorf("ended with %v, want %q", e, tc.says)
			}
		})
	}
}
