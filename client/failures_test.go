package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/pki"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
)

// The table, docs/failures.md and the client agree, and the table follows the
// two rules of its comment.
func TestFailureTable(t *testing.T) {
	sources := map[source]string{byHost: "this host", byAnyone: "anybody on the path",
		byProxy: "the proxy"}
	word := map[bool]string{true: "ends", false: "goes on"}
	doc, err := os.ReadFile("../docs/failures.md")
	if err != nil {
		t.Fatal(err)
	}
	for c := range numCauses {
		f := failures[c]
		t.Run(cmp.Or(f.name, fmt.Sprintf("cause %d", c)), func(t *testing.T) {
			endsByHand, endsService, endsLater := f.final >= byHand,
				f.final >= beforeSession, f.final >= always
			if f.source == byAnyone && (endsService || endsLater) {
				t.Error("anybody can end a service, or a client that has had a session")
			}
			if endsLater && f.source != byProxy {
				t.Error("after a session, the client ends although the proxy is not the source")
			}
			for name, mode := range map[string]struct{ service, ran, want bool }{
				"by hand":        {false, false, endsByHand},
				"by hand, later": {false, true, endsLater},
				"service":        {true, false, endsService},
				"service, later": {true, true, endsLater},
			} {
				if got := ends(t, c, mode.service, mode.ran); got != mode.want {
					t.Errorf("%s: it %s, want that it %s", name, word[got], word[mode.want])
				}
			}
			row := fmt.Sprintf("| %s | %s | %d | %s | %s | %s |\n", f.name, sources[f.source],
				f.kind, word[endsByHand], word[endsService], word[endsLater])
			if !strings.Contains(string(doc), row) {
				t.Errorf("docs/failures.md lacks the row\n%s", row)
			}
		})
	}
	if got := strings.Count(string(doc), " | ends |") +
		strings.Count(string(doc), " | goes on |"); got < int(numCauses) {
		t.Errorf("docs/failures.md has %d rows, want %d", got, numCauses)
	}
}

// ends reports whether a client ends if all its attempts fail with c.
func ends(t *testing.T, c cause, service, ran bool) (ended bool) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		r := retry{
			enabled: true, service: service, maxDelay: DefaultMaxDelay,
			logger:      slog.New(slog.DiscardHandler),
			everApplied: func() bool { return ran }, beforeWait: func(bool, *Error) {},
		}
		err := r.run(ctx, func(context.Context) (time.Duration, error) {
			return 0, fail(c, nil, "it fails", "")
		})
		ended = err != nil
	})
	return ended
}

// The log has a repeated failure as a warning once.
func TestSameReasonIsOneWarning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var out strings.Builder
		r := retry{enabled: true, maxDelay: DefaultMaxDelay,
			logger: slog.New(slog.NewTextHandler(&out, nil)), beforeWait: func(bool, *Error) {}}
		attempts := 0
		_ = r.run(ctx, func(context.Context) (time.Duration, error) {
			attempts++
			return 0, fail(causeSilence, nil, "silence", "")
		})
		if n := strings.Count(out.String(), "level=WARN"); n != 1 || attempts < 10 {
			t.Errorf("%d warnings in %d attempts", n, attempts)
		}
	})
}

