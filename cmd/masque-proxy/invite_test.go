package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/doctor"
	"masquevpn/internal/fault"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

func TestInvite(t *testing.T) {
	dir, file := install(t, "--listen", "[::]:4433")
	out := filepath.Join(dir, "alice.toml")
	running := mustLoad(t, file) // a proxy that runs already
	do(t, 0, "invite", "alice", "-c", file, "-o", out, "--address", "10.77.0.9,fd77::9",
		"--sessions", "3", "--valid", "30d")

	if m := modes(t, dir)["alice.toml"]; m != 0o600 {
		t.Errorf("the client's file has mode %v", m)
	}
	client, err := config.ParseClient(out, []byte(read(t, out)))
	if err != nil {
		t.Fatal(err)
	}
	if client.Proxy != "vpn.example.org:4433" ||
		client.CAPEM != read(t, filepath.Join(dir, caCertFile)) {
		t.Errorf("dials %q with the authority\n%s", client.Proxy, client.CAPEM)
	}
	pair, err := tls.X509KeyPair([]byte(client.CertPEM), []byte(client.KeyPEM))
	if err != nil {
		t.Fatal(err)
	}
	_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: certs.Pool(running.clientCAs),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil || pair.Leaf.Subject.CommonName != "alice" {
		t.Errorf("the certificate is for %q, %v", pair.Leaf.Subject.CommonName, err)
	}

	want := proxy.User{
		Name: "alice", TokenHash: pki.HashToken(client.Token),
		Certificate: pki.Fingerprint(pair.Leaf), Sessions: 3,
		Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("fd77::9")},
	}
	addrs := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if got, ok := running.users.ByName("alice"); !ok || !cmp.Equal(want, got, addrs) {
		t.Errorf("by name: %v %s", ok, cmp.Diff(want, got, addrs))
	}
	if got, ok := running.users.ByToken(client.Token); !ok || got.Name != "alice" {
		t.Errorf("by token: %v %+v", ok, got)
	}
	if got, ok := running.users.ByToken(client.Token + "x"); ok {
		t.Errorf("by another token: %+v", got)
	}
	if reserved := netip.MustParsePrefix("10.77.0.9/32"); !running.users.Reserved(reserved,
		"bob") || running.users.Reserved(reserved, "alice") {
		t.Error("the address is not reserved for alice")
	}
	if strings.Contains(read(t, filepath.Join(dir, usersFile)), client.Token) {
		t.Error("the token itself is in the users file")
	}

	// A second invitation of the same name changes nothing.
	before := read(t, filepath.Join(dir, usersFile))
	if _, last := do(t, 2, "invite", "alice", "-c", file); !strings.Contains(last,
		"user remove alice") {
		t.Errorf("a second time: %s", last)
	}
	if read(t, filepath.Join(dir, usersFile)) != before {
		t.Error("the users file has changed")
	}
}

// The credentials of a removed user are useless, even if the name is invited
// again.
func TestInviteAgain(t *testing.T) {
	_, file := install(t)
	running := mustLoad(t, file)
	invite := func() (token string, certificate [32]byte) {
		t.Helper()
		out, _ := do(t, 0, "invite", "alice", "-c", file)
		client, err := config.ParseClient("alice.toml", []byte(out))
		if err != nil {
			t.Fatal(err)
		}
		certs, err := pki.ParseCertificates([]byte(client.CertPEM))
		if err != nil {
			t.Fatal(err)
		}
		return client.Token, pki.Fingerprint(certs[0])
	}
	oldToken, oldCertificate := invite()
	do(t, 0, "user", "remove", "alice", "-c", file)
	if _, ok := running.users.ByName("alice"); ok {
		t.Error("a removed user is found by name")
	}
	if _, ok := running.users.ByToken(oldToken); ok {
		t.Error("a removed user is found by token")
	}
	token, certificate := invite()
	if _, ok := running.users.ByToken(oldToken); ok {
		t.Error("the old token is good again")
	}
	if got, _ := running.users.ByName("alice"); got.Certificate != certificate ||
		certificate == oldCertificate {
		t.Errorf("the certificate of the user is %x, that of the invitation %x, and was %x",
			got.Certificate, certificate, oldCertificate)
	}
	if _, ok := running.users.ByToken(token); !ok {
		t.Error("the new token is not good")
	}
}

