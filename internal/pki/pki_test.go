package pki

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

func authority(t *testing.T) (*Authority, Pair) {
	t.Helper()
	a, pair, err := NewAuthority("test CA", now)
	if err != nil {
		t.Fatal(err)
	}
	return a, pair
}

func pool(t *testing.T, pair Pair) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(pair.Cert) {
		t.Fatal("no certificate in the authority's pair")
	}
	return p
}

func certificate(t *testing.T, pair Pair) tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// handshake runs a TLS 1.3 handshake over loopback.
func handshake(t *testing.T, server, client *tls.Config) (user string, serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		s := tls.Server(conn, server)
		if err = s.Handshake(); err == nil {
			_, err = s.Write([]byte("x"))
			if certs := s.ConnectionState().PeerCertificates; len(certs) > 0 {
				user = certs[0].Subject.CommonName
			}
		}
		conn.Close()
		done <- err
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(conn, client)
	if clientErr = c.Handshake(); clientErr == nil {
		// The server verifies the client after the client's own handshake.
		_, clientErr = c.Read(make([]byte, 1))
	}
	conn.Close()
	serverErr = <-done
	return user, serverErr, clientErr
}

func TestHandshake(t *testing.T) {
	ca, caPair := authority(t)
	other, otherPair := authority(t)
	issue := func(a *Authority, host string) tls.Certificate {
		pair, err := a.Server(host, nil, now)
		if err != nil {
			t.Fatal(err)
		}
		return certificate(t, pair)
	}
	user := func(a *Authority) tls.Certificate {
		pair, err := a.Client("alice", now, ClientValidity)
		if err != nil {
			t.Fatal(err)
		}
		return certificate(t, pair)
	}
	asServer, err := ca.Server("alice", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	at := func(t time.Time) func() time.Time { return func() time.Time { return t } }
	for _, test := range []struct {
		name           string
		server, client tls.Certificate
		dial           string
		roots          Pair
		time           time.Time
		serverWants    string // part of the error, empty: none
		clientWants    string
	}{
		{"right", issue(ca, "vpn.example.org"), user(ca), "vpn.example.org", caPair, now, "", ""},
		{"right, IPv4", issue(ca, "192.0.2.1"), user(ca), "192.0.2.1", caPair, now, "", ""},
		{"right, IPv6", issue(ca, "2001:db8::1"), user(ca), "2001:db8::1", caPair, now, "", ""},
		{"a clock behind", issue(ca, "a.example"), user(ca), "a.example", caPair,
			now.Add(-30 * time.Minute), "", ""},
		{"another name", issue(ca, "vpn.example.org"), user(ca), "other.example.org", caPair, now,
			"bad certificate", "not other.example.org"},
		{"another authority", issue(other, "a.example"), user(ca), "a.example", caPair, now,
			"bad certificate", "unknown authority"},
		{"a client of another authority", issue(ca, "a.example"), user(other), "a.example", caPair,
			now, "unknown authority", "unknown certificate authority"},
		{"a server as client", issue(ca, "a.example"), certificate(t, asServer), "a.example",
			caPair, now, "incompatible key usage", "bad certificate"},
		{"a client as server", user(ca), user(ca), "alice", caPair, now, "bad certificate",
			"legacy Common Name"},
		{"expired", issue(ca, "a.example"), user(ca), "a.example", caPair,
			now.Add(ServerValidity + time.Hour), "bad certificate", "expired"},
		{"a client expired", issue(ca, "a.example"), user(ca), "a.example", caPair,
			now.Add(ClientValidity + time.Hour), "expired", "expired"},
		{"the wrong roots", issue(ca, "a.example"), user(ca), "a.example", otherPair, now,
			"bad certificate", "unknown authority"},
	} {
		t.Run(test.name, func(t *testing.T) {
			name, serverErr, clientErr := handshake(t,
				&tls.Config{Certificates: []tls.Certificate{test.server},
					ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool(t, caPair),
					Time: at(test.time)},
				&tls.Config{Certificates: []tls.Certificate{test.client},
					RootCAs: pool(t, test.roots), ServerName: test.dial, Time: at(test.time)})
			for _, side := range []struct {
				name string
				err  error
				want string
			}{{"server", serverErr, test.serverWants}, {"client", clientErr, test.clientWants}} {
				if (side.err == nil) != (side.want == "") ||
					side.err != nil && !strings.Contains(side.err.Error(), side.want) {
					t.Errorf("%s: %v, want %q", side.name, side.err, side.want)
				}
			}
			if test.serverWants == "" && name != "alice" {
				t.Errorf("user name %q", name)
			}
		})
	}
}

func TestRenewalKeepsKey(t *testing.T) {
	ca, _ := authority(t)
	first, err := ca.Server("a.example", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ParseKey(first.Key)
	if err != nil {
		t.Fatal(err)
	}
	second, err := ca.Server("a.example", key, now.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if string(first.Key) != string(second.Key) || string(first.Cert) == string(second.Cert) {
		t.Error("a renewal has another key, or the same certificate")
	}
	a, errA := ResetKey(key)
	b, errB := ResetKey(certificate(t, second).PrivateKey.(*ecdsa.PrivateKey))
	if errA != nil || errB != nil || *a != *b {
		t.Error("the reset key changed with the certificate", errA, errB)
	}
	otherPair, err := ca.Server("a.example", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ResetKey(certificate(t, otherPair).PrivateKey.(*ecdsa.PrivateKey))
	if err != nil || *other == *a {
		t.Error("two private keys have one reset key", err)
	}
}

func TestValidityEndsWithAuthority(t *testing.T) {
	ca, _ := authority(t)
	pair, err := ca.Client("alice", now, 2*AuthorityValidity)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := ParseCertificates(pair.Cert)
	if err != nil || !certs[0].NotAfter.Equal(now.Add(AuthorityValidity)) {
		t.Errorf("the certificate ends %v, %v", certs[0].NotAfter, err)
	}
	if _, err := ca.Client("alice", now.Add(AuthorityValidity+time.Hour),
		ClientValidity); err == nil {
		t.Error("an expired authority issues certificates")
	}
}

func TestParseAuthority(t *testing.T) {
	ca, pair := authority(t)
	_, other := authority(t)
	leaf, err := ca.Server("a.example", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseAuthority(pair); err != nil {
		t.Error(err)
	}
	for want, p := range map[string]Pair{
		"does not belong to the certificate": {Cert: pair.Cert, Key: other.Key},
		"does not belong to an authority":    leaf,
		"key: holds no private key":          {Cert: pair.Cert, Key: pair.Cert[:10]},
		"certificate: holds a PRIVATE":       {Cert: pair.Key, Key: pair.Key},
		"certificate: holds no cert":         {},
	} {
		t.Run(want, func(t *testing.T) {
			if _, err := ParseAuthority(p); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
}

func TestParseKeyForms(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	ecDER, ecErr := x509.MarshalECPrivateKey(ec)
	edDER, edErr := x509.MarshalPKCS8PrivateKey(ed)
	sec1 := encode("EC PRIVATE KEY", ecDER, ecErr)
	for name, data := range map[string][]byte{
		"EC":                  sec1,
		"EC after parameters": append(encode("EC PARAMETERS", []byte{1}, nil), sec1...),
		"RSA":                 encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey), nil),
		"Ed25519":             encode("PRIVATE KEY", edDER, edErr),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseKey(data); err != nil {
				t.Error(err)
			}
		})
	}
	for name, data := range map[string][]byte{
		"nothing":   nil,
		"encrypted": encode("ENCRYPTED PRIVATE KEY", []byte{1}, nil),
		"garbage":   encode("PRIVATE KEY", []byte{1}, nil),
		"no signer": encode("EC PARAMETERS", []byte{1}, nil),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseKey(data); err == nil {
				t.Error("ParseKey succeeded")
			}
		})
	}
}

func TestTokens(t *testing.T) {
	a, b := NewToken(), NewToken()
	if a == b || len(a) != 43 || strings.ContainsAny(a, "+/= ") {
		t.Errorf("tokens %q, %q", a, b)
	}
	if HashToken(a) == HashToken(b) {
		t.Error("hashes of tokens do not tell them apart")
	}
}
