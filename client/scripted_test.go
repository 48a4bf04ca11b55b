package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
)

// scripted starts a proxy that handles requests with handler.
func scripted(t *testing.T, handler http.HandlerFunc) *testProxy {
	t.Helper()
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{
		EnableDatagrams: true, QUICConfig: &quic.Config{EnableDatagrams: true,
			InitialPacketSize: 1350},
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{newInstallation().Proxy}}),
		Handler:   handler,
	}
	served := make(chan struct{})
	go func() {
		_ = server.Serve(socket)
		close(served)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		_ = socket.Close()
		<-served
	})
	return &testProxy{addr: socket.LocalAddr().String()}
}

// write sends capsules on str in one write.
func write(str *http3.Stream, capsules ...capsule.Capsule) {
	var b []byte
	for _, c := range capsules {
		b = c.Append(b)
	}
	_, _ = str.Write(b)
}

// requested waits for the next ADDRESS_REQUEST and returns its addresses. It
// returns nil at the end of the stream.
func requested(r *capsule.Reader) []capsule.Address {
	for {
		c, err := r.Next()
		if err != nil {
			return nil
		}
		if x, ok := c.(*capsule.AddressRequest); ok {
			return x.Addresses
		}
	}
}

// keepSending sends a datagram every 10 ms until ctx is done.
func keepSending(ctx context.Context, str *http3.Stream, datagram []byte) {
	for ctx.Err() == nil && str.SendDatagram(datagram) == nil {
		time.Sleep(10 * time.Millisecond)
	}
}

// If the proxy refuses the addresses of the previous session, the client
// requests any address next.
func TestFormerAddressesAreRefused(t *testing.T) {
	var sessions atomic.Int32
	lose := make(chan struct{})
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		reader := capsule.NewReader(str, 1<<16)
		asked := requested(reader)
		var answer capsule.AddressAssign
		for _, a := range asked {
			switch {
			case !a.Prefix.Addr().IsUnspecified():
				a = connectip.Refusal(a)
			case a.Prefix.Addr().Is4():
				a.Prefix = netip.MustParsePrefix("10.77.0.2/32")
			default:
				a.Prefix = netip.MustParsePrefix("fd77::2/128")
			}
			answer.Addresses = append(answer.Addresses, a)
		}
		write(str, &answer, &capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, 0)})
		go keepSending(r.Context(), str,
			append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		if sessions.Add(1) == 1 {
			<-lose
			_ = str.Close()
			str.CancelRead(0)
			return
		}
		_ = requested(reader)
	})
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	close(lose)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
}

// The error names a proxy that does not answer the request.
func TestSilentProxy(t *testing.T) {
	f := scripted(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c, err := New(Config{Name: "test", Proxy: f.addr,
		TLS: &tls.Config{RootCAs: newInstallation().Roots, ServerName: proxyName}})
	if err != nil {
		t.Fatal(err)
	}
	c.dialer.setControl(nil, c.cfg.resolverConfig())
	ctx, cancel := context.WithTimeout(t.Context(), answerTimeout/20)
	defer cancel()
	_, _, err = c.dial(ctx)
	var e *Error
	if !errors.As(err, &e) || e.Kind != KindUnreachable ||
		!strings.Contains(e.Reason, "does not answer") {
		t.Errorf("got %v", err)
	}
}

// assignBoth assigns one address of each family and advertises a network of
// each, unprompted.
func assignBoth(str *http3.Stream) {
	write(str,
		&capsule.AddressAssign{Addresses: []capsule.Address{{Prefix: netip.MustParsePrefix("10.77.0.2/32")}, {Prefix: netip.MustParsePrefix("fd77::2/128")}}},
		&capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes("192.0.2.0/24",
			"2001:db8::/32"), 0)})
}

// A tunnel has the unprompted and the static addresses, without duplicates.
func TestUnpromptedAddresses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
	}{
		{"nothing is asked for", func(c *Config) { c.Request = prefixes() }},
		{"the same are static", func(c *Config) {
			c.Static = prefixes("10.77.0.2/32", "fd77::2/128")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(http.StatusOK)
				str := w.(http3.HTTPStreamer).HTTPStream()
				assignBoth(str)
				go keepSending(r.Context(), str,
					append([]byte{0},
						ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
							netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
				if asked := requested(capsule.NewReader(str, 1<<16)); asked != nil {
					t.Errorf("the client asks for %v", asked)
				}
			})
			n := startClient(t, f, tc.change)
			n.awaitConnected(t)
			want := prefixes("10.77.0.2/32", "fd77::2/128")
			if got := n.Status().Addresses; !slices.Equal(got, want) {
				t.Errorf("addresses %v, want %v", got, want)
			}
			if got := n.network.Last().Addresses; !slices.Equal(got, want) {
				t.Errorf("addresses in the kernel %v, want %v", got, want)
			}
		})
	}
}