func TestInviteFollowsMethods(t *testing.T) {
	for _, test := range []struct {
		methods           string
		cert, token, user bool
	}{
		{`["mtls", "token"]`, true, true, true},
		{`["mtls"]`, true, false, true},
		{`["token"]`, false, true, true},
		{`["none"]`, false, false, false},
	} {
		t.Run(test.methods, func(t *testing.T) {
			dir, file := install(t)
			replace(t, file, `["mtls", "token"]`, test.methods)
			out, _ := do(t, 0, "invite", "alice", "-c", file)
			client, err := config.ParseClient("alice.toml", []byte(out))
			if err != nil {
				t.Fatal(err)
			}
			user := strings.Contains(read(t, filepath.Join(dir, usersFile)), `name = "alice"`)
			if (client.CertPEM != "") != test.cert || (client.KeyPEM != "") != test.cert ||
				(client.Token != "") != test.token || user != test.user || client.CAPEM == "" {
				t.Errorf("%s: user %v, file\n%s", test.methods, user, out)
			}
		})
	}
}

func TestInviteDials(t *testing.T) {
	for _, test := range []struct{ old, new, flag, want string }{
		{"", "", "", "vpn.example.org:443"},
		{`"vpn.example.org"`, `"2001:db8::1"`, "", "[2001:db8::1]:443"},
		{"", "", "example.org", "example.org"},
		{`["[::]:443"]`, `["[::]:8443"]`, "", "vpn.example.org:8443"},
		{`listen =`, "template = \"https://vpn.example.org/t/{target}/{ipproto}/\"\nlisten =", "",
			"https://vpn.example.org/t/{target}/{ipproto}/"},
		{"", "", "other.example.org:1", "other.example.org:1"},
	} {
		t.Run(test.want, func(t *testing.T) {
			_, file := install(t)
			replace(t, file, test.old, test.new)
			out, _ := do(t, 0, "invite", "alice", "-c", file, "--proxy", test.flag)
			client, err := config.ParseClient("alice.toml", []byte(out))
			if err != nil || client.Proxy != test.want {
				t.Errorf("%q for %q: %v, %v", test.new, test.want, client, err)
			}
		})
	}
}

// A certificate of another authority is verified with the client's own roots.
func TestInviteForeignCertificate(t *testing.T) {
	dir, file := install(t)
	other, _ := install(t)
	for _, name := range []string{certFile, keyFile} {
		write(t, filepath.Join(dir, name), read(t, filepath.Join(other, name)))
	}
	out, note := do(t, 0, "invite", "alice", "-c", file)
	client, err := config.ParseClient("alice.toml", []byte(out))
	if err != nil || client.CAPEM != "" || client.CertPEM == "" ||
		!strings.Contains(note, "not from the authority here") {
		t.Errorf("%v, note %q, file\n%s", err, note, out)
	}
}

