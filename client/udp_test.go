package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
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

// echo starts a UDP server on loopback that returns each packet to its sender.
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

// startUDPProxy runs a proxy that reaches target as udpTarget.
func startUDPProxy(t *testing.T, target net.PacketConn, change func(*proxy.Config)) *testProxy {
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

// noNames is a proxy.Resolver that finds no name.
type noNames struct{}

func (noNames) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// forwarder is a running UDPForwarder.
type forwarder struct {
	*UDPForwarder
	stop context.CancelFunc
	done chan struct{} // closed when Run has returned
	err  error         // result of Run
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

// failure waits until the forwarder ends and returns its error.
func (f *forwarder) failure(t *testing.T) *Error {
	t.Helper()
	select {
	case <-f.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the forwarder does not end")
	}
	var e *Error
	if !errors.As(f.err, &e) {
		t.Fatalf("the forwarder ended with %v, not with an *Error", f.err)
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

// exchange sends payload repeatedly until it comes back.
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
func (f *testProxy) awaitFlows(t *testing.T, n int) []proxy.SessionStatus {
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

// A forwarder serves several peers at once, with either kind of credentials.
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
			p.awaitFlows(t, 0) // the flow of the first request has ended
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
			// There were 50 exchanges, more packets if an answer was late.
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

// Each failure ends the forwarder with its kind and a message of one line.
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
		text   string
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
			if e.Kind != tc.kind || !strings.Contains(e.Error(), tc.text) ||
				strings.Contains(e.Error(), "\n") {
				t.Errorf("got kind %d, %q, want kind %d and one line with %q", e.Kind, e, tc.kind,
					tc.text)
			}
		})
	}
}

// NewUDPForwarder names the key of a wrong value.
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
			t.Run(fmt.Sprintf("%s %d", key, i+1), func(t *testing.T) {
				c := good
				change(&c)
				_, err := NewUDPForwarder(c)
				var e *Error
				if !errors.As(err, &e) || e.Kind != KindUsage || e.Key != key {
					t.Errorf("got %v, want a usage error of %s", err, key)
				}
			})
		}
	}
	if _, err := NewUDPForwarder(good); err != nil {
		t.Error(err)
	}
}

// After the proxy restarts, the forwarder serves its old peers and new ones.
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

// When the proxy's limit is reached, the flow of a quiet peer ends to make room
// for a new one.
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

// A forwarder has at most maxFlows flows at once.
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

// While the proxy refuses flows, the forwarder does not send it a request for
// every packet.
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

// An idle flow ends. The next packet opens a new one.
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

// The forwarder sends requests on a connection without flows, so that the proxy
// keeps it.
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

// A target that refuses packets ends the flow. A new flow works once the target
// accepts packets.
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
	for p.Status().Packets.RX == 0 { // includes ended flows
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

// A forwarder whose user is removed ends with an error and sends no further
// requests.
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

// Payloads that are too large for a datagram pass in capsules, in both
// directions. One above MaxUDPPayload is dropped and counted; its flow
// continues.
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

// foreign starts the proxy of masque-go. Before it serves a request, it calls
// script, unless that is nil, with the number n of the request, 1 for the
// first. A script that returns true has handled the request.
func foreign(t *testing.T, script func(n int32, w http.ResponseWriter,
	r *http.Request) (handled bool)) *testProxy {
	t.Helper()
	var n atomic.Int32
	var relay masque.Proxy
	template := uritemplate.MustNew("https://" + proxyName + udpPath)
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		if script != nil && script(n.Add(1), w, r) {
			return
		}
		r.Host = proxyName // the template has no port
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

// The forwarder works with the proxy of masque-go.
func TestForwardUDPThroughForeignProxy(t *testing.T) {
	target := echo(t).LocalAddr().String()
	p := foreign(t, nil)
	f := startForwarder(t, p.addr, func(c *UDPConfig) { c.Target = target })
	f.awaitReady(t)
	newPeer(t, f).exchange(t, "hello")
	newPeer(t, f).exchange(t, "hello again")
}

// A response that refuses one flow does not end the forwarder. A refusal of the
// credentials and a missing response do.
func TestForwardUDPBadAnswers(t *testing.T) {
	for name, tc := range map[string]struct {
		answer func(w http.ResponseWriter)
		text   string // in the error that ends the forwarder; "": it continues
	}{
		"success with content": {answer: func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			// The client ends the stream.
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
		}, text: "credentials"},
		"silence": {text: "does not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			done := make(chan struct{})
			defer close(done)
			p := foreign(t, func(n int32, w http.ResponseWriter, r *http.Request) bool {
				if n != 2 { // the first is the forwarder's check of the target
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
			if tc.text == "" {
				c.exchange(t, "hello")
				return
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if e := f.failure(t); !strings.Contains(e.Error(), tc.text) {
				t.Errorf("ended with %v, want %q", e, tc.text)
			}
		})
	}
}
