package federation

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"masquevpn/internal/discovery"
)

var now = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// template returns a certificate that is valid now, for both uses.
func template(names ...string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	return &x509.Certificate{
		SerialNumber: serial, DNSNames: names,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t *testing.T, c, parent *x509.Certificate, key *ecdsa.PrivateKey,
	signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	c := template()
	c.Subject.CommonName = "authority"
	c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	c.ExtKeyUsage = nil
	key := newKey(t)
	return &authority{sign(t, c, c, key, key), key}
}

func (a *authority) issue(t *testing.T, c *x509.Certificate) []*x509.Certificate {
	t.Helper()
	return []*x509.Certificate{sign(t, c, a.cert, newKey(t), a.key)}
}

func selfSigned(t *testing.T, c *x509.Certificate) []*x509.Certificate {
	t.Helper()
	key := newKey(t)
	return []*x509.Certificate{sign(t, c, c, key, key)}
}

// world answers questions and requests, and counts them.
type world struct {
	srv       map[string]discovery.Answer // key: owner name
	dnsErr    error
	file      string // body of the delegation file; "" for status 404
	fetchErr  error
	questions []string
	fetches   int
}

func (w *world) Lookup(_ context.Context, name string, typ discovery.Type) (discovery.Answer,
	error) {
	w.questions = append(w.questions, typ.String()+" "+name)
	if typ == discovery.TypeSRV {
		return w.srv[name], w.dnsErr
	}
	return discovery.Answer{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.80")},
		TTL: time.Hour}, nil
}

func (w *world) fetch(context.Context, *url.URL, []netip.Addr) (*discovery.Response, error) {
	w.fetches++
	if w.fetchErr != nil {
		return nil, w.fetchErr
	}
	status := http.StatusOK
	if w.file == "" {
		status = http.StatusNotFound
	}
	return &discovery.Response{Status: status, Header: http.Header{},
		Body: io.NopCloser(bytes.NewReader([]byte(w.file)))}, nil
}

// syncWorld is a world whose methods may be called concurrently.
type syncWorld struct {
	*world
	turn chan struct{}
}

func (w syncWorld) Lookup(ctx context.Context, name string, t discovery.Type) (discovery.Answer,
	error) {
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	return w.world.Lookup(ctx, name, t)
}

func (w *world) verifier() *Verifier {
	return &Verifier{Resolver: &discovery.Resolver{
		DNS: syncWorld{w, make(chan struct{}, 1)}, Fetch: w.fetch,
		Hosts: func(string) []netip.Addr { return nil },
		Now:   func() time.Time { return now }, NoJitter: true,
		Rand: mathrand.New(mathrand.NewPCG(1, 2)),
	}}
}

// signedSRV returns the SRV records of b.example for peers with a target.
func signedSRV(target string, secure bool) map[string]discovery.Answer {
	return map[string]discovery.Answer{"_masque-fed._udp.b.example": {
		SRV: []discovery.SRV{{Port: 443, Target: target + "."}}, TTL: 10 * time.Minute,
		Secure: secure}}
}

// TestCertificateStates is the table of the states of a certificate that are
// good for the policy "trusted".
func TestCertificateStates(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	const domain, server = "b.example", "gw.hoster.example"
	use := func(c *x509.Certificate, uses ...x509.ExtKeyUsage) *x509.Certificate {
		c.ExtKeyUsage = uses
		return c
	}
	between := func(c *x509.Certificate, from, to time.Duration) *x509.Certificate {
		c.NotBefore, c.NotAfter = now.Add(from), now.Add(to)
		return c
	}
	commonName := template()
	commonName.Subject = pkix.Name{CommonName: domain}
	all := Peer{WellKnown: true, DNSSEC: true}
	file := world{file: `{"masque.peer": "gw.hoster.example"}`}
	for _, tc := range []struct {
		name   string
		chain  []*x509.Certificate
		peer   Peer
		world  world
		pinned bool
		want   Identity
		class  string
	}{
		{"for the domain", ca.issue(t, template(domain)), all, world{}, false, Certificate, ""},
		{"for the domain, serverAuth alone", ca.issue(t, use(template(domain),
			x509.ExtKeyUsageServerAuth)), all, world{}, false, Certificate, ""},
		{"for the domain, clientAuth alone", ca.issue(t, use(template(domain),
			x509.ExtKeyUsageClientAuth)), all, world{}, false, Certificate, ""},
		{"for the domain, neither", ca.issue(t, use(template(domain),
			x509.ExtKeyUsageCodeSigning)), all, world{}, false, None, ClassBad},
		{"for the domain, another authority", other.issue(t, template(domain)), all, world{}, false,
			None, ClassBad},
		{"for the server, named by the file", ca.issue(t, template(server)), all, file, false,
			WellKnown, ""},
		{"for the server, named by the file, not allowed", ca.issue(t, template(server)),
			Peer{DNSSEC: true}, file, false, None, ClassNotDelegated},
		{"for the server, the file names another", ca.issue(t, template(server)), all,
			world{file: `{"masque.server": "x.example"}`}, false, None, ClassNotDelegated},
		{"for the server, signed SRV", ca.issue(t, template(server)), all,
			world{srv: signedSRV(server, true)}, false, DNSSEC, ""},
		{"for the server, signed SRV, not allowed", ca.issue(t, template(server)),
			Peer{WellKnown: true}, world{srv: signedSRV(server, true)}, false, None,
			ClassNotDelegated},
		{"for the server, SRV without AD", ca.issue(t, template(server)), all,
			world{srv: signedSRV(server, false)}, false, None, ClassNotDelegated},
		{"self-signed, pinned", selfSigned(t, template("x.example")), all, world{}, true, Pin, ""},
		{"another authority, pinned", other.issue(t, template("x.example")), all, world{},
			true, Pin,
			""},
		{"self-signed", selfSigned(t, template(domain)), all, file, false, None, ClassBad},
		{"expired and pinned", ca.issue(t,
			between(template(domain), -2*time.Hour, -time.Hour)), all,
			world{}, true, None, ClassExpired},
		{"not valid yet and pinned", ca.issue(t, between(template(domain), time.Hour,
			2*time.Hour)), all, world{}, true, None, ClassExpired},
		{"for another name", ca.issue(t, template("x.example")), all, world{}, false, None,
			ClassNotDelegated},
		{"for another name, file of the domain", ca.issue(t, template("x.example")), all, file,
			false, None, ClassNotDelegated},
		{"common name", ca.issue(t, commonName), all, world{}, false, None, ClassNotDelegated},
		{"wildcard below the domain", ca.issue(t, template("*."+domain)), all, world{}, false, None,
			ClassNotDelegated},
		{"none", nil, all, file, false, None, ClassMissing},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peer := tc.peer
			peer.Domain, peer.Roots = domain, x509.NewCertPool()
			peer.Roots.AddCert(ca.cert)
			if tc.pinned {
				peer.Pins = [][sha256.Size]byte{PinOf(tc.chain[0])}
			}
			proof, failure := tc.world.verifier().Identify(t.Context(), &peer, tc.chain)
			if proof.Identity != tc.want {
				t.Fatalf("got %v (%v), want %v", proof.Identity, failure, tc.want)
			}
			if tc.want == None && failure.Class != tc.class {
				t.Errorf("got class %s (%v), want %s", failure.Class, failure, tc.class)
			}
			if Trusted.Accepts(proof.Identity) != (tc.want != None) {
				t.Errorf("policy trusted accepts %v: %v", proof.Identity, tc.want == None)
			}
			if tc.want != None && !proof.Until.After(now) {
				t.Errorf("the identity ends at %v", proof.Until)
			}
		})
	}
}