// The client sends one ADDRESS_REQUEST in a run to a proxy that ends the tunnel
// at such a request and assigns addresses unprompted.
func TestProxyRejectsAddressRequest(t *testing.T) {
	var asked, sessions atomic.Int32
	lose := make(chan struct{})
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		assignBoth(str)
		go keepSending(r.Context(), str,
			append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		read := make(chan struct{})
		go func() {
			defer close(read)
			if requested(capsule.NewReader(str, 1<<16)) != nil {
				asked.Add(1)
			}
		}()
		if sessions.Add(1) == 2 {
			select {
			case <-lose:
			case <-read:
			}
		} else {
			<-read
		}
		_ = str.Close()
		str.CancelRead(0)
		<-read
	})
	// The status has the reason until the next attempt, which may start at
	// once.
	log := new(logtest.Buffer)
	n := startClient(t, f, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	n.await(t, "connected without asking", func(s Status) bool {
		return s.State == StateConnected && sessions.Load() == 2
	})
	if !strings.Contains(log.String(), "addresses.request = []") {
		t.Error("the log does not name the setting")
	}
	close(lose)
	n.await(t, "connected anew", func(s Status) bool {
		return s.State == StateConnected && sessions.Load() == 3
	})
	if got := asked.Load(); got != 1 {
		t.Errorf("the client sent %d requests, want 1", got)
	}
}

// The client reconnects when the proxy withdraws all addresses.
func TestAddressesAreTakenAway(t *testing.T) {
	take := make(chan struct{})
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		assignBoth(str)
		go keepSending(r.Context(), str,
			append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		<-take
		write(str, &capsule.AddressAssign{})
		<-r.Context().Done()
	})
	n := startClient(t, f, func(c *Config) { c.Request = prefixes() })
	n.awaitConnected(t)
	close(take)
	n.await(t, "without a session", func(s Status) bool {
		return s.State == StateReconnecting && strings.Contains(s.Reason, "assigned no address")
	})
}

// A tunnel without routes is connected, with a warning until it gets routes.
func TestRoutesAreTakenAway(t *testing.T) {
	steps := make(chan []string)
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		assignBoth(str)
		for routes := range steps {
			write(str, &capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes(routes...), 0)})
		}
		<-r.Context().Done()
	})
	n := startClient(t, f, func(c *Config) { c.Request = prefixes() })
	defer close(steps)
	n.awaitConnected(t)
	for _, step := range []struct {
		routes []string
		want   string
	}{
		{nil, "the proxy advertises no routes"},
		{[]string{"192.0.2.0/24"}, ""},
		{[]string{"127.0.0.0/8"}, "no route that the proxy advertises"},
	} {
		steps <- step.routes
		n.await(t, fmt.Sprintf("warned with %q", step.want), func(s Status) bool {
			warned := slices.ContainsFunc(s.Warnings, func(w string) bool {
				return strings.HasPrefix(w, "nothing goes through the tunnel: "+step.want)
			})
			return warned == (step.want != "") && s.State == StateConnected
		})
	}
}

// If no unprompted addresses arrive, the next session requests addresses again,
// or the error names the setting that prevents a request.
func TestNoUnpromptedAddresses(t *testing.T) {
	s := &session{c: &Client{skipRequest: true, cfg: Config{Request: prefixes("0.0.0.0/32")}}}
	var e *Error
	if err := s.notConfigured(); !errors.As(err, &e) || e.Kind != KindRefused || s.c.skipRequest {
		t.Errorf("got %v, and the next session skips the request: %t", e, s.c.skipRequest)
	}
	s = &session{c: &Client{}}
	if err := s.notConfigured(); !errors.As(err, &e) ||
		!strings.Contains(e.Error(), "remove addresses.request") {
		t.Errorf("got %v", e)
	}
}

// A session is connected, with a warning, if the proxy acknowledges the probes
// and answers none. The first packet removes the warning.
func TestProxyAnswersNoEcho(t *testing.T) {
	answer := make(chan struct{})
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		assignBoth(str)
		<-answer
		go keepSending(r.Context(), str,
			append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		_ = requested(capsule.NewReader(str, 1<<16))
	})
	n := startClient(t, f, func(c *Config) { c.Request = prefixes() })
	n.await(t, "waiting for an answer", func(s Status) bool {
		return strings.Contains(s.Reason, "waiting for the first answer")
	})
	n.await(t, "connected with a warning", func(s Status) bool {
		return s.State == StateConnected && s.Reason == "" && len(s.Warnings) == 1 &&
			strings.Contains(s.Warnings[0], "answers no echo")
	})
	since := n.Status().Since
	close(answer)
	n.await(t, "without the warning", func(s Status) bool { return len(s.Warnings) == 0 })
	if s := n.Status(); s.State != StateConnected || !s.Since.Equal(since) {
		t.Errorf("%s since %v, want connected since %v", s.State, s.Since, since)
	}
}

// Failure and Status have the reason of the last failure between two attempts.
func TestFailureAfterMalformedCapsule(t *testing.T) {
	f := scripted(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		// An ADDRESS_ASSIGN with host bits: 10.77.0.2/24.
		_, _ = str.Write([]byte{0x01, 0x07, 0x00, 0x04, 10, 77, 0, 2, 24})
		_ = requested(capsule.NewReader(str, 1<<16))
	})
	n := startClient(t, f, nil)
	n.await(t, "between two attempts", func(s Status) bool {
		return strings.Contains(s.Reason, "malformed")
	})
	if e := n.Failure(); e == nil || e.Kind != KindFailure {
		t.Errorf("got %v, want a failure", e)
	}
}
