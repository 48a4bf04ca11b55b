package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/doctor"
)

func TestLoadErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(dir, file string)
		want string
	}{
		{"no certificate", func(dir, _ string) {
			_ = os.Remove(filepath.Join(dir, certFile))
		}, `proxy.toml:11: tls.cert = "proxy.crt": `},
		{"no key", func(dir, _ string) {
			_ = os.Remove(filepath.Join(dir, keyFile))
		}, `proxy.toml:12: tls.key = "proxy.key": `},
		{"no client CA", func(dir, _ string) {
			_ = os.Remove(filepath.Join(dir, caCertFile))
		}, `proxy.toml:13: tls.client_ca = "ca.crt": `},
		{"no users", func(dir, _ string) {
			_ = os.Remove(filepath.Join(dir, usersFile))
		}, `users.toml does not exist: make it with: touch `},
		{"a folder for users", func(dir, _ string) {
			_ = os.Remove(filepath.Join(dir, usersFile))
			_ = os.Mkdir(filepath.Join(dir, usersFile), 0o700)
		}, `users.toml: is a directory: name another one`},
		{"a folder for the configuration", func(_, file string) {
			_ = os.Remove(file)
			_ = os.Mkdir(file, 0o700)
		}, `proxy.toml: is a directory: name another one`},
		{"garbage for a certificate", func(dir, _ string) {
			write(t, filepath.Join(dir, certFile), "x")
		}, `tls.cert = "proxy.crt": holds no certificate in PEM form; write`},
		{"garbage for a key", func(dir, _ string) {
			write(t, filepath.Join(dir, keyFile), "x")
		}, `tls.key = "proxy.key": holds no private key in PEM form; write`},
		{"another key", func(dir, _ string) {
			write(t, filepath.Join(dir, keyFile), read(t, filepath.Join(dir, caKeyFile)))
		}, `tls.key = "proxy.key": not the key of the certificate; `},
		{"garbage for a client CA", func(dir, _ string) {
			write(t, filepath.Join(dir, caCertFile), "x")
		}, `tls.client_ca = "ca.crt": holds no certificate`},
		{"garbage for users", func(dir, _ string) {
			write(t, filepath.Join(dir, usersFile), "x")
		}, `users.toml:1: `},
		{"a bad template", func(_, file string) {
			replace(t, file, "listen =", "template = \"https://a.example/{+target}\"\nlisten =")
		}, `proxy.toml:8: template = "https://a.example/{+target}": `},
		{"a site that cannot be", func(_, file string) {
			write(t, file, read(t, file)+
				"\n[[site]]\nuser = \"branch\"\nnetworks = [\"192.0.2.0/24\", \"169.254.0.0/24\"]\n")
		}, `169.254.0.0/24 overlaps 169.254.0.0/16, which is never behind a gateway`},
		{"two problems", func(_, file string) {
			replace(t, file, "offload = true", "offload = 1")
			replace(t, file, "masquerade = true", "masquerade = 2")
		}, `proxy.toml has 2 problems: correct the lines above`},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, file := install(t)
			test.do(dir, file)
			if _, last := do(t, 2, "run", "-c", file, "--run-dir",
				t.TempDir()); !strings.Contains(last, test.want) {
				t.Errorf("run got %s, want %s", last, test.want)
			}
			out, last := do(t, 2, "check", "-c", file, "--run-dir", t.TempDir())
			if !strings.Contains(out, "fail  configuration: ") ||
				!strings.Contains(last, "checks failed") {
				t.Errorf("check printed %s%s", out, last)
			}
		})
	}
}

// start creates a process whose control socket answers. The proxy itself does
// not run.
func start(t *testing.T, file string) (d *process, runDir string) {
	t.Helper()
	l := mustLoad(t, file)
	d = newProcess(file, l, discard())
	d.server = newServer(t, l)
	runDir = t.TempDir()
	lock, err := control.Acquire(runDir, instance)
	if err != nil {
		t.Fatal(err)
	}
	socket, err := control.Serve(runDir, instance, d.handler(), discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(socket.Close(), lock.Release()); err != nil {
			t.Error(err)
		}
	})
	return d, runDir
}

