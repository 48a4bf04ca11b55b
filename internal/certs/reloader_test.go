package certs

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
)

// anyFile locates all keys in one file.
type anyFile struct{}

func (anyFile) Locate(err error) error {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		return err
	}
	located := *e
	located.File = "f.toml"
	return &located
}

var now = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

// A renewed key pair is used when both of its files are there. One that cannot
// be used is logged once.
func TestReloader(t *testing.T) {
	authority, _, err := pki.NewAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issue := func() pki.Pair {
		pair, err := authority.Server("a.example", nil, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key")
	put := func(path string, data []byte) {
		if err := files.Replace(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, second := issue(), issue()
	put(certFile, first.Cert)
	put(keyFile, first.Key)
	pair, err := ReadKeyPair(anyFile{}, certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	w := NewReloader(pair, slog.New(slog.NewTextHandler(&log, nil)))
	serves := func(want pki.Pair) {
		t.Helper()
		certs, err := pki.ParseCertificates(want.Cert)
		if err != nil {
			t.Fatal(err)
		}
		if p := w.Pair(); !p.Leaf.Equal(certs[0]) || !p.Chain[0].Equal(certs[0]) {
			t.Errorf("serves another certificate\n%s", &log)
		}
	}
	look := func() {
		for range 4 {
			w.Check()
		}
	}
	look()
	serves(first)

	// Only one file of the pair is new.
	put(certFile, second.Cert)
	w.Check() // the other file may follow
	if log.Len() > 0 {
		t.Errorf("judges files that were just changed:\n%s", &log)
	}
	look()
	serves(first)
	if n := strings.Count(log.String(),
		"not the key of the certificate; put certificate and key of one pair together"); n != 1 {
		t.Errorf("logged the error %d times:\n%s", n, &log)
	}
	put(keyFile, second.Key)
	look()
	serves(second)

	// Without the wait.
	third := issue()
	put(keyFile, third.Key)
	put(certFile, third.Cert)
	w.Current()
	serves(third)

	if err := os.Remove(keyFile); err != nil {
		t.Fatal(err)
	}
	look()
	serves(third)
	if n := strings.Count(log.String(), "cannot be used"); n != 2 {
		t.Errorf("logged %d times that files cannot be used:\n%s", n, &log)
	}

	put(keyFile, first.Key)
	put(certFile, first.Cert)
	if pair, err = ReadKeyPair(anyFile{}, certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	w.Set(pair)
	serves(first)
}

func TestExpiryWarning(t *testing.T) {
	for _, test := range []struct{ life, left time.Duration }{{2 * 365, 30}, {90, 22}, {6, 1}} {
		t.Run(fmt.Sprintf("%d days", test.life), func(t *testing.T) {
			leaf := &x509.Certificate{NotBefore: now, NotAfter: now.Add(test.life * 24 * time.Hour)}
			end := leaf.NotAfter.Add(-test.left * 24 * time.Hour)
			if ExpiresSoon(leaf, end.Add(-24*time.Hour)) || !ExpiresSoon(leaf, end.Add(time.Hour)) {
				t.Errorf("of %d days, it does not end soon in the last %d", test.life, test.left)
			}
		})
	}
	var log bytes.Buffer
	w := ExpiryWarning{Name: "a.crt", Renewal: "renew it",
		Logger: slog.New(slog.NewTextHandler(&log, nil))}
	leaf := &x509.Certificate{NotBefore: now, NotAfter: now.Add(100 * 24 * time.Hour)}
	says := func(at time.Duration, want string) {
		t.Helper()
		log.Reset()
		w.Check(leaf, now.Add(at))
		if got := log.String(); (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("after %v: got %q, want %q", at, got, want)
		}
	}
	const day = 24 * time.Hour
	says(0, "")
	says(80*day, `msg="the certificate ends soon" certificate=a.crt`)
	says(80*day+time.Hour, "")
	says(81*day, `remedy="renew it"`)
	says(101*day, "the certificate has ended")
	leaf.NotAfter = now.Add(400 * day)
	says(102*day, "")
}
