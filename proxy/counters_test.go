package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	"masquevpn/internal/pki"
)

// awaitCounters waits until ok holds.
func awaitCounters(t *testing.T, s *Server, what string, ok func(*Counters) bool) *Counters {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c := s.Counters()
		if ok(c) {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s: %d sessions, requests %v, pool %v, refused %v", what,
				c.Sessions, c.Requests, c.Pool, c.AuthFailures)
		}
	}
}

// TestCounters checks the counters, also after their session has ended, and
// compares them with the status.
func TestCounters(t *testing.T) {
	s, device := hostile(t, nil)
	if c := s.Counters(); c.Sessions != 0 || c.MaxSessions != DefaultSessions ||
		!slices.Equal(c.Pool, []PoolUse{{"ipv4", 0, 253}}) {
		t.Errorf("at the start: %+v", c)
	}
	p := tunnel(t, s, device, nil)
	p.lives(t)
	if err := p.SendDatagram(ippacket.AppendEcho([]byte{0}, netip.MustParseAddr("192.0.2.9"),
		netip.MustParseAddr("192.0.2.1"), 64, true, 1, 1, nil)); err != nil {
		t.Fatal(err)
	}
	device.Inject(ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
		netip.MustParseAddr("10.77.0.99"), 64, false, 1, 1, nil))
	for _, path := range []string{"/other", "/.well-known/masque/ip/::1/*/"} {
		request(t, p.h3, "CONNECT", "connect-ip", path, nil)
	}
	awaitCounters(t, s.Server, "dropped and answered", func(c *Counters) bool {
		icmp := maps.Collect(c.Stats.ICMPSent.Each())
		return c.Stats.Receive.Drops()["source"] == 1 && c.Stats.Send.Drops()["no_session"] == 1 &&
			icmp["source_not_assigned"] == 1 && icmp["no_session"] == 1
	})
	c := awaitCounters(t, s.Server, "the lease", func(c *Counters) bool {
		return c.Sessions == 1 && c.Pool[0] == PoolUse{"ipv4", 1, 252}
	})
	want := []RequestCount{
		{200, "accepted", 1}, {400, "http_request_error", 1}, {401, "credentials", 0},
		{404, "not_served", 1},
		{429, "connection_limit_reached", 0}, {503, "connection_limit_reached", 0},
	}
	if !slices.Equal(c.Requests, want) {
		t.Errorf("requests %v, want %v", c.Requests, want)
	}
	if n := maps.Collect(c.Stats.Receive.EachCapsule())["address_request"]; n != 1 {
		t.Errorf("%d ADDRESS_REQUEST capsules, want 1", n)
	}
	before := c.Stats.Receive.Bytes.Load()
	if err := p.conn.CloseWithError(0, ""); err != nil {
		t.Fatal(err)
	}
	c = awaitCounters(t, s.Server, "the session has ended", func(c *Counters) bool {
		return c.Sessions == 0
	})
	if got := c.Stats.Receive.Bytes.Load(); got < before || before == 0 {
		t.Errorf("%d bytes after the end of the session, %d before", got, before)
	}
	if !slices.Equal(c.Pool, []PoolUse{{"ipv4", 0, 253}}) {
		t.Errorf("pool %v", c.Pool)
	}

	st := s.Status()
	drops := c.Stats.Receive.Drops()
	drops["too_big"] += 0 // always present
	for reason, n := range c.Stats.Send.Drops() {
		drops[reason] += n
	}
	byStatus := make(map[string]uint64)
	for _, r := range c.Requests {
		if r.Count > 0 {
			byStatus[strconv.Itoa(r.Status)] += r.Count
		}
	}
	if st.Sessions != 0 || st.Bytes.RX != c.Stats.Receive.Bytes.Load() ||
		st.Packets.TX != c.Stats.Send.Packets.Load() ||
		st.ICMPSent != c.Stats.ICMPSent.Total() || !maps.Equal(st.Drops, drops) ||
		!maps.Equal(st.Requests, byStatus) {
		t.Errorf("status %+v", st)
	}
}

