package acme

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/fault"
	"masquevpn/internal/pki"
)

const patience = 60 * time.Second

// server is pebble on the loopback interface. It connects to port for
// challenges, and its certificates are valid for the duration life.
type server struct {
	Config
	manage string // URL of the management interface
	stop   func()
}

// start runs pebble and returns it with a configuration for 127.0.0.1.
func start(t *testing.T, challenge Challenge, life time.Duration) *server {
	t.Helper()
	dir := t.TempDir()
	authority, root, err := pki.NewAuthority("ACME server", time.Now())
	must(t, err)
	own, err := authority.Server("127.0.0.1", nil, time.Now())
	must(t, err)
	acme, manage, ask := freePort(t), freePort(t), freePort(t)
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": acme, "managementListenAddress": manage,
		"certificate": filepath.Join(dir, "own.crt"), "privateKey": filepath.Join(dir, "own.key"),
		"httpPort": port(ask), "tlsPort": port(ask),
		"certificateValidityPeriod": int(life.Seconds()),
	}})
	must(t, err)
	for name, data := range map[string][]byte{"own.crt": own.Cert, "own.key": own.Key,
		"config.json": config} {
		must(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root.Cert)
	cmd := exec.Command("pebble", "-config", filepath.Join(dir, "config.json"))
	cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0")
	must(t, cmd.Start())
	stopped := false
	s := &server{
		Config: Config{
			Name: "127.0.0.1", Directory: "https://" + acme + "/dir",
			Email: "admin@vpn.example.org", Roots: roots,
			Challenge: challenge, Listen: ask, Storage: filepath.Join(t.TempDir(), "acme"),
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		},
		manage: "https://" + manage,
		stop: func() {
			if !stopped {
				stopped = true
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		},
	}
	t.Cleanup(s.stop)
	eventually(t, "pebble answers", func() bool {
		_, err := CheckDirectory(t.Context(), s.Config)
		return err == nil
	})
	return s
}

// issuer returns the authority that signs the server's certificates.
func (s *server) issuer(t *testing.T) *x509.CertPool {
	t.Helper()
	rsp, err := httpClient(s.Config).Get(s.manage + "/roots/0")
	must(t, err)
	defer rsp.Body.Close()
	data, err := io.ReadAll(rsp.Body)
	must(t, err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		t.Fatalf("no certificate: %s", data)
	}
	return pool
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	return l.Addr().String()
}

func port(hostPort string) (n int) {
	_, p, _ := net.SplitHostPort(hostPort)
	_, _ = fmt.Sscan(p, &n)
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not reached in %v: %s", patience, what)
		}
	}
}

// run runs a Manager until the returned function is called.
func run(t *testing.T, cfg Config) (*Manager, func()) {
	t.Helper()
	m := New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	stop := func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return m, stop
}

func ready(t *testing.T, m *Manager) *tls.Certificate {
	t.Helper()
	select {
	case <-m.Ready():
	case <-time.After(patience):
		t.Fatalf("no certificate in %v: %v", patience, m.Status().Problem)
	}
	return m.Certificate()
}

// TestObtain obtains a certificate by each challenge. Only the owner can read
// it, and the next Manager finds it without a server.
func TestObtain(t *testing.T) {
	for _, challenge := range []Challenge{TLSALPN, HTTP} {
		t.Run(string(challenge), func(t *testing.T) {
			s := start(t, challenge, 90*24*time.Hour)
			if _, err := Stored(t.Context(), s.Config); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("before the first run: stored certificate: %v", err)
			}
			m, stop := run(t, s.Config)
			cert := ready(t, m)
			intermediates := x509.NewCertPool()
			for _, der := range cert.Certificate[1:] {
				c, err := x509.ParseCertificate(der)
				must(t, err)
				intermediates.AddCert(c)
			}
			if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: s.issuer(t),
				Intermediates: intermediates, DNSName: "127.0.0.1"}); err != nil {
				t.Error(err)
			}
			if c, err := net.Dial("tcp", s.Listen); err == nil {
				c.Close()
				t.Error("the challenge is still answered")
			}
			stop()
			s.stop()
			must(t, filepath.WalkDir(s.Storage, func(path string, d fs.DirEntry, err error) error {
				if err == nil {
					var info fs.FileInfo
					if info, err = d.Info(); err == nil && info.Mode().Perm()&0o077 != 0 {
						t.Errorf("%s has mode %v", path, info.Mode())
					}
				}
				return err
			}))
			stored, err := Stored(t.Context(), s.Config)
			if err != nil || !stored.Leaf.Equal(cert.Leaf) {
				t.Errorf("another certificate is stored: %v", err)
			}
			m, _ = run(t, s.Config)
			if again := ready(t, m); !again.Leaf.Equal(cert.Leaf) {
				t.Error("another certificate after a restart")
			}
		})
	}
}

