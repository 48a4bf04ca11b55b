package main

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"masquevpn/internal/config"
)

// installACME makes an installation that uses ACME. Its server does not exist,
// and its storage is a folder of the test.
func installACME(t *testing.T) (dir, file string) {
	t.Helper()
	dir, file = install(t, "--acme", "admin@example.org", "--agree-tos", "--acme-directory",
		"https://127.0.0.1:1/dir", "--listen", "127.0.0.1:4433")
	replace(t, file, `#storage = "/var/lib/masque/acme"`, `storage = "state/acme"`)
	return dir, file
}

func TestInitACME(t *testing.T) {
	dir, file := installACME(t)
	want := map[string]fs.FileMode{caCertFile: 0o644, caKeyFile: 0o600, usersFile: 0o600,
		configFile: 0o644}
	if diff := cmp.Diff(want, modes(t, dir)); diff != "" {
		t.Error(diff)
	}
	l := mustLoad(t, file)
	newServer(t, l)
	if l.acme == nil || l.acme.Email != "admin@example.org" || l.acme.Listen != ":443" ||
		l.acme.Storage != filepath.Join(dir, "state/acme") {
		t.Errorf("ACME is %+v", l.acme)
	}
	if _, last := do(t, 2, "init", "--renew", dir); !strings.Contains(last,
		"the running proxy renews the certificate by itself") {
		t.Errorf("init --renew printed %s", last)
	}
	for want, args := range map[string][]string{
		"add --agree-tos": {"--acme", "admin@example.org"},
		"add --acme":      {"--agree-tos"},
		"not an e-mail":   {"--acme", "admin", "--agree-tos"},
	} {
		t.Run(want, func(t *testing.T) {
			if _, last := do(t, 2, append([]string{"init", "--name", "vpn.example.org",
				filepath.Join(t.TempDir(), "m")}, args...)...); !strings.Contains(last, want) {
				t.Errorf("%v: got %s, want %s", args, last, want)
			}
		})
	}
	// The configuration for Let's Encrypt is valid as it is.
	_, file = install(t, "--acme", "admin@example.org", "--agree-tos")
	if l := mustLoad(t, file); !strings.Contains(l.acme.Directory, "letsencrypt.org") {
		t.Errorf("the directory is %s", l.acme.Directory)
	}
}

// With ACME, clients verify the proxy with their system's authorities, and the
// proxy verifies them with its own.
func TestInviteACME(t *testing.T) {
	dir, file := installACME(t)
	out, note := do(t, 0, "invite", "alice", "-c", file)
	client, err := config.ParseClient("alice.toml", []byte(out))
	if err != nil || client.CAPEM != "" || client.CertPEM == "" || client.KeyPEM == "" ||
		!strings.Contains(note, "verify it with their system's") {
		t.Errorf("%v, note %q, file\n%s", err, note, out)
	}
	root := read(t, filepath.Join(dir, caCertFile))
	out, _ = do(t, 0, "invite", "bob", "-c", file, "--ca", filepath.Join(dir, caCertFile))
	if client, err = config.ParseClient("bob.toml", []byte(out)); err != nil ||
		client.CAPEM != root {
		t.Errorf("%v, with --ca\n%s", err, out)
	}
	if _, last := do(t, 2, "invite", "carol", "-c", file, "--ca", file); !strings.Contains(last,
		"name a file with certificates in PEM form") {
		t.Errorf("invite printed %s", last)
	}
}

// With ACME, the key for stateless resets stays the same although the
// certificate's key changes.
func TestACMEResetKey(t *testing.T) {
	_, file := installACME(t)
	l := mustLoad(t, file)
	first, err := l.resetKey()
	if err != nil {
		t.Fatal(err)
	}
	second, err := mustLoad(t, file).resetKey()
	if err != nil || *second != *first {
		t.Errorf("another key after a restart: %v", err)
	}
	path := filepath.Join(l.acme.Storage, "reset.key")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	write(t, path, "half")
	if _, err := l.resetKey(); err == nil ||
		!strings.Contains(err.Error(), "remove it, and the proxy creates another one") {
		t.Errorf("of a broken file: %v", err)
	}
}

func TestCheckACME(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, file := installACME(t)
	replace(t, file, `#listen = ":443" `, `listen = "`+taken.Addr().String()+`" `)
	out, _ := do(t, 2, "check", "-c", file, "--run-dir", t.TempDir())
	for _, want := range []string{
		"ok    tls.acme: no certificate yet; the proxy gets it from https://127.0.0.1:1/dir when it starts\n",
		"ok    tls.acme.storage: ",
		"fail  tls.acme: TCP " + taken.Addr().String() +
			", where the ACME server asks for the challenge tls-alpn-01, is in use — stop what uses it",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("check does not say %s:\n%s", want, out)
		}
	}
	if strings.Contains(out, "cannot be asked") {
		t.Errorf("the server was asked:\n%s", out)
	}
	out, _ = do(t, 2, "check", "-c", file, "--run-dir", t.TempDir(), "--online")
	if !strings.Contains(out, "fail  tls.acme: the ACME server https://127.0.0.1:1/dir cannot be asked: ") {
		t.Errorf("check --online printed\n%s", out)
	}
}

// The proxy uses renewed certificate files without a reload, and still after a
// reload.
func TestCertificateFiles(t *testing.T) {
	dir, file := install(t)
	d, runDir := start(t, file)
	first := d.certificate().Leaf
	do(t, 0, "init", "--renew", dir)
	d.checkCertificate()
	d.checkCertificate()
	second := d.certificate().Leaf
	if second.Equal(first) || !d.certificateStatus().Until.Equal(second.NotAfter) ||
		d.certificateStatus().From != filepath.Join(dir, certFile) {
		t.Errorf("the certificate is the old one: %+v", d.certificateStatus())
	}
	moved := filepath.Join(dir, "other.crt")
	do(t, 0, "init", "--renew", dir)
	if err := os.Rename(filepath.Join(dir, certFile), moved); err != nil {
		t.Fatal(err)
	}
	replace(t, file, `cert = "proxy.crt"`, `cert = "other.crt"`)
	do(t, 0, "reload", "--run-dir", runDir)
	if d.certificate().Leaf.Equal(second) {
		t.Error("a reload does not use the file that the configuration names now")
	}
}

// A proxy without a certificate reports that it waits for one.
func TestWaitingForCertificate(t *testing.T) {
	_, file := installACME(t)
	_, runDir := start(t, file)
	if _, last := do(t, 3, "status", "--run-dir", runDir); !strings.Contains(last,
		"still starting: the first certificate is being obtained") {
		t.Errorf("status printed %s", last)
	}
	replace(t, file, `email = "admin@example.org"`, `email = "other@example.org"`)
	if out, _ := do(t, 0, "reload", "--run-dir",
		runDir); out != "reloaded; restart the proxy for: tls.acme\n" {
		t.Errorf("reload printed %s", out)
	}
}
