package cli

import (
	"bytes"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/internal/config"
	"masquevpn/internal/pki"
)

// anyKeys makes problems without places.
type anyKeys struct{}

func (anyKeys) Problem(key, reason, remedy string) *config.Error {
	return &config.Error{Problems: []config.Problem{{File: "f.toml", Key: key, Reason: reason,
		Remedy: remedy}}}
}

// TestPairWatch: what is renewed on disk is used when both files are there, and
// what cannot be used is said once.
func TestPairWatch(t *testing.T) {
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
		if err := WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, second := issue(), issue()
	put(certFile, first.Cert)
	put(keyFile, first.Key)
	pair, err := ReadPair(anyKeys{}, certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	w := WatchPair(pair, slog.New(slog.NewTextHandler(&log, nil)))
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
			w.Look()
		}
	}
	look()
	serves(first)

	// Half of the pair.
	put(certFile, second.Cert)
	w.Look() // it may be half way through
	if log.Len() > 0 {
		t.Errorf("judges files that were just changed:\n%s", &log)
	}
	look()
	serves(first)
	if n := strings.Count(log.String(),
		"not the key of the certificate; put certificate and key of one pair together"); n != 1 {
		t.Errorf("says %d times what is wrong:\n%s", n, &log)
	}
	put(keyFile, second.Key)
	look()
	serves(second)

	// Without the wait, as for a handshake.
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
		t.Errorf("says %d times that files cannot be used:\n%s", n, &log)
	}

	put(keyFile, first.Key)
	put(certFile, first.Cert)
	if pair, err = ReadPair(anyKeys{}, certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	w.Set(pair)
	serves(first)
}

func TestExpiryWarning(t *testing.T) {
	for _, test := range []struct{ life, left time.Duration }{{2 * 365, 30}, {90, 22}, {6, 1}} {
		// days
		leaf := &x509.Certificate{NotBefore: now, NotAfter: now.Add(test.life * 24 * time.Hour)}
		end := leaf.NotAfter.Add(-test.left * 24 * time.Hour)
		if ExpiresSoon(leaf, end.Add(-24*time.Hour)) || !ExpiresSoon(leaf, end.Add(time.Hour)) {
			t.Errorf("of %d days, it does not end soon in the last %d", test.life, test.left)
		}
	}
	var log bytes.Buffer
	w := ExpiryWarning{What: "a.crt", Renewal: "renew it",
		Logger: slog.New(slog.NewTextHandler(&log, nil))}
	leaf := &x509.Certificate{NotBefore: now, NotAfter: now.Add(100 * 24 * time.Hour)}
	says := func(at time.Duration, want string) {
		t.Helper()
		log.Reset()
		w.Look(leaf, now.Add(at))
		if got := log.String(); (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("after %v says %q, want %q", at, got, want)
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

// A file that replaced another one is another file, although it has the number
// of one that was replaced before.
func TestSameFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func() FileVersion {
		t.Helper()
		next := path + ".new"
		if err := os.WriteFile(next, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, path); err != nil {
			t.Fatal(err)
		}
		v, err := VersionOf(path)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := write()
	if first.id.born == (unix.StatxTimestamp{}) {
		t.Skip("this file system does not keep the time of birth")
	}
	again := first
	for range 100 { // until the number comes again, as it does at once on ext4
		if again = write(); again.id.inode == first.id.inode && again.id.born != first.id.born {
			break
		}
	}
	if again.SameFile(first) {
		t.Errorf("%+v and %+v are one file", first, again)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if now, err := VersionOf(path); err != nil || !now.SameFile(again) || now == again {
		t.Errorf("written in place, %+v became %+v, %v", again, now, err)
	}
}