func TestInviteErrors(t *testing.T) {
	dir, file := install(t)
	do(t, 0, "invite", "bob", "-c", file, "--address", "10.77.0.8", "-o",
		filepath.Join(dir, "bob.toml"))
	before := read(t, filepath.Join(dir, usersFile))
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"a/b"}, "cannot name a user"},
		{[]string{"alice", "--proxy", "a b"},
			`--proxy "a b" is not a name, host:port or URI template: write for example vpn.example.org`},
		{[]string{"alice", "--proxy", "vpn.example.org:0"},
			`--proxy "vpn.example.org:0" is not a name`},
		{[]string{"alice", "--valid", "forever"}, `--valid "forever" is not a time span`},
		{[]string{"alice", "--expires", "soon"},
			`--expires "soon" is neither a time span nor a date`},
		{[]string{"alice", "--expires", "2001-01-01"}, "--expires 2001-01-01 is in the past"},
		{[]string{"alice", "--rate-up", "20"},
			`--rate-up "20" is not a number of kbit, Mbit or Gbit per second: write for example 20Mbit`},
		{[]string{"alice", "--rate-down", "1kbit"}, `--rate-down "1kbit" is less than 64kbit`},
		{[]string{"alice", "--route", "x"}, "--route x: not an address prefix"},
		{[]string{"alice", "--route", "10.0.0.1/8"}, "write 10.0.0.0/8"},
		{[]string{"alice", "--valid", "0d"}, "is not a time span"},
		{[]string{"alice", "--valid", "99999999d"}, "is not a time span"},
		{[]string{"alice", "--sessions", "-1"}, "--sessions -1 is negative"},
		{[]string{"alice", "--address", "x"}, "--address x: not an address"},
		{[]string{"alice", "--address", "192.0.2.1"},
			"not of the pool: choose one of 10.77.0.0/24 or fd77::/64"},
		{[]string{"alice", "--address", "10.77.0.1"}, "the proxy's own"},
		{[]string{"alice", "--address", "10.77.0.0"}, "the proxy's own"},
		{[]string{"alice", "--address", "10.77.0.8"}, "reserved for bob"},
		{[]string{"alice", "--address", "10.77.0.9,10.77.0.9"}, "given twice"},
		{[]string{"alice", "-o", filepath.Join(dir, "bob.toml")}, "exists already"},
		{[]string{"alice", "--ca-key", filepath.Join(dir, "none.key")}, "none.key"},
		{[]string{"alice", "--ca-key", filepath.Join(dir, keyFile)},
			"the key does not belong to the certificate"},
		{nil, "accepts 1 arg(s), received 0"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			if _, last := do(t, 2, append([]string{"invite", "-c", file},
				test.args...)...); !strings.Contains(last, test.want) {
				t.Errorf("%v: got %s, want %s", test.args, last, test.want)
			}
		})
	}
	if after := read(t, filepath.Join(dir, usersFile)); after != before {
		t.Errorf("the users file has changed:\n%s", after)
	}
	if _, last := do(t, 2, "invite", "alice", "-c",
		filepath.Join(dir, "none.toml")); !strings.Contains(last,
		"none.toml does not exist: make a new installation") {
		t.Errorf("without a configuration: %s", last)
	}
}

// full is an output that accepts no data.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// If the client's file cannot be written, the user is not added.
func TestInviteIsNotRead(t *testing.T) {
	dir, file := install(t)
	before := read(t, filepath.Join(dir, usersFile))
	var stderr bytes.Buffer
	root := newRoot()
	root.SetOut(full{})
	root.SetErr(&stderr)
	root.SetArgs([]string{"invite", "alice", "-c", file})
	if code := cli.Main(root); code != int(fault.Failure) ||
		!strings.Contains(stderr.String(), "no space left on device: make room") {
		t.Errorf("exit code %d, printed %s", code, &stderr)
	}
	if after := read(t, filepath.Join(dir, usersFile)); after != before {
		t.Errorf("the users file has changed:\n%s", after)
	}
}

func TestExposedSecrets(t *testing.T) {
	for _, name := range []string{keyFile, usersFile} {
		dir, file := install(t)
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"run", "check"} {
			out, last := do(t, 2, command, "-c", file, "--run-dir", t.TempDir())
			if !strings.Contains(out+last, "chmod 600 "+filepath.Join(dir, name)) {
				t.Errorf("%s with an exposed %s: printed %s%s", command, name, out, last)
			}
		}
	}
	dir, file := install(t)
	if err := os.Chmod(filepath.Join(dir, caKeyFile), 0o660); err != nil {
		t.Fatal(err)
	}
	if _, last := do(t, 2, "invite", "alice", "-c", file); !strings.Contains(last, "chmod 600") {
		t.Errorf("invite with an exposed authority: %s", last)
	}
}