// TestDirectAsksNothing checks that what a certificate proves by itself, or
// cannot prove, is decided without a question.
func TestDirectAsksNothing(t *testing.T) {
	ca := newAuthority(t)
	for _, tc := range []struct {
		name  string
		chain []*x509.Certificate
	}{
		{"for the domain", ca.issue(t, template("b.example"))},
		{"self-signed", selfSigned(t, template("b.example"))},
		{"none", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := &world{file: `{"masque.server": "x.example"}`}
			peer := &Peer{Domain: "b.example", WellKnown: true, DNSSEC: true,
				Roots: x509.NewCertPool()}
			peer.Roots.AddCert(ca.cert)
			_, _ = w.verifier().Identify(t.Context(), peer, tc.chain)
			if len(w.questions) != 0 || w.fetches != 0 {
				t.Errorf("questions %q, %d fetches", w.questions, w.fetches)
			}
		})
	}
}

// TestServerProvesDomain checks that a certificate for the host of the peer's
// configured server counts as one for the domain.
func TestServerProvesDomain(t *testing.T) {
	ca := newAuthority(t)
	byAddress := template()
	byAddress.IPAddresses = []net.IP{net.ParseIP("2001:db8::1")}
	for _, tc := range []struct {
		server string
		cert   *x509.Certificate
	}{
		{"gw.b.example:4433", template("gw.b.example")},
		{"[2001:db8::1]", byAddress},
	} {
		t.Run(tc.server, func(t *testing.T) {
			server, err := discovery.ParseName(tc.server)
			if err != nil {
				t.Fatal(err)
			}
			peer := &Peer{Domain: "b.example", Server: server, Roots: x509.NewCertPool()}
			peer.Roots.AddCert(ca.cert)
			proof, failure := peer.Direct(ca.issue(t, tc.cert), now)
			if proof.Identity != Certificate {
				t.Errorf("got %v (%v), want a certificate", proof.Identity, failure)
			}
		})
	}
}

