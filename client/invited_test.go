package client

import (
	"crypto/sha256"
	"crypto/tls"
	"sync/atomic"
	"testing"
	"time"

	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
)

// oneCertificate is users that accepts the certificate with the hash sum alone.
type oneCertificate struct {
	users
	sum *atomic.Pointer[[32]byte]
}

func (u oneCertificate) ByName(name string) (proxy.User, bool) {
	user, ok := u.users.ByName(name)
	user.Certificate = *u.sum.Load()
	return user, ok
}

func (u oneCertificate) ByToken(string) (proxy.User, bool) { return u.ByName("alice") }

// A proxy accepts only the certificate of the last invitation, although older
// certificates of the user are still valid.
func TestInvitedAgain(t *testing.T) {
	first := newInstallation().user
	second, err := newInstallation().Authority.Client("alice", time.Now(), time.Hour)
	must(err)
	sum := func(c tls.Certificate) *[32]byte {
		s := sha256.Sum256(c.Certificate[0])
		return &s
	}
	var current atomic.Pointer[[32]byte]
	current.Store(sum(first))
	f := startProxy(t, func(c *proxy.Config) {
		c.Users, c.Methods = oneCertificate{users{}, &current},
			[]string{proxy.MethodMTLS, proxy.MethodToken}
	})
	with := func(c tls.Certificate) func(*Config) {
		return func(cfg *Config) { cfg.Token, cfg.TLS.Certificates = "", []tls.Certificate{c} }
	}
	old := startClient(t, f, with(first))
	old.awaitConnected(t)
	if e := startClient(t, f, with(pkitest.KeyPair(second))).failure(t); e.Kind != KindCredentials {
		t.Errorf("with a certificate that is not current yet: got %v, want KindCredentials", e)
	}
	current.Store(sum(pkitest.KeyPair(second)))
	f.UsersChanged()
	if e := old.failure(t); e.Kind != KindCredentials {
		t.Errorf("with the old certificate: got %v, want KindCredentials", e)
	}
	if e := startClient(t, f, func(c *Config) {
		c.TLS.Certificates = []tls.Certificate{first}
	}).failure(t); e.Kind != KindCredentials {
		t.Errorf("with the old certificate and a valid token: got %v, want KindCredentials", e)
	}
	startClient(t, f, with(pkitest.KeyPair(second))).awaitConnected(t)
}