// TestRenew checks that a certificate is renewed before it ends, with a new
// key, and that an expired one is not used.
func TestRenew(t *testing.T) {
	s := start(t, TLSALPN, 6*time.Second)
	m, stop := run(t, s.Config)
	first := ready(t, m)
	eventually(t, "the certificate is renewed", func() bool {
		return !m.Certificate().Leaf.Equal(first.Leaf)
	})
	if pki.Matches(m.Certificate().Leaf, first.PrivateKey.(crypto.Signer)) {
		t.Error("the key is the same")
	}
	stop()
	s.stop()
	last, err := Stored(t.Context(), s.Config)
	must(t, err)
	eventually(t, "it has ended", func() bool { return time.Now().After(last.Leaf.NotAfter) })
	m, _ = run(t, s.Config)
	eventually(t, "it is to be renewed", func() bool { return m.Status().Problem != nil })
	if m.Certificate() != nil {
		t.Error("an expired certificate is used")
	}
}

// TestUnusable checks that damaged files are replaced.
func TestUnusable(t *testing.T) {
	s := start(t, TLSALPN, 90*24*time.Hour)
	m, stop := run(t, s.Config)
	first := ready(t, m)
	stop()
	keys, err := filepath.Glob(filepath.Join(s.Storage, "certificates", "*", "*", "*.key"))
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	must(t, os.WriteFile(keys[0], []byte("half"), 0o600))
	m, _ = run(t, s.Config)
	if second := ready(t, m); second.Leaf.Equal(first.Leaf) {
		t.Error("the certificate is the old one")
	}
}

// TestProblems checks that failures come with a remedy, and that Again retries.
func TestProblems(t *testing.T) {
	s := start(t, TLSALPN, 90*24*time.Hour)
	unknown := s.Config
	unknown.Roots = nil
	elsewhere := s.Config
	elsewhere.Directory = "https://" + freePort(t) + "/dir"
	lost := s.Config
	lost.Directory += "ectory"
	file := s.Config
	file.Storage = filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file.Storage, nil, 0o600))
	unreachable := s.Config
	unreachable.Listen = freePort(t)
	address := s.Config
	address.Listen = "192.0.2.1:443"
	for name, test := range map[string]struct {
		cfg          Config
		want, remedy string
	}{
		"authority": {unknown, "cannot be asked: tls: failed to verify certificate",
			"tls.acme.ca"},
		"no server": {elsewhere, "connection refused", "check tls.acme.directory"},
		"not there": {lost, "HTTP 404", "check tls.acme.directory"},
		"no folder": {file, "the folder of the certificate", "tls.acme.storage"},
		"challenge": {unreachable, "the ACME server refuses: ",
			"of 127.0.0.1 lead to this host, and TCP port 443 in"},
		"no address": {address, "not an address of this host", "change tls.acme.listen"},
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := run(t, test.cfg)
			eventually(t, "there is a problem", func() bool { return m.Status().Problem != nil })
			e, ok := errors.AsType[*fault.Error](m.Status().Problem)
			if !ok || !strings.Contains(e.Reason, test.want) ||
				!strings.Contains(e.Remedy, test.remedy) {
				t.Errorf("got %v, want %q and %q", m.Status().Problem, test.want, test.remedy)
			}
			if next := time.Until(m.Status().Next); next <= 0 || next > 2*firstRetry {
				t.Errorf("tried again in %v", next)
			}
		})
	}

	taken, err := net.Listen("tcp", s.Listen)
	must(t, err)
	m, _ := run(t, s.Config)
	eventually(t, "the port is in use", func() bool {
		err := m.Status().Problem
		return err != nil && strings.Contains(err.Error(),
			"is in use: stop what uses it (ss -tlnp)")
	})
	must(t, taken.Close())
	m.Again()
	ready(t, m)
	eventually(t, "there is no problem", func() bool { return m.Status().Problem == nil })
}

// TestCheckDirectory checks that the terms of service are returned.
func TestCheckDirectory(t *testing.T) {
	s := start(t, TLSALPN, time.Hour)
	if terms, err := CheckDirectory(t.Context(), s.Config); err != nil ||
		!strings.HasPrefix(terms, "data:") && !strings.HasPrefix(terms, "http") {
		t.Errorf("terms %q, %v", terms, err)
	}
	s.Directory = "https://" + freePort(t) + "/dir"
	if _, err := CheckDirectory(t.Context(), s.Config); err == nil ||
		!strings.Contains(err.Error(), "check tls.acme.directory") {
		t.Errorf("without a server: %v", err)
	}
}

// TestLocks checks that only one process at a time asks for a certificate, and
// that locks do not stay behind.
func TestLocks(t *testing.T) {
	dir := t.TempDir()
	a, b := newStorage(dir), newStorage(dir)
	must(t, a.Lock(t.Context(), "issue"))
	ctx, cancel := context.WithTimeout(t.Context(), lockInterval/2)
	defer cancel()
	if err := b.Lock(ctx, "issue"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second lock: %v", err)
	}
	must(t, b.Lock(t.Context(), "other"))
	must(t, a.Unlock(t.Context(), "issue"))
	must(t, b.Lock(t.Context(), "issue"))
	must(t, b.Unlock(t.Context(), "issue"))
	if err := b.Unlock(t.Context(), "issue"); err == nil {
		t.Error("a lock that is not held is released")
	}
}