// The rights of a user are in the users file and in the list.
func TestInviteLimits(t *testing.T) {
	_, file := install(t)
	replace(t, file, `advertise = ["0.0.0.0/0", "::/0"]`,
		`advertise = ["192.0.2.0/24", "2001:db8::/32"]`)
	running := mustLoad(t, file)
	_, note := do(t, 0, "invite", "alice", "-c", file, "--expires", "30d", "--route",
		"192.0.2.0/25,2001:db8:1::/48", "--rate-up", "20Mbit", "--rate-down", "0.1Gbit")
	if !strings.Contains(note, "note: alice has access until ") {
		t.Errorf("got %s", note)
	}
	got, _ := running.users.ByName("alice")
	routes := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25"),
		netip.MustParsePrefix("2001:db8:1::/48")}
	if d := time.Until(got.Expires); d < 29*24*time.Hour || d > 30*24*time.Hour ||
		!slices.Equal(got.Routes, routes) || got.RateUp != 20_000_000 ||
		got.RateDown != 100_000_000 {
		t.Errorf("alice is %+v", got)
	}
	out, _ := do(t, 0, "user", "list", "-c", file, "--run-dir", t.TempDir())
	for _, want := range []string{"192.0.2.0/25, 2001:db8:1::/48", "up 20Mbit, down 100Mbit",
		got.Expires.UTC().Format(time.RFC3339) + "  ?"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}

	// The certificate is valid at least until the user expires.
	for i, test := range []struct {
		args []string
		want time.Duration
	}{
		{[]string{"--expires", "10d"}, 365 * 24 * time.Hour},
		{[]string{"--expires", "1000d"}, 1000 * 24 * time.Hour},
		{[]string{"--expires", "1000d", "--valid", "10d"}, 10 * 24 * time.Hour},
		{nil, 365 * 24 * time.Hour},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			out, _ := do(t, 0, append([]string{"invite", fmt.Sprint("user", i), "-c", file},
				test.args...)...)
			client, err := config.ParseClient("c.toml", []byte(out))
			if err != nil {
				t.Fatal(err)
			}
			certs, err := pki.ParseCertificates([]byte(client.CertPEM))
			if err != nil {
				t.Fatal(err)
			}
			if d := time.Until(certs[0].NotAfter) - test.want; d.Abs() > time.Hour {
				t.Errorf("%v: the certificate is good until %v", test.args, certs[0].NotAfter)
			}
		})
	}

	// check reports users that have expired, and routes that the proxy does not
	// advertise.
	users := filepath.Join(filepath.Dir(file), usersFile)
	write(t, users, strings.Replace(read(t, users), "expires = ", "expires = 2026-01-02 # ", 1))
	replace(t, file, `"2001:db8::/32"`, `"fd00::/8"`)
	var c doctor.Report
	mustLoad(t, file).checkCredentials(&c, time.Now())
	var said bytes.Buffer
	_ = c.Finish(&said, false)
	for _, want := range []string{
		"warn  users: alice expired at 2026-01-02T00:00:00Z — change expires in " + users,
		"warn  users: alice may reach 2001:db8:1::/48, which routes.advertise does not have — ",
	} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("%q is not in\n%s", want, &said)
		}
	}
	out, _ = do(t, 0, "user", "list", "-c", file, "--run-dir", t.TempDir(), "--json")
	var list []userEntry
	if err := json.Unmarshal([]byte(out), &list); err != nil || !list[0].Expired ||
		list[0].Connected != nil || list[0].RateDown != 100_000_000 ||
		list[len(list)-1].Expires != nil || list[len(list)-1].Routes != nil {
		t.Errorf("listed %s, %v", out, err)
	}
}

func TestParseExpires(t *testing.T) {
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	for s, want := range map[string]string{
		"30d": "2026-07-01T12:00:00Z", "36h": "2026-06-03T00:00:00Z",
		"2026-12-31": "2026-12-31T00:00:00Z", "2026-12-31T18:00:00+01:00": "2026-12-31T17:00:00Z",
		"2026-06-01": "is in the past", "0d": "neither", "-1d": "neither", "9999-01-01": "neither",
		"99999999999d": "neither", "soon": "neither", "2026-13-01": "neither",
	} {
		t.Run(s, func(t *testing.T) {
			got, err := parseExpires(s, now)
			text := got.UTC().Format(time.RFC3339)
			if err != nil {
				text = err.Error()
			}
			if !strings.Contains(text, want) {
				t.Errorf("%q: %s, want %s", s, text, want)
			}
		})
	}
}

