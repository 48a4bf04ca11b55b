package test

import (
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

// For each mistake of a user, the program prints its own message, exits with
// its own code, and leaves the host unchanged.
func TestBadInput(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nenabled = false\n"})
	good := p.invite("alice")
	text, err := os.ReadFile(good)
	check(t, err)
	plain := strings.Replace(string(text), tunTable(), "", 1) // a row may have its own
	replace := func(pattern, with string) func(string) string {
		re := regexp.MustCompile(pattern)
		return func(s string) string {
			if !re.MatchString(s) {
				t.Fatalf("the client's file has no %q:\n%s", pattern, s)
			}
			return re.ReplaceAllLiteralString(s, with)
		}
	}
	add := func(line string) func(string) string {
		return func(s string) string { return line + "\n" + s }
	}
	addTable := func(table string) func(string) string {
		return func(s string) string { return s + "\n" + table + "\n" }
	}
	noCertificate := func(s string) string {
		s = replace(`(?s)cert_pem = '''.*?'''`, "")(s)
		return replace(`(?s)key_pem = '''.*?'''`, "")(s)
	}
	type mistake struct {
		name string
		edit func(string) string // edits the client's configuration
		mode os.FileMode         // file mode; 0: 0600
		wrap []string            // command that runs the program
		exit int
		want []string // in the last line of the output
	}
	try := func(tc mistake) {
		t.Run(tc.name, func(t *testing.T) {
			before := p.snapshot(p.Client)
			name := strings.ReplaceAll(tc.name, " ", "-")
			file := filepath.Join(t.TempDir(), name+".toml")
			edited := tc.edit(plain)
			mode := tc.mode
			if mode == 0 {
				mode = 0o600
			}
			check(t, os.WriteFile(file, []byte(edited), mode))
			check(t, os.Chmod(file, mode))
			args := append(append([]string{}, tc.wrap...), program("masque-client"), "run",
				"-c", file)
			c := p.Client.Command(p.ctx, args[0], args[1:]...)
			out, _ := c.CombinedOutput()
			line := lastLine(out)
			if c.ExitCode() != tc.exit {
				t.Errorf("exit code %d, want %d:\n%s", c.ExitCode(), tc.exit, out)
			}
			for _, s := range tc.want {
				if s = strings.ReplaceAll(s, "NAME", name); !strings.Contains(line, s) {
					t.Errorf("the last line does not contain %q: %s", s, line)
				}
			}
			p.wantUnchanged(p.Client, before)
		})
	}
	for _, tc := range []mistake{
		{name: "unknown key", edit: add(`prxy = "a"`), exit: 2,
			want: []string{"NAME.toml:1", "prxy"}},
		{name: "no TOML", edit: add(`proxy = `), exit: 2, want: []string{"NAME.toml:1"}},
		{name: "wrong type", edit: addTable("[tun]\nmtu = true"), exit: 2, want: []string{"mtu"}},
		{name: "bad template", edit: replace(`(?m)^proxy = .*$`, `proxy = "https://p/{+target}"`),
			exit: 2, want: []string{"proxy", "operator"}},
		{name: "readable by others", edit: add(""), mode: 0o644, exit: 2,
			want: []string{"NAME.toml", "chmod 600"}},
		{name: "missing secret", edit: replace(`(?m)^token = .*$`, `token_file = "no-such-file"`),
			exit: 2, want: []string{"no-such-file"}},
		{name: "wrong token", edit: func(s string) string {
			return replace(`(?m)^token = .*$`, `token = "guess"`)(noCertificate(s))
		}, exit: 4, want: []string{"credentials"}},
		{name: "unknown CA", edit: replace(`(?s)ca_pem = '''.*?'''`, ""), exit: 6,
			want: []string{"unknown authority"}},
		{name: "wrong name", edit: replace(`\[tls\]`, "[tls]\nserver_name = \"other.example\""),
			exit: 6, want: []string{"other.example"}},
		{name: "no name", edit: replace(`(?m)^proxy = .*$`, `proxy = "no-such-host.invalid"`),
			exit: 2, want: []string{"NAME.toml", "no-such-host.invalid", "is not in DNS"}},
		{name: "no such host", edit: replace(`(?m)^proxy = .*$`, `proxy = "no-such-host.example"`),
			exit: 5, want: []string{"no-such-host.example"}},
		{name: "closed port", edit: replace(`(?m)^proxy = .*$`, `proxy = "`+lab.ProxyName+`:9"`),
			exit: 5, want: []string{"9", "UDP"}},
		{
			name: "no privileges", edit: add(""), exit: 7, want: []string{"CAP_NET_ADMIN"},
			wrap: []string{"setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"},
		},
		{name: "target that is denied", edit: addTable("[scope]\ntarget = \"127.0.0.1\""), exit: 8,
			want: []string{"does not allow this request", "[scope]"}},
		{name: "name taken", edit: addTable("[tun]\nname = \"eth0\""), exit: 1,
			want: []string{"eth0"}},
	} {
		try(tc)
	}
	p.up(p.Client, good) // the unedited file works
	p.ping(p.Client, lab.TargetIPv4)
	p.down(p.Client, "alice")

	// Mistakes at the proxy.
	p.stopProxy()
	p.expire()
	p.startProxy()
	try(mistake{name: "expired", edit: add(""), exit: 6,
		want: []string{lab.ProxyName, "has expired or is not valid yet"}})
	p.stopProxy()
	p.must(p.Proxy, "masque-proxy", "init", "--renew", "--name", lab.ProxyName, p.dir)
	p.editProxyConfig(fmt.Sprintf("ipv6 = %q", pool6), "")
	p.startProxy()
	try(mistake{
		name: "no address of the family", edit: addTable("[addresses]\nrequest = [\"::/128\"]"),
		exit: 8,
		want: []string{"the proxy assigned no address", "operator"},
	})
}

// expire replaces the proxy's certificate by one that expired long ago.
func (p *pair) expire() {
	p.t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(p.dir, name))
		check(p.t, err)
		return b
	}
	ca, err := pki.ParseAuthority(pki.Pair{Cert: read("ca.crt"), Key: read("ca.key")})
	check(p.t, err)
	old, err := ca.Server(lab.ProxyName, nil, time.Now().AddDate(-5, 0, 0))
	check(p.t, err)
	check(p.t, os.WriteFile(filepath.Join(p.dir, "proxy.crt"), old.Cert, 0o644))
	check(p.t, os.WriteFile(filepath.Join(p.dir, "proxy.key"), old.Key, 0o600))
}