func TestControl(t *testing.T) {
	dir, file := install(t)
	d, runDir := start(t, file)
	if out, _ := do(t, 0, "sessions", "--run-dir", runDir,
		"--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("sessions are %s", out)
	}
	do(t, 0, "sessions", "--run-dir", runDir)
	if _, last := do(t, 3, "kick", "a/b", "--run-dir", runDir); !strings.Contains(last,
		`"a/b": there is no such session: list them with`) {
		t.Errorf("kick printed %s", last)
	}
	if _, last := do(t, 3, "status", "--run-dir", runDir); !strings.Contains(last,
		"still starting: try again") {
		t.Errorf("status printed %s", last)
	}

	old := d.certificate()
	do(t, 0, "init", "--renew", dir)
	if out, _ := do(t, 0, "reload", "--run-dir", runDir); out != "reloaded\n" {
		t.Errorf("reload printed %s", out)
	}
	renewed := d.certificate()
	if bytes.Equal(renewed.Certificate[0], old.Certificate[0]) {
		t.Error("the certificate was not reloaded")
	}
	replace(t, file, "sessions = 4096", "sessions = 9")
	replace(t, file, `"[::]:443"`, `"[::]:444"`)
	write(t, file, read(t, file)+"\n[log]\nqlog_dir = \"qlog\"\nkey_log = \"keys\"\n")
	if out, _ := do(t, 0, "reload", "--run-dir",
		runDir); out != "reloaded; restart the proxy for: listen, log.qlog_dir, log.key_log\n" {
		t.Errorf("reload printed %s", out)
	}
	if out, _ := do(t, 0, "reload", "--run-dir", runDir,
		"--json"); strings.TrimSpace(out) != `{"restart":["listen","log.qlog_dir","log.key_log"]}` {
		t.Errorf("reload printed %s", out)
	}
	write(t, filepath.Join(dir, certFile), "x")
	if _, last := do(t, 2, "reload", "--run-dir", runDir); !strings.Contains(last, "tls.cert") {
		t.Errorf("reload of a broken certificate printed %s", last)
	}
	if !bytes.Equal(d.certificate().Certificate[0], renewed.Certificate[0]) {
		t.Error("a failed reload changed the certificate")
	}
}

// Metrics and readiness are served before the proxy is ready and while it
// stops. They follow the certificate.
func TestMonitoring(t *testing.T) {
	dir, file := install(t)
	d, runDir := start(t, file)
	ctx, stop := context.WithCancel(t.Context())
	if err := d.readiness(ctx); err == nil || err.Error() != "the proxy is still starting" {
		t.Errorf("at the start: %v", err)
	}
	stop()
	if err := d.readiness(ctx); err == nil || err.Error() != "the proxy is stopping" {
		t.Errorf("at the end: %v", err)
	}
	v := d.values()
	if v.Stats == nil || v.MaxSessions != 4096 || len(v.Pool) != 2 ||
		!v.CertificateExpiry.Equal(d.loaded.pair.Leaf.NotAfter) {
		t.Errorf("values %+v", v)
	}
	authority, err := readAuthority(filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Server(d.loaded.file.Name, certs.Signer(d.loaded.pair.Certificate),
		time.Now().Add(-24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, certFile), string(pair.Cert))
	do(t, 0, "reload", "--run-dir", runDir)
	if after := d.values().CertificateExpiry; !after.Before(v.CertificateExpiry.Add(-23 * time.Hour)) {
		t.Errorf("the certificate ends at %v after the reload, %v before", after,
			v.CertificateExpiry)
	}
}

func TestCheckMetrics(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, test := range []struct{ listen, want string }{
		{ln.Addr().String(), "fail  metrics.listen: TCP " + ln.Addr().String() +
			" is in use — stop what uses it (ss -tlpn), or change metrics.listen"},
		{"192.0.2.1:9484", "fail  metrics.listen: TCP 192.0.2.1:9484 is not an address of this host — change metrics.listen"},
		{":39484", "warn  metrics.listen: other hosts can reach TCP :39484 — everybody who can reach it can read"},
	} {
		t.Run(test.listen, func(t *testing.T) {
			_, file := install(t)
			write(t, file, read(t, file)+"\n[metrics]\nlisten = \""+test.listen+"\"\n")
			var c doctor.Report
			(&options{Globals: &cli.Globals{RunDir: t.TempDir()}}).check(t.Context(), &c,
				file, false)
			var out strings.Builder
			_ = c.Finish(&out, false)
			if !strings.Contains(out.String(), test.want) {
				t.Errorf("%s: check printed\n%s", test.listen, out.String())
			}
		})
	}
}

func TestNoProxyRuns(t *testing.T) {
	runDir := t.TempDir()
	for _, args := range [][]string{{"status"}, {"sessions"}, {"kick", "1"}, {"reload"}} {
		t.Run(args[0], func(t *testing.T) {
			if _, last := do(t, 3, append(args, "--run-dir", runDir)...); !strings.Contains(last,
				"no proxy is running") {
				t.Errorf("%v: printed %s", args, last)
			}
		})
	}
}

func TestCheckFindsPortInUse(t *testing.T) {
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	addr := socket.LocalAddr().String()
	_, file := install(t, "--listen", addr)
	out, _ := do(t, 2, "check", "-c", file, "--run-dir", t.TempDir())
	if !strings.Contains(out, "fail  listen: UDP "+addr+" is in use — ") {
		t.Errorf("check printed\n%s", out)
	}
	out, _ = do(t, 2, "check", "-c", file, "--run-dir", t.TempDir(), "--json")
	for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
		var c doctor.Finding
		if err := json.Unmarshal([]byte(line), &c); err != nil || c.Text == "" {
			t.Errorf("line %s: %v", line, err)
		}
	}
}