// Each reaction of a peer leads to the expected cause.
func TestCauses(t *testing.T) {
	in := newInstallation()
	other, _, err := pki.NewAuthority("another CA", time.Now())
	must(err)
	now := time.Now()
	pair := func(a *pki.Authority, name string, at time.Time) tls.Certificate {
		p, err := a.Server(name, nil, at)
		must(err)
		return pkitest.KeyPair(p)
	}
	status := func(code int) func(*testing.T) *testProxy {
		return func(t *testing.T) *testProxy {
			return scripted(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
		}
	}
	with := func(c tls.Certificate, protocol string, extended bool) func(*testing.T) *testProxy {
		return func(t *testing.T) *testProxy {
			return serve(t, "127.0.0.1:0", c, protocol, extended, nil)
		}
	}
	const long = 100 * 365 * 24 * time.Hour
	unsynchronised := func(c *Client) {
		c.dialer.target.clock.synchronised = func() bool { return false }
	}
	for name, tc := range map[string]struct {
		peer   func(*testing.T) *testProxy
		want   cause
		change func(*Client) // may be nil
	}{
		"another authority": {with(pair(other, proxyName, now), http3.NextProtoH3, true),
			causeIdentity, nil},
		"another authority, too soon": {with(pair(other, proxyName, now.Add(48*time.Hour)),
			http3.NextProtoH3, true), causeIdentity, nil},
		"another name": {with(pair(in.Authority, "other.example", now),
			http3.NextProtoH3, true), causeIdentity, nil},
		"expired": {with(pair(in.Authority, proxyName, now.Add(-long)),
			http3.NextProtoH3, true), causeExpired, nil},
		"expired by a wrong clock": {with(pair(in.Authority, proxyName, now.Add(-long)),
			http3.NextProtoH3, true), causeClock, unsynchronised},
		"not valid yet": {with(pair(in.Authority, proxyName, now.Add(48*time.Hour)),
			http3.NextProtoH3, true), causeClock, nil},
		"another protocol": {with(in.Proxy, "h2", true), causeProtocol, nil},
		"no Extended CONNECT": {with(in.Proxy, http3.NextProtoH3, false),
			causeNoProxy, nil},
		"forged: no protocol": {forging(closing(0x100 + 120 /* no_application_protocol */)),
			causeProtocol, nil},
		"forged: bad certificate": {forging(closing(0x100 + 42 /* bad_certificate */)),
			causeEarlyRefusal, nil},
		"forged: certificate missing": {forging(closing(0x100 + 116 /* certificate_required */)),
			causeEarlyRefusal, nil},
		"forged: refused": {forging(closing(uint64(quic.ConnectionRefused))),
			causeHandshake, nil},
		"forged: no version": {forging(noVersion), causeHandshake, nil},
		"301":                {status(301), causeAnswer, nil},
		"401":                {status(401), causeCredentials, nil},
		"403":                {status(403), causeForbidden, nil},
		"404":                {status(404), causeAnswer, nil},
		"407":                {status(407), causeCredentials, nil},
		"429":                {status(429), causeBusy, nil},
		"500":                {status(500), causeBusy, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := tc.peer(t)
			c, err := New(Config{Name: "test", Proxy: f.addr, Token: "secret",
				TLS: &tls.Config{RootCAs: in.Roots, ServerName: proxyName, Time: time.Now}})
			if err != nil {
				t.Fatal(err)
			}
			c.dialer.setControl(nil, c.cfg.resolverConfig())
			if tc.change != nil {
				tc.change(c)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, _, err = c.dial(ctx)
			var e *Error
			if !errors.As(err, &e) || attemptOf(e).cause != tc.want ||
				e.Kind != failures[tc.want].kind {
				t.Errorf("got %v (%+v), want the failure %q", err, e, failures[tc.want].name)
			}
		})
	}
}

// serve starts an HTTP/3 server at address with the certificate c. protocol is
// its ALPN protocol, and extended enables HTTP Datagrams.
func serve(t *testing.T, address string, c tls.Certificate, protocol string, extended bool,
	handler http.HandlerFunc) *testProxy {
	t.Helper()
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	config := &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350}
	l, err := quic.Listen(socket, &tls.Config{Certificates: []tls.Certificate{c},
		NextProtos: []string{protocol}}, config)
	if err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{EnableDatagrams: extended, Handler: handler}
	served := make(chan struct{})
	go func() {
		_ = server.ServeListener(l)
		close(served)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		_ = l.Close()
		_ = socket.Close()
		<-served
	})
	return &testProxy{addr: socket.LocalAddr().String()}
}

// A peer that answers in the proxy's place ends neither a client that has had a
// session nor a service. Routes and kill switch stay, the status shows the
// address of the peer, and the client reconnects when the proxy is back.
func TestImpostor(t *testing.T) {
	other, _, err := pki.NewAuthority("another CA", time.Now())
	must(err)
	p, err := other.Server(proxyName, nil, time.Now())
	must(err)
	certificate := pkitest.KeyPair(p)
	for name, tc := range map[string]struct {
		impostor func(t *testing.T, address string) *testProxy
		want     string // beginning of the reason
	}{
		"another certificate": {
			func(t *testing.T, address string) *testProxy {
				return serve(t, address, certificate, http3.NextProtoH3, true, nil)
			},
			"somebody other than the proxy answers at ",
		},
		"a forged alert": {
			func(t *testing.T, address string) *testProxy {
				return forge(t, address,
					closing(0x100+120 /* no_application_protocol */))
			},
			"somebody who has not proved to be the proxy refuses the connection at ",
		},
	} {
		t.Run(name+" after a session", func(t *testing.T) {
			meetImpostor(t, tc.impostor, tc.want, false)
		})
		t.Run(name+" at the start of a service", func(t *testing.T) {
			meetImpostor(t, tc.impostor, tc.want, true)
		})
	}
}

func meetImpostor(t *testing.T, impostor func(*testing.T, string) *testProxy, want string,
	service bool) {
	address := freeAddress(t)
	proxied := func(t *testing.T) *testProxy {
		return startProxy(t, func(c *proxy.Config) { c.Listen = []string{address} })
	}
	var n *testClient
	start := func(f *testProxy) { // the client ends with t, after all peers
		n = startClient(t, f, func(c *Config) { c.KillSwitch, c.Service = &killSwitch{}, service })
	}
	if !service {
		t.Run("before", func(t *testing.T) {
			start(proxied(t))
			n.awaitConnected(t)
		})
	}
	t.Run("meanwhile", func(t *testing.T) {
		f := impostor(t, address)
		if n == nil {
			start(f)
		}
		refused := func(s Status) bool {
			return strings.HasPrefix(s.Reason, want+address) && len(s.Warnings) == 1 &&
				strings.HasPrefix(s.Warnings[0], want)
		}
		n.await(t, "refused", refused)
		<-n.Changed() // the next attempt changes the state
		n.await(t, "refused again", refused)
		if n.network.Closed() || n.Status().KillSwitch != KillSwitchClosed {
			t.Error("the host was restored")
		}
	})
	t.Run("afterwards", func(t *testing.T) {
		proxied(t)
		n.await(t, "connected again", func(s Status) bool {
			return s.State == StateConnected && len(s.Warnings) == 0
		})
	})
}

// freeAddress returns a UDP address of this host that is not in use.
func freeAddress(t *testing.T) string {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	return socket.LocalAddr().String()
}
