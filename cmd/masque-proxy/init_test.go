package main

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

// do runs a command line and checks its exit code. It returns the standard
// output and the last line of standard error.
func do(t *testing.T, want int, args ...string) (out, last string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	root := newRoot()
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	root.SetArgs(args)
	if code := cli.Main(root); code != want {
		t.Fatalf("%s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, &stdout,
			&stderr)
	}
	lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
	return stdout.String(), lines[len(lines)-1]
}

// install makes an installation and returns its folder and its proxy.toml.
func install(t *testing.T, args ...string) (dir, file string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "masque")
	do(t, 0, append([]string{"init", "--name", "vpn.example.org", dir}, args...)...)
	return dir, filepath.Join(dir, configFile)
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// replace replaces a text in a file.
func replace(t *testing.T, path, old, new string) {
	t.Helper()
	text := read(t, path)
	if !strings.Contains(text, old) {
		t.Fatalf("%s does not hold %q", path, old)
	}
	write(t, path, strings.Replace(text, old, new, 1))
}

// modes returns the modes of the files in a folder.
func modes(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]fs.FileMode)
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		m[e.Name()] = info.Mode().Perm()
	}
	return m
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func mustLoad(t *testing.T, file string) *loaded {
	t.Helper()
	l, err := load(file, discard())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// newServer creates the proxy as `run` does.
func newServer(t *testing.T, l *loaded) *proxy.Server {
	t.Helper()
	s, err := l.newServer(l.config(nil))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestInit(t *testing.T) {
	dir, file := install(t, "--listen", "127.0.0.1:4433", "--ipv6", "", "--route",
		"10.0.0.0/8,192.0.2.0/24")
	want := map[string]fs.FileMode{
		caCertFile: 0o644, caKeyFile: 0o600, certFile: 0o644, keyFile: 0o600, usersFile: 0o600,
		configFile: 0o644,
	}
	if diff := cmp.Diff(want, modes(t, dir)); diff != "" {
		t.Error(diff)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder has mode %v, %v", info.Mode(), err)
	}
	l := mustLoad(t, file)
	newServer(t, l)
	f := l.file
	if f.Name != "vpn.example.org" || f.Listen[0] != "127.0.0.1:4433" ||
		f.Pool4.String() != "10.77.0.0/24" || f.Pool6.IsValid() || len(f.Advertise) != 2 ||
		!f.Masquerade {
		t.Errorf("proxy.toml is %+v", f)
	}
	if diff := cmp.Diff([]string{"mtls", "token"}, f.Methods); diff != "" {
		t.Error(diff)
	}
	if _, err := l.pair.Leaf.Verify(x509.VerifyOptions{DNSName: "vpn.example.org",
		Roots: certs.Pool(l.clientCAs)}); err != nil {
		t.Errorf("the proxy's certificate: %v", err)
	}
}

func TestInitForAddress(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "masque")
	do(t, 0, "init", "--name", "2001:db8::1", dir)
	l := mustLoad(t, filepath.Join(dir, configFile))
	newServer(t, l)
	if err := l.pair.Leaf.VerifyHostname("2001:db8::1"); err != nil {
		t.Error(err)
	}
}

func TestInitOverwritesNothing(t *testing.T) {
	for _, name := range []string{caCertFile, caKeyFile, certFile, keyFile, usersFile, configFile} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, name)
			write(t, path, "precious")
			if _, last := do(t, 2, "init", "--name", "a.example", dir); !strings.Contains(last,
				path+" exists already") {
				t.Errorf("%s: printed %s", name, last)
			}
			if read(t, path) != "precious" || len(modes(t, dir)) != 1 {
				t.Errorf("%s: the folder has changed: %v", name, modes(t, dir))
			}
		})
	}
}

func TestInitErrors(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{}, "the name that clients dial is missing: give it with --name"},
		{[]string{"--name", "a b"}, "not a name or an address"},
		{[]string{"--name", "a.example", "--listen", "443"}, "not an address and port"},
		{[]string{"--name", "a.example", "--ipv4", "10.0.0.1/8"},
			"bits are set behind the prefix length"},
		{[]string{"--name", "a.example", "--ipv4", "", "--ipv6", ""}, "empty"},
		{[]string{"--name", "a.example", "--route", "all"}, "not an address prefix"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "masque")
			if _, last := do(t, 2, append([]string{"init", dir},
				test.args...)...); !strings.Contains(last, test.want) {
				t.Errorf("%v: got %s, want %s", test.args, last, test.want)
			}
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v: the folder was made: %v", test.args, err)
			}
		})
	}
}

func TestRenew(t *testing.T) {
	dir, file := install(t)
	before := mustLoad(t, file)
	do(t, 0, "init", "--renew", dir)
	after := mustLoad(t, file)
	if pki.Fingerprint(before.pair.Leaf) == pki.Fingerprint(after.pair.Leaf) ||
		!pki.Matches(after.pair.Leaf, certs.Signer(before.pair.Certificate)) {
		t.Error("the certificate is the old one, or has another key")
	}
	a, errA := before.resetKey()
	b, errB := after.resetKey()
	if errA != nil || errB != nil || *a != *b {
		t.Error("the key of stateless resets changed with the certificate", errA, errB)
	}
	if _, last := do(t, 2, "init", "--renew", "--name", "other.example",
		dir); !strings.Contains(last, `name = "vpn.example.org"`) {
		t.Errorf("another name: %s", last)
	}
	if err := os.Remove(filepath.Join(dir, caKeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, last := do(t, 2, "init", "--renew", dir); !strings.Contains(last, "ca.key") {
		t.Errorf("without the authority: %s", last)
	}
}

// A service can read the files that root creates in its folder, except for the
// authority's key, which it does not need.
func TestServiceFolder(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750|fs.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	secret := files.SecretMode(filepath.Join(dir, keyFile)) // 0600 without root
	file := filepath.Join(dir, configFile)
	do(t, 0, "init", "--name", "vpn.example.org", dir)
	do(t, 0, "invite", "alice", "-c", file, "-o", filepath.Join(dir, "alice.toml"))
	do(t, 0, "invite", "bob", "-c", file)
	do(t, 0, "user", "remove", "bob", "-c", file)
	for name, want := range map[string]fs.FileMode{caKeyFile: 0o600, keyFile: secret,
		usersFile: secret, "alice.toml": secret, certFile: 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil ||
			info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	if out, _ := do(t, 0, "user", "list", "-c", file); !strings.Contains(out, "alice") {
		t.Errorf("the users are %s", out)
	}
}
