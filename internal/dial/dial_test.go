package dial

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/discovery"
	"masquevpn/internal/pki"
	"masquevpn/internal/pki/pkitest"
)

// serve runs an HTTP/3 server until the test ends. Its certificate depends on
// SNI; connect says whether it offers Extended CONNECT.
func serve(t *testing.T, config *tls.Config, connect bool) netip.AddrPort {
	t.Helper()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: udp}
	config.NextProtos = []string{http3.NextProtoH3}
	l, err := tr.Listen(config, &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	s := &http3.Server{EnableDatagrams: connect}
	t.Cleanup(func() { _, _, _ = s.Close(), tr.Close(), udp.Close() })
	go func() { _ = s.ServeListener(l) }()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// bySNI returns a configuration with the certificate of the name that the
// client asks for.
func bySNI(in pkitest.Installation, certs map[string]string) *tls.Config {
	return &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		name, ok := certs[hello.ServerName]
		if !ok {
			return nil, errors.New("no such name") // alert unrecognized_name
		}
		pair, err := in.Authority.Server(name, nil, time.Now())
		if err != nil {
			return nil, err
		}
		cert := pkitest.KeyPair(pair)
		return &cert, nil
	}}
}

// TestNames checks which certificates a server may have.
func TestNames(t *testing.T) {
	in := pkitest.New("unused.example")
	const n, target = "example.org", "p1.hoster.example"
	plain := discovery.Record{SNI: n, Verify: []string{n}}
	signed := discovery.Record{SNI: target, Verify: []string{n, target}, Signed: true}
	for _, tt := range []struct {
		name   string
		record discovery.Record
		certs  map[string]string // keyed by SNI
		want   string            // the name proved, "" for an identity that is not
	}{
		{"the name", plain, map[string]string{n: n}, n},
		{"the target, without a signature", plain, map[string]string{n: target}, ""},
		{"signed: the target", signed, map[string]string{target: target}, target},
		{"signed: the name", signed, map[string]string{target: n}, n},
		{"signed: the name, with its SNI", signed,
			map[string]string{n: n, target: "other.example"}, n},
		{"signed: the target, with the SNI of the name", signed,
			map[string]string{n: target, target: "other.example"}, ""},
		{"signed: neither", signed, map[string]string{n: "a.example", target: "b.example"}, ""},
		{"an address", discovery.Record{Verify: []string{"127.0.0.1"}},
			map[string]string{"": "127.0.0.1"},
			"127.0.0.1"},
		{"another address", discovery.Record{Verify: []string{"127.0.0.1"}},
			map[string]string{"": "127.0.0.2"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := serve(t, bySNI(in, tt.certs), true)
			tt.record.Port, tt.record.Addresses = addr.Port(), []netip.Addr{addr.Addr()}
			d := &Dialer{TLS: &tls.Config{RootCAs: in.Roots}, Logger: slog.New(slog.DiscardHandler)}
			c, err := d.Dial(t.Context(),
				[]discovery.Group{{Records: []discovery.Record{tt.record}}})
			switch {
			case err == nil:
				defer c.Close()
				if c.Name != tt.want {
					t.Errorf("the server proved %q, want %q", c.Name, tt.want)
				}
			case tt.want != "" || asError(err) == nil || asError(err).Failure != Identity:
				t.Errorf("got %v, want a server that proves %q", err, tt.want)
			}
		})
	}
}

// TestFailures checks what is said of servers that are none.
func TestFailures(t *testing.T) {
	in := pkitest.New("example.org")
	good := func() *tls.Config { return &tls.Config{Certificates: []tls.Certificate{in.Proxy}} }
	noH3 := good()
	noH3.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := good()
		c.NextProtos = []string{"other"}
		return c, nil
	}
	mutual := good()
	mutual.ClientAuth = tls.RequireAndVerifyClientCert
	for _, tt := range []struct {
		name string
		addr netip.AddrPort
		want Failure
	}{
		{"no HTTP Datagrams", serve(t, good(), false), NoMASQUE},
		{"another protocol", serve(t, noH3, true), Protocol},
		{"no client certificate", serve(t, mutual, true), Credentials},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := discovery.Record{Port: tt.addr.Port(), Addresses: []netip.Addr{tt.addr.Addr()},
				SNI:    "example.org",
				Verify: []string{"example.org"}}
			d := &Dialer{TLS: &tls.Config{RootCAs: in.Roots}, Logger: slog.New(slog.DiscardHandler)}
			_, err := d.Dial(t.Context(), []discovery.Group{{Records: []discovery.Record{r}}})
			if e := asError(err); e == nil || e.Failure != tt.want {
				t.Errorf("got %v, want failure %d", err, tt.want)
			}
		})
	}
}

// TestVerifyServer checks rows of the table of certificates.
func TestVerifyServer(t *testing.T) {
	in := pkitest.New("b.example")
	now := time.Now()
	for _, tt := range []struct {
		name, cert, verify string
		at                 time.Time
		ok                 bool
	}{
		{"the name", "b.example", "b.example", now, true},
		{"another name", "c.example", "b.example", now, false},
		{"a wildcard", "*.b.example", "b.example", now, false},
		{"expired", "b.example", "b.example", now.AddDate(100, 0, 0), false},
		{"not valid yet", "b.example", "b.example", now.AddDate(-1, 0, 0), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pair, err := in.Authority.Server(tt.cert, nil, now)
			if err != nil {
				t.Fatal(err)
			}
			chain, err := pki.ParseCertificates(pair.Cert)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := VerifyServer(chain, []string{tt.verify}, in.Roots,
				tt.at); (err == nil) != tt.ok {
				t.Errorf("got %v, want ok %v", err, tt.ok)
			}
		})
	}
}
