package test

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// Certificates that are renewed on disk are used without a restart or a reload.
// The proxy uses its new certificate for new connections and keeps its
// sessions; the client uses its own when it reconnects.
func TestCertificatesRenewedOnDisk(t *testing.T) {
	p := newPair(t, options{})
	invited, err := os.ReadFile(p.invite("alice"))
	check(t, err)
	// Drop the invited certificate and the token, so that any certificate for
	// alice is accepted.
	users := filepath.Join(p.dir, "users.toml")
	text, err := os.ReadFile(users)
	check(t, err)
	check(t, os.WriteFile(users, regexp.MustCompile(`(?m)^(certificate|token).*\n`).ReplaceAll(text,
		nil), 0o600))
	var ca pki.Pair
	ca.Cert, err = os.ReadFile(filepath.Join(p.dir, "ca.crt"))
	check(t, err)
	ca.Key, err = os.ReadFile(filepath.Join(p.dir, "ca.key"))
	check(t, err)
	authority, err := pki.ParseAuthority(ca)
	check(t, err)
	dir := t.TempDir()
	write := func(dir, name string, pair pki.Pair) (end time.Time) {
		check(t, os.WriteFile(filepath.Join(dir, name+".crt"), pair.Cert, 0o600))
		check(t, os.WriteFile(filepath.Join(dir, name+".key"), pair.Key, 0o600))
		block, _ := pem.Decode(pair.Cert)
		leaf, err := x509.ParseCertificate(block.Bytes)
		check(t, err)
		return leaf.NotAfter
	}
	renew := func(life time.Duration) (end time.Time) {
		pair, err := authority.Client("alice", time.Now(), life)
		check(t, err)
		return write(dir, "me", pair)
	}
	file := filepath.Join(dir, "alice.toml")
	caPEM := regexp.MustCompile(`(?s)ca_pem = '''.*?'''\n`).FindString(string(invited))
	check(t, os.WriteFile(file, []byte(fmt.Sprintf("proxy = %q\n[tls]\n%scert = \"me.crt\"\nkey = \"me.key\"\n", lab.ProxyName, caPEM)), 0o600))

	first := renew(20 * time.Second)
	p.up(p.Client, file)
	before := p.status(p.Client, "alice")
	if before.CertificateUntil == nil || !before.CertificateUntil.Equal(first) {
		t.Errorf("the client's certificate ends %v, want %v", before.CertificateUntil, first)
	}

	// The renewed certificate has another key and another end.
	renewed, err := authority.Server(lab.ProxyName, nil, time.Now().Add(-time.Hour))
	check(t, err)
	end := write(p.dir, "proxy", renewed)
	p.eventually("the proxy has the new certificate", func() bool { return p.expiry().Equal(end) })
	p.ping(p.Client, lab.TargetIPv4)
	p.wantSameSession(before)

	second := renew(time.Hour)
	p.eventually("the first certificate has ended", func() bool {
		return time.Now().After(first.Add(time.Second))
	})
	p.must(p.Proxy, "masque-proxy", "kick",
		strings.Fields(strings.Split(p.must(p.Proxy, "masque-proxy", "sessions"), "\n")[1])[0])
	p.awaitReconnected(0)
	if s := p.status(p.Client, "alice"); s.CertificateUntil == nil ||
		!s.CertificateUntil.Equal(second) {
		t.Errorf("the client's certificate ends %v, want %v", s.CertificateUntil, second)
	}
	p.ping(p.Client, lab.TargetIPv4)
}