// TestSumsNeverGetLess checks that the sums never decrease while sessions begin
// and end: a decrease would look like a restart.
func TestSumsNeverGetLess(t *testing.T) {
	l := newSessions()
	const writers, rounds = 16, 5000
	var added atomic.Uint64
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range rounds {
				ss := &ipSession{}
				ss.stats.Receive.Add(1)
				if _, err := l.add(ss, limits{max: writers, maxOfUser: writers}); err != nil {
					t.Error(err)
				}
				added.Add(1)
				l.remove(ss)
			}
		})
	}
	for now := uint64(0); now < writers*rounds && !t.Failed(); {
		least := added.Load()
		var sum connectip.Stats
		l.addTo(&sum)
		if now = sum.Receive.Packets.Load(); now < least {
			t.Errorf("%d packets of %d sessions", now, least)
		}
	}
	wg.Wait()
}

// TestAuthFailures checks that refused credentials are counted by method.
func TestAuthFailures(t *testing.T) {
	ca, pair, err := pki.NewAuthority("users", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	stranger, _, err := pki.NewAuthority("strangers", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	certificate := func(a *pki.Authority, name string) tls.Certificate {
		p, err := a.Client(name, time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c, err := tls.X509KeyPair(p.Cert, p.Key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	var out logtest.Buffer
	s := startServer(t, func(c *Config) {
		c.Methods, c.Users = []string{MethodMTLS, MethodToken}, byToken{"alice", "bob"}
		c.TLS.ClientCAs = x509.NewCertPool()
		c.TLS.ClientCAs.AppendCertsFromPEM(pair.Cert)
		c.Logger = slog.New(slog.NewTextHandler(&out, nil))
	})
	ask := func(token string, certificates ...tls.Certificate) {
		t.Helper()
		conf := &tls.Config{RootCAs: s.roots, ServerName: "localhost",
			NextProtos: []string{http3.NextProtoH3}}
		if len(certificates) > 0 {
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate,
				error) {
				return &certificates[0], nil
			}
		}
		conn, err := quic.DialAddr(t.Context(), s.Addrs()[0].String(), conf,
			&quic.Config{EnableDatagrams: true})
		if err != nil {
			return // the proxy may refuse before the handshake is complete here
		}
		defer conn.CloseWithError(0, "")
		h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
		header := http.Header{}
		if token != "" {
			header.Set("Authorization", "Bearer "+token)
		}
		req, err := http.NewRequestWithContext(t.Context(), "CONNECT",
			"https://localhost"+anyPath, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Proto, req.Header = "connect-ip", header
		select {
		case <-h3.ReceivedSettings():
		case <-conn.Context().Done():
			return
		}
		if str, err := h3.OpenRequestStream(t.Context()); err == nil &&
			str.SendRequestHeader(req) == nil {
			_, _ = str.ReadResponse()
		}
	}
	failed := func(mtls, token, missing uint64) {
		t.Helper()
		want := map[string]uint64{"mtls": mtls, "token": token, "missing": missing}
		c := awaitCounters(t, s.Server, "refused", func(c *Counters) bool {
			return maps.Equal(c.AuthFailures, want)
		})
		if !maps.Equal(s.Status().AuthFailures, c.AuthFailures) {
			t.Errorf("the status has %v", s.Status().AuthFailures)
		}
	}
	failed(0, 0, 0)
	ask("alice")
	ask("", certificate(ca, "alice"))
	failed(0, 0, 0)
	ask("guess")
	failed(0, 1, 0)
	ask("")
	failed(0, 1, 1)
	ask("", certificate(ca, "mallory"))
	failed(1, 1, 1)
	ask("alice", certificate(stranger, "alice"))
	failed(2, 1, 1)
	ask("bob", certificate(ca, "alice"))
	failed(2, 2, 1)
	awaitCounters(t, s.Server, "a line in the log", func(*Counters) bool {
		return strings.Contains(out.String(),
			`level=WARN msg="authentication failed" remote=127.0.0.1:`)
	})
}
