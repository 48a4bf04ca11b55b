package federation

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net/http"
	"testing"
	"time"

	"masquevpn/internal/discovery"
	"masquevpn/internal/pki"
	"masquevpn/internal/pki/pkitest"
)

// issue returns a chain for a name, by an authority at a time.
func issue(t *testing.T, a *pki.Authority, name string, at time.Time) []*x509.Certificate {
	t.Helper()
	pair, err := a.Server(name, nil, at)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// TestIdentify checks the states of a certificate, for the policy trusted.
func TestIdentify(t *testing.T) {
	in := pkitest.New("unused.example")
	other, _, err := pki.NewAuthority("another CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	file := &discovery.Result{WellKnown: "valid", FileUntil: now.Add(10 * time.Minute)}
	file.Delegated, _ = discovery.ParseName("gw.hoster.example:4433")
	record := func(signed bool) *discovery.Result {
		return &discovery.Result{WellKnown: "none", Until: now.Add(5 * time.Minute),
			Groups: []discovery.Group{{
				Records: []discovery.Record{{Target: "gw.hoster.example", Signed: signed}}}}}
	}
	noFile := &discovery.Result{WellKnown: "error: status 404"}
	pinned := issue(t, other, "anything.example", now)
	oldPinned := issue(t, in.Authority, "b.example", now.AddDate(-100, 0, 0))
	for _, tt := range []struct {
		name       string
		chain      []*x509.Certificate
		pin        *x509.Certificate // nil for none
		server     string            // the host that the owner named
		delegation [2]bool           // well-known, dnssec
		file, dns  *discovery.Result
		findErr    error
		want       Identity
		class      string // "" for an identity
		temporary  bool
		until      time.Duration // after now; 0: not compared
	}{
		{name: "names the domain", chain: issue(t, in.Authority, "b.example", now),
			want: Certificate},
		{name: "for clients", chain: clientChain(t, in, now), class: ClassNotDelegated},
		{name: "names the host of server", chain: issue(t, in.Authority, "gw.b.example", now),
			want: Certificate},
		{name: "the file names the server", chain: issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, false}, file: file, want: WellKnown, until: 10 * time.Minute},
		{name: "the file counts for nothing",
			chain: issue(t, in.Authority, "gw.hoster.example", now),
			class: ClassNotDelegated},
		{name: "a signed record", chain: issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, true}, file: noFile, dns: record(true), want: DNSSEC,
			until: 5 * time.Minute},
		{name: "a signed record counts for nothing",
			chain:      issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, false}, file: noFile, dns: record(true),
			class: ClassNotDelegated},
		{name: "a record without a signature",
			chain:      issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, true}, file: noFile, dns: record(false),
			class: ClassNotDelegated},
		{name: "unknown authority, pinned", chain: pinned, pin: pinned[0], want: Pin},
		{name: "unknown authority, no pin", chain: issue(t, other, "b.example", now),
			class: ClassBad},
		{name: "expired, pinned too", chain: oldPinned, pin: oldPinned[0], class: ClassExpired},
		{name: "not valid yet", chain: issue(t, in.Authority, "b.example", now.AddDate(1, 0, 0)),
			class: ClassExpired},
		{name: "another name", chain: issue(t, in.Authority, "c.example", now),
			delegation: [2]bool{true, true},
			file:       file, dns: record(true), class: ClassNotDelegated},
		{name: "a wildcard", chain: issue(t, in.Authority, "*.b.example", now),
			class: ClassNotDelegated},
		{name: "no certificate", class: ClassBad},
		{name: "the file could not be read",
			chain:      issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, false},
			file:       &discovery.Result{WellKnown: "cached error", FileUnknown: true},
			class:      ClassNotDelegated, temporary: true},
		{name: "DNS fails", chain: issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{false, true},
			findErr:    &discovery.Error{Code: discovery.DNSFailure}, class: ClassNotDelegated,
			temporary: true},
		{name: "the file names the server, which cannot be found",
			chain:      issue(t, in.Authority, "gw.hoster.example", now),
			delegation: [2]bool{true, false},
			findErr:    &discovery.Error{Code: discovery.NoAddresses, Delegated: file.Delegated},
			want:       WellKnown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			trust := Trust{Domain: "b.example", Server: tt.server, Roots: in.Roots,
				WellKnown: tt.delegation[0], DNSSEC: tt.delegation[1]}
			if tt.pin != nil {
				trust.Pins = [][sha256.Size]byte{Fingerprint(tt.pin)}
			}
			proof, err := trust.Identify(t.Context(), tt.chain, now,
				func(_ context.Context, m discovery.Method) (*discovery.Result, error) {
					if m == discovery.DNSOnly {
						return tt.dns, tt.findErr
					}
					return tt.file, tt.findErr
				})
			var refusal *Refusal
			if proof.Identity != tt.want || errors.As(err, &refusal) != (tt.class != "") ||
				refusal != nil && (refusal.Class != tt.class || refusal.Temporary != tt.temporary) {
				t.Errorf("got %v and %+v, want %v and the class %q", proof.Identity, err, tt.want,
					tt.class)
			}
			if tt.until != 0 && !proof.Until.Equal(now.Add(tt.until)) {
				t.Errorf("got a proof until %v, want %v", proof.Until, now.Add(tt.until))
			}
		})
	}
}

// clientChain returns a certificate of a user, whose name is a common name
// alone.
func clientChain(t *testing.T, in pkitest.Installation, at time.Time) []*x509.Certificate {
	t.Helper()
	pair, err := in.Authority.Client("b.example", at, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// TestPolicies checks which identities each policy accepts.
func TestPolicies(t *testing.T) {
	for i := None; i <= Certificate; i++ {
		t.Run(i.String(), func(t *testing.T) {
			if got, want := Trusted.Accepts(i), i >= DNSSEC; got != want {
				t.Errorf("trusted: got %v, want %v", got, want)
			}
			if got, want := Encrypted.Accepts(i), i != None; got != want {
				t.Errorf("encrypted: got %v, want %v", got, want)
			}
		})
	}
}

// TestParseFields checks the fields of a request for a pair.
func TestParseFields(t *testing.T) {
	for _, tt := range []struct {
		name     string
		from, to []string
		ok       bool
	}{
		{"a pair", []string{"A.example."}, []string{"b.example"}, true},
		{"no other end", []string{"a.example"}, nil, false},
		{"two", []string{"a.example", "a.example"}, []string{"b.example"}, false},
		{"a port", []string{"a.example:443"}, []string{"b.example"}, false},
		{"an address", []string{"192.0.2.1"}, []string{"b.example"}, false},
		{"empty", []string{""}, []string{"b.example"}, false},
		{"a list", []string{"a.example, c.example"}, []string{"b.example"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{FieldFrom: tt.from, FieldTo: tt.to}
			from, to, err := ParseFields(h)
			if (err == nil) != tt.ok || tt.ok && (from != "a.example" || to != "b.example") {
				t.Errorf("got %q, %q, %v", from, to, err)
			}
		})
	}
}

func FuzzParseFields(f *testing.F) {
	f.Add("a.example", "b.example")
	f.Add("A.example.", "[::1]")
	f.Fuzz(func(t *testing.T, a, b string) {
		from, to, err := ParseFields(http.Header{FieldFrom: {a}, FieldTo: {b}})
		if err != nil {
			return
		}
		for _, d := range []string{from, to} {
			if again, err := ParseDomain(d); err != nil || again != d {
				t.Errorf("%q is parsed as %q, %v", d, again, err)
			}
		}
	})
}