func TestCheckFindsSitesWithoutUser(t *testing.T) {
	_, file := install(t)
	write(t, file, read(t, file)+"\n[[site]]\nuser = \"branch\"\nnetworks = [\"192.0.2.0/24\"]\n")
	said := func() string {
		var c doctor.Report
		mustLoad(t, file).checkCredentials(&c, time.Now())
		var out bytes.Buffer
		_ = c.Finish(&out, false) // warnings are no errors
		return out.String()
	}
	if out := said(); !strings.Contains(out,
		"warn  site: there is no user branch — masque-proxy invite branch -c FILE\n") {
		t.Errorf("got\n%s", out)
	}
	do(t, 0, "invite", "branch", "-c", file, "-o", filepath.Join(t.TempDir(), "branch.toml"))
	if out := said(); strings.Contains(out, "site:") {
		t.Errorf("got\n%s", out)
	}
}

func TestPoolInUse(t *testing.T) {
	addrs := []net.Addr{
		&net.IPNet{IP: net.IPv4(10, 77, 3, 4).To4(), Mask: net.CIDRMask(16, 32)},
		&net.IPNet{IP: net.ParseIP("2001:db8::1"), Mask: net.CIDRMask(64, 128)},
	}
	var c doctor.Report
	checkPool(&c, addrs, netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64"),
		netip.Prefix{})
	var out bytes.Buffer
	if err := c.Finish(&out, false); err == nil {
		t.Error("a pool in use passes")
	}
	want := "fail  pool: 10.77.0.0/24 overlaps 10.77.3.4/16 of this host — choose a network that nobody uses\n" +
		"ok    pool: fd77::/64 is not used on this host\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
}

func TestSameSockets(t *testing.T) {
	for _, test := range []struct {
		a, b []string
		same bool
	}{
		{[]string{"[::]:443"}, []string{":443"}, true},
		{[]string{"[::]:443"}, []string{"[::]:8443"}, false},
		{[]string{"192.0.2.1:443", "[2001:db8::1]:443"},
			[]string{"[2001:DB8:0::1]:443", "192.0.2.1:443"}, true},
		{[]string{"192.0.2.1:443"}, []string{"192.0.2.1:443", "192.0.2.2:443"}, false},
	} {
		t.Run(strings.Join(test.b, " "), func(t *testing.T) {
			if same := slices.Equal(canonical(test.a), canonical(test.b)); same != test.same {
				t.Errorf("%v and %v: %v", test.a, test.b, same)
			}
		})
	}
}