// Simultaneous invitations all succeed, and the owner of the users file stays
// the same.
func TestInvitesTogether(t *testing.T) {
	dir, file := install(t)
	users := filepath.Join(dir, usersFile)
	elsewhere := filepath.Join(t.TempDir(), "real.toml")
	if err := os.Rename(users, elsewhere); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(elsewhere, users), os.Chmod(elsewhere, 0o640),
		os.Chown(elsewhere, os.Getuid(), os.Getgid())); err != nil {
		t.Fatal(err)
	}
	const n = 20
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			in := invitation{user: fmt.Sprintf("user%d", i), config: file}
			if err := in.make(io.Discard, io.Discard, time.Now()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	u, err := readUsers(users)
	if err != nil || len(u.All()) != n {
		t.Errorf("%d users of %d, %v", len(u.All()), n, err)
	}
	info, err := os.Lstat(users)
	if err != nil || info.Mode()&os.ModeSymlink == 0 ||
		modes(t, filepath.Dir(elsewhere))["real.toml"] != 0o640 {
		t.Errorf("the link, or the mode of the file, is not kept: %v, %v", info, err)
	}
}

func TestUserList(t *testing.T) {
	dir, file := install(t)
	do(t, 0, "invite", "alice", "-c", file, "--address", "10.77.0.9")
	replace(t, file, `["mtls", "token"]`, `["token"]`)
	do(t, 0, "invite", "bob", "-c", file)
	out, _ := do(t, 0, "user", "list", "-c", file)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], "certificate, token  10.77.0.9") ||
		!strings.Contains(lines[2], "bob") {
		t.Errorf("listed\n%s", out)
	}
	out, _ = do(t, 0, "user", "list", "-c", file, "--json")
	var users []userEntry
	if err := json.Unmarshal([]byte(out), &users); err != nil || len(users) != 2 ||
		users[0].Addresses[0] != "10.77.0.9" || users[1].Certificate || !users[1].Token {
		t.Errorf("listed %+v, %v", users, err)
	}

	if _, last := do(t, 2, "user", "remove", "carol", "-c", file); !strings.Contains(last,
		`there is no user "carol"`) {
		t.Errorf("got %s", last)
	}
	do(t, 0, "user", "remove", "alice", "-c", file)
	text := read(t, filepath.Join(dir, usersFile))
	if strings.Contains(text, "alice") || !strings.Contains(text, "bob") ||
		modes(t, dir)[usersFile] != 0o600 {
		t.Errorf("after removing alice:\n%s", text)
	}
	do(t, 2, "user")
	replace(t, file, `["token"]`, `["none"]`)
	do(t, 2, "user", "list", "-c", file)
}

func TestUserStoreKeepsWhatItKnew(t *testing.T) {
	dir, file := install(t)
	do(t, 0, "invite", "alice", "-c", file)
	path := filepath.Join(dir, usersFile)
	good := read(t, path)
	var log bytes.Buffer
	s, err := openUsers(path, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(){
		"broken":  func() { write(t, path, "[[user]\n") },
		"exposed": func() { write(t, path, good); _ = os.Chmod(path, 0o644) },
		"gone":    func() { _ = os.Remove(path) },
	} {
		t.Run(name, func(t *testing.T) {
			log.Reset()
			spoil()
			for range 3 {
				if _, ok := s.ByName("alice"); !ok {
					t.Errorf("%s: the user is unknown", name)
				}
			}
			if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
				t.Errorf("%s: logged %d times:\n%s", name, n, &log)
			}
			_ = os.Remove(path)
			write(t, path, good)
			if _, ok := s.ByName("alice"); !ok {
				t.Errorf("%s: the file is not read again", name)
			}
		})
	}
}