// TestTemporaryFailures checks that a domain whose owner cannot be asked is
// told apart from one whose owner names another server.
func TestTemporaryFailures(t *testing.T) {
	ca := newAuthority(t)
	chain := ca.issue(t, template("gw.hoster.example"))
	for _, tc := range []struct {
		name  string
		world world
		want  bool
	}{
		{"no file, no records", world{}, false},
		{"the web server is down", world{fetchErr: errors.New("unreachable")}, true},
		{"DNS is down", world{dnsErr: errors.New("SERVFAIL")}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peer := &Peer{Domain: "b.example", WellKnown: true, DNSSEC: true,
				Roots: x509.NewCertPool()}
			peer.Roots.AddCert(ca.cert)
			v := tc.world.verifier()
			for range 2 { // the second answer is from the cache
				_, failure := v.Identify(t.Context(), peer, chain)
				if failure == nil || failure.Temporary != tc.want {
					t.Errorf("got %+v, want temporary %v", failure, tc.want)
				}
			}
		})
	}
}

// TestForClientsIsNoLastResort checks that the records for clients count only
// if there are none for peers.
func TestForClientsIsNoLastResort(t *testing.T) {
	ca := newAuthority(t)
	chain := ca.issue(t, template("gw.hoster.example"))
	client := discovery.Answer{Secure: true, TTL: time.Minute,
		SRV: []discovery.SRV{{Port: 443, Target: "gw.hoster.example."}}}
	for _, tc := range []struct {
		name string
		fed  discovery.Answer
		want Identity
	}{
		{"none for peers", discovery.Answer{}, DNSSEC},
		{"not offered to peers", discovery.Answer{Secure: true,
			SRV: []discovery.SRV{{Target: "."}}},
			None},
		{"another for peers", discovery.Answer{Secure: true, SRV: []discovery.SRV{{Port: 443,
			Target: "x.example."}}}, None},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := &world{srv: map[string]discovery.Answer{"_masque._udp.b.example": client,
				"_masque-fed._udp.b.example": tc.fed}}
			peer := &Peer{Domain: "b.example", DNSSEC: true, Roots: x509.NewCertPool()}
			peer.Roots.AddCert(ca.cert)
			proof, failure := w.verifier().Identify(t.Context(), peer, chain)
			if proof.Identity != tc.want {
				t.Errorf("got %v (%v), want %v", proof.Identity, failure, tc.want)
			}
			if tc.want == DNSSEC && proof.Until != now.Add(time.Minute) {
				t.Errorf("looked at again at %v, want at the end of the records", proof.Until)
			}
		})
	}
}

// TestByResult checks the identity of a server that discovery found.
func TestByResult(t *testing.T) {
	ca := newAuthority(t)
	name := func(s string) discovery.Name {
		n, err := discovery.ParseName(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	delegated := &discovery.Result{Step: "well-known/port", Delegated: name("gw.example:4433"),
		FileUntil: now.Add(10 * time.Minute)}
	signed := &discovery.Result{Step: "srv", Until: now.Add(5 * time.Minute)}
	for _, tc := range []struct {
		name   string
		cert   string
		peer   Peer
		result *discovery.Result
		record discovery.Record
		want   Identity
		until  time.Duration
	}{
		{"for the domain", "b.example", Peer{}, &discovery.Result{Step: "srv"}, discovery.Record{},
			Certificate, 30 * 24 * time.Hour},
		{"below the file", "gw.example", Peer{WellKnown: true}, delegated, discovery.Record{},
			WellKnown, 10 * time.Minute},
		{"below the file, not allowed", "gw.example", Peer{}, delegated, discovery.Record{},
			None, 0},
		{"below the file, not allowed, for the domain", "b.example", Peer{}, delegated,
			discovery.Record{}, Certificate, 30 * 24 * time.Hour},
		{"signed record", "p1.example", Peer{DNSSEC: true}, signed, discovery.Record{
			Target: "p1.example", Signed: true}, DNSSEC, 5 * time.Minute},
		{"signed record, not allowed", "p1.example", Peer{WellKnown: true}, signed,
			discovery.Record{Target: "p1.example", Signed: true}, None, 0},
		{"record that is not signed", "p1.example", Peer{DNSSEC: true}, signed,
			discovery.Record{Target: "p1.example"}, None, 0},
		{"signed record below a file that is not allowed", "p1.example", Peer{DNSSEC: true},
			delegated, discovery.Record{Target: "p1.example", Signed: true}, None, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peer := tc.peer
			peer.Domain, peer.Roots = "b.example", x509.NewCertPool()
			peer.Roots.AddCert(ca.cert)
			proof, failure := peer.ByResult(ca.issue(t, template(tc.cert)), tc.result,
				&tc.record, now)
			if proof.Identity != tc.want || tc.want != None && proof.Until != now.Add(tc.until) {
				t.Errorf("got %+v (%v), want %v for %v", proof, failure, tc.want, tc.until)
			}
		})
	}
}

func TestPolicies(t *testing.T) {
	for _, i := range []Identity{None, DNSSEC, WellKnown, Pin, Certificate} {
		t.Run(i.String(), func(t *testing.T) {
			for _, p := range []Policy{Trusted, Encrypted} {
				if got, want := p.Accepts(i), i != None; got != want {
					t.Errorf("%v: got %v, want %v", p, got, want)
				}
			}
		})
	}
}
