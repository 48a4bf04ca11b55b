package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/pki"
)

// do runs a command line in this process and checks its exit code. It returns
// the standard output and the last line of standard error.
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

func TestNames(t *testing.T) {
	o := &options{configDir: "/etc/masque"}
	for _, test := range []struct{ arg, name, file string }{
		{"home", "home", "/etc/masque/home.toml"},
		{"home.toml", "home", "home.toml"},
		{"./x/home.toml", "home", "./x/home.toml"},
		{"/a/b", "b", "/a/b"},
		{"alice@example.org", "alice@example.org", "/etc/masque/alice@example.org.toml"},
	} {
		t.Run(test.arg, func(t *testing.T) {
			name, file, err := o.resolve(test.arg)
			if err != nil || name != test.name || file != test.file {
				t.Errorf("%s: %q, %q, %v", test.arg, name, file, err)
			}
		})
	}
	for _, arg := range []string{"proxy", "/etc/masque/proxy.toml", "", "..", "a b", ".toml", "/"} {
		t.Run("not "+arg, func(t *testing.T) {
			if name, _, err := o.resolve(arg); err == nil {
				t.Errorf("%q names %q", arg, name)
			} else if e, ok := errors.AsType[*fault.Error](err); !ok || e.Kind != fault.Usage {
				t.Errorf("%q: %v", arg, err)
			}
		})
	}
}

// TestLoadErrors has one row per error in a configuration or in a file that it
// names. All commands refuse the configuration with exit code 2 before they do
// anything else.
func TestLoadErrors(t *testing.T) {
	ca, caPair, err := pki.NewAuthority("CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	alice, err := ca.Client("alice", time.Now(), pki.ClientValidity)
	if err != nil {
		t.Fatal(err)
	}
	bob, err := ca.Client("bob", time.Now(), pki.ClientValidity)
	if err != nil {
		t.Fatal(err)
	}
	inline := func(key string, data []byte) string {
		return key + " = '''\n" + string(data) + "'''\n"
	}
	for _, test := range []struct {
		name string
		text string // contents of home.toml, below the proxy
		mode os.FileMode
		want string // part of the last line; %s is the folder
	}{
		{"unknown key", "nonsense = 1\n", 0o600,
			"%s/home.toml:2: nonsense: unknown key; remove it"},
		{"two problems", "a = 1\nb = 2\n", 0o600,
			"%s/home.toml has 2 problems: correct the lines above"},
		{"inline token that others read", "[auth]\ntoken = \"t\"\n", 0o644,
			"%s/home.toml holds a secret and can be read by others: chmod 600 %s/home.toml"},
		{"inline key that others read",
			"[tls]\n" + inline("cert_pem", alice.Cert) + inline("key_pem", alice.Key), 0o644,
			"chmod 600 %s/home.toml"},
		{"key file that others read", "[tls]\ncert = \"a.crt\"\nkey = \"open.key\"\n", 0o644,
			"%s/home.toml:4: tls.key = \"open.key\": is a secret that others can read; chmod 600 %s/open.key"},
		{"token file that others read", "[auth]\ntoken_file = \"open.key\"\n", 0o644,
			"%s/home.toml:3: auth.token_file = \"open.key\": is a secret that others can read; chmod 600 %s/open.key"},
		{"no token file", "[auth]\ntoken_file = \"none\"\n", 0o644,
			"%s/home.toml:3: auth.token_file = \"none\": open %s/none: no such file or directory; correct the name, or put the file there"},
		{"empty token file", "[auth]\ntoken_file = \"empty\"\n", 0o644,
			"auth.token_file = \"empty\": the file is empty; write the token into it"},
		{"token with a line break", "[auth]\ntoken = \"a\\nb\"\n", 0o600,
			"%s/home.toml:3: auth.token: a token has no spaces, line breaks or characters beyond ASCII; write it as it was given to you"},
		{"no CA file", "[tls]\nca = \"none\"\n", 0o644,
			"%s/home.toml:3: tls.ca = \"none\": open %s/none"},
		{"garbage for a CA", "[tls]\nca_pem = \"x\"\n", 0o644,
			"tls.ca_pem = \"x\": holds no certificate in PEM form; write certificates in PEM form"},
		{"garbage for a certificate", "[tls]\ncert = \"empty\"\nkey = \"a.key\"\n", 0o644,
			"tls.cert = \"empty\": holds no certificate in PEM form"},
		{"garbage for a key", "[tls]\ncert = \"a.crt\"\nkey = \"empty\"\n", 0o644,
			"tls.key = \"empty\": holds no private key in PEM form"},
		{"another one's key", "[tls]\ncert = \"a.crt\"\n" + inline("key_pem", bob.Key), 0o600,
			"%s/home.toml:4: tls.key_pem: not the key of the certificate; put certificate and key of one pair together"},
		{"own address advertised", "[addresses]\nstatic = [\"10.1.0.9/32\"]\n[routes]\nadvertise = [\"10.1.0.0/24\"]\n", 0o644, "%s/home.toml:5: routes.advertise = [\"10.1.0.0/24\"]: 10.1.0.0/24 holds 10.1.0.9/32, an address of the tunnel itself"},
		{"kill switch for nothing", "[kill_switch]\nenabled = true\nallow = [\"0.0.0.0/0\"]\n",
			0o600, "%s/home.toml:4: kill_switch.allow[0] = \"0.0.0.0/0\": allows everything of its family; name the networks"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, f := range map[string]struct {
				data []byte
				mode os.FileMode
			}{
				"home.toml": {[]byte("proxy = \"vpn.example.org\"\n" + test.text), test.mode},
				"a.crt":     {alice.Cert, 0o644}, "a.key": {alice.Key, 0o600},
				"open.key": {alice.Key, 0o644},
				"ca.crt":   {caPair.Cert, 0o644}, "empty": {nil, 0o600},
			} {
				if err := os.WriteFile(filepath.Join(dir, name), f.data, f.mode); err != nil {
					t.Fatal(err)
				}
			}
			file := filepath.Join(dir, "home.toml")
			runDir := filepath.Join(t.TempDir(), "run")
			want := strings.ReplaceAll(test.want, "%s", dir)
			// The message quotes names as they are in the file.
			for _, args := range [][]string{{"run", "-c", file}, {"up", file},
				{"up", "home", "--config-dir", dir}} {
				if _, last := do(t, 2,
					append(args, "--run-dir", runDir)...); !strings.Contains(last, want) {
					t.Errorf("%v printed\n%s\nwant\n%s", args, last, want)
				}
			}
			if out, last := do(t, 2, "check", "-c", file, "--run-dir",
				runDir); !strings.Contains(out, "fail  configuration: ") ||
				!strings.Contains(last, "checks failed") {
				t.Errorf("check printed\n%s%s", out, last)
			}
			if _, err := os.Stat(runDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the run directory was made: %v", err)
			}
		})
	}
}

// Errors of package client have the line of the file too.
func TestBadProxy(t *testing.T) {
	file := filepath.Join(t.TempDir(), "home.toml")
	for _, proxy := range []string{"http://a.example/{target}/{ipproto}",
		"https://a.example/{+target}", "https://a@b.example/x"} {
		t.Run(proxy, func(t *testing.T) {
			if err := os.WriteFile(file, []byte("# mine\nproxy = \""+proxy+"\"\n"),
				0o600); err != nil {
				t.Fatal(err)
			}
			if _, last := do(t, 2, "forward-udp", "5300", "a.example:53", "-c",
				file); !strings.Contains(last, file+":2: proxy = \""+proxy+"\": ") {
				t.Errorf("%s: forward-udp printed %s", proxy, last)
			}
			if _, last := do(t, 2, "run", "-c", file); !strings.Contains(last,
				file+":2: proxy = \""+proxy+"\": ") {
				t.Errorf("got %s", last)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "a command is missing"},
		{[]string{"run"}, `required flag(s) "config" not set: see 'masque-client run --help'`},
		{[]string{"up"}, "accepts 1 arg(s), received 0"},
		{[]string{"up", "a", "b"}, "accepts 1 arg(s), received 2"},
		{[]string{"down"}, "accepts 1 arg(s)"},
		{[]string{"status", "a", "b"}, "accepts at most 1 arg(s)"},
		{[]string{"wait", "a", "--for", "rain"},
			`--for "rain" is not known: write connected or disconnected`},
		{[]string{"up", "a", "--timeout", "soon"}, "invalid argument"},
		{[]string{"up", "a", "--timeout", "-1s"}, "it cannot be negative"},
		{[]string{"down", "a", "--timeout", "-1s"}, "it cannot be negative"},
		{[]string{"wait", "a", "--for", "connected", "--timeout", "-1s"}, "it cannot be negative"},
		{[]string{"run", "-c", "proxy.toml"}, `a tunnel cannot be named "proxy"`},
		{[]string{"run", "-c", "/none/home.toml"}, "/none/home.toml does not exist: copy the file"},
		{[]string{"run", "-c", "/dev"}, "read /dev: is a directory: name another one"},
		{[]string{"up", "/dev/zero"}, "read /dev/zero: file too large: name another one"},
		{[]string{"forward-udp", "5300", "-c", "/none/home.toml"}, "accepts 2 arg(s), received 1"},
		{[]string{"forward-udp", "5300", "a.example:53"}, `required flag(s) "config" not set`},
		{[]string{"forward-udp", "5300", "a.example:53", "-c", "/none/home.toml"},
			"/none/home.toml does not exist: copy the file"},
		{[]string{"run", "-c", "/none/home.toml", "--notify-fd", "0"},
			"--notify-fd 0 is not a pipe"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			if _, last := do(t, 2, test.args...); !strings.Contains(last, test.want) {
				t.Errorf("%v: got %s, want %s", test.args, last, test.want)
			}
		})
	}
}

// fake is a tunnel whose state the test sets.
type fake struct {
	mu      sync.Mutex
	status  client.Status
	changed chan struct{}
	posted  chan struct{} // closed by a request to stop
}

// startFake serves a fake tunnel until the test ends.
func startFake(t *testing.T, runDir, name, state string) *fake {
	t.Helper()
	f := &fake{changed: make(chan struct{}), posted: make(chan struct{})}
	f.status = client.Status{Name: name, State: state, Since: time.Now(),
		Drops: map[string]uint64{"too_big": 3}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		control.Reply(w, f.status)
	})
	mux.HandleFunc("GET "+watchPath, func(w http.ResponseWriter, r *http.Request) {
		var changed chan struct{}
		control.Stream(w, r, func(ctx context.Context) (any, bool) {
			if changed != nil {
				select {
				case <-changed:
				case <-ctx.Done():
					return nil, false
				}
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			changed = f.changed
			return f.status, f.status.State != client.StateStopping
		})
	})
	mux.HandleFunc("POST "+stopPath, func(w http.ResponseWriter, _ *http.Request) {
		close(f.posted)
		control.Reply(w, stopped{Error: "the route stayed"})
	})
	lock, err := control.Acquire(runDir, name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := control.Serve(runDir, name, mux, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	release := sync.OnceValue(lock.Release)
	go func() { // ends after a request to stop
		select {
		case <-f.posted:
			_ = release()
		case <-t.Context().Done():
		}
	}()
	t.Cleanup(func() {
		f.set(client.StateStopping, "") // ends streams
		if err := errors.Join(s.Close(), release()); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fake) set(state, reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.State, f.status.Reason = state, reason
	close(f.changed)
	f.changed = make(chan struct{})
}

func TestStatus(t *testing.T) {
	runDir := t.TempDir()
	if _, last := do(t, 3, "status", "--run-dir", runDir); !strings.Contains(last,
		"no tunnel is running: start one with") {
		t.Errorf("without tunnels: %s", last)
	}
	home := startFake(t, runDir, "home", client.StateConnected)
	out, _ := do(t, 0, "status", "home", "--run-dir", runDir)
	for _, want := range []string{"name        home\n", "state       connected for 0s\n",
		"dropped     3 too big\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the status lacks %q:\n%s", want, out)
		}
	}
	out, _ = do(t, 0, "status", "--json", "--run-dir", runDir)
	var s client.Status
	if err := json.Unmarshal([]byte(out), &s); err != nil || s.Name != "home" ||
		strings.Count(out, "\n") != 1 {
		t.Errorf("as JSON: %v\n%s", err, out)
	}

	startFake(t, runDir, "work", client.StateConnected)
	startFake(t, runDir, "proxy", client.StateConnected) // the proxy on this host is not a tunnel
	out, _ = do(t, 0, "status", "--run-dir", runDir)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 ||
		!strings.HasPrefix(lines[1], "home") || !strings.HasPrefix(lines[2], "work") {
		t.Errorf("the table is\n%s", out)
	}
	home.set(client.StateReconnecting, "the\x1b[2J proxy does not answer")
	for _, args := range [][]string{{"status"}, {"status", "home"}, {"status", "home", "--json"}} {
		out, last := do(t, 3, append(args, "--run-dir", runDir)...)
		if !strings.Contains(last, "home: reconnecting (the [2J proxy does not answer): wait for it with") || strings.ContainsRune(out, '\x1b') {
			t.Errorf("%v: printed %s\n%s", args, last, out)
		}
	}
	if _, last := do(t, 3, "status", "none", "--run-dir", runDir); !strings.Contains(last,
		"none: not running: start it with: masque-client up none") {
		t.Errorf("not running: %s", last)
	}
}

// lineWriter sends each written line to a channel.
type lineWriter chan string

func (w lineWriter) Write(b []byte) (int, error) {
	w <- strings.TrimSpace(string(b))
	return len(b), nil
}

func TestStatusWatch(t *testing.T) {
	runDir := t.TempDir()
	f := startFake(t, runDir, "home", client.StateConnecting)
	lines := make(lineWriter)
	ended := make(chan error, 1)
	o := &options{Globals: &cli.Globals{RunDir: runDir}}
	go func() { ended <- o.watch(t.Context(), lines, []string{"home"}, showLine) }()
	if got := <-lines; !strings.HasSuffix(got, "home  connecting") {
		t.Errorf("first: %s", got)
	}
	f.set(client.StateReconnecting, "lost")
	if got := <-lines; !strings.HasSuffix(got, "home  reconnecting  lost") {
		t.Errorf("then: %s", got)
	}
	f.set(client.StateStopping, "") // the stream ends
	if e, ok := errors.AsType[*fault.Error](<-ended); !ok || e.Kind != fault.NotConnected {
		t.Errorf("ended with %v", e)
	}
}

func TestWait(t *testing.T) {
	runDir := t.TempDir()
	o := &options{Globals: &cli.Globals{RunDir: runDir}}
	wait := func(ctx context.Context, what string) <-chan error {
		ended := make(chan error, 1)
		go func() { ended <- o.wait(ctx, "home", what) }()
		return ended
	}
	// Before it runs.
	if err := <-wait(t.Context(), forDisconnected); err != nil {
		t.Errorf("disconnected: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if e, ok := errors.AsType[*fault.Error](<-wait(short, forConnected)); !ok ||
		e.Kind != fault.NotConnected {
		t.Errorf("connected: %v", e)
	}
	early := wait(t.Context(), forConnected)

	f := startFake(t, runDir, "home", client.StateConnecting)
	long, cancel := context.WithCancel(t.Context())
	late := wait(long, forConnected)
	f.set(client.StateConnecting, "no answer")
	f.set(client.StateConnected, "")
	for _, ended := range []<-chan error{early, late} {
		if err := <-ended; err != nil {
			t.Errorf("connected: %v", err)
		}
	}
	gone := wait(t.Context(), forDisconnected)
	f.set(client.StateReconnecting, "lost")
	if err := <-gone; err != nil {
		t.Errorf("disconnected: %v", err)
	}
	cancel()
	if e, ok := errors.AsType[*fault.Error](<-wait(long, forConnected)); !ok ||
		e.Kind != fault.Failure {
		t.Errorf("interrupted: %v", e)
	}
	_, last := do(t, 5, "wait", "home", "--for", "connected", "--timeout", "1s",
		"--run-dir", runDir)
	if !strings.Contains(last, "home is not connected in time: reconnecting (lost): check the proxy") {
		t.Errorf("in vain: %s", last)
	}
}

func TestDownReportsFailures(t *testing.T) {
	runDir := t.TempDir()
	startFake(t, runDir, "home", client.StateConnected)
	if _, last := do(t, 1, "down", "home", "--run-dir", runDir); !strings.Contains(last,
		"home stopped with an error (the route stayed)") {
		t.Errorf("got %s", last)
	}
	if _, last := do(t, 3, "down", "work", "--run-dir", runDir); !strings.Contains(last,
		"work: not running") {
		t.Errorf("got %s", last)
	}
}

// After a timeout, the exit code of `up` is the one of the last failure.
func TestUpLate(t *testing.T) {
	for _, test := range []struct {
		name   string
		events []event
		code   fault.Kind
		want   string
	}{
		{"nothing is known", []event{{Event: eventStarted}}, fault.Unreachable,
			"check the proxy, or give it more time"},
		{"no answer", []event{{Event: eventState, State: client.StateConnecting,
			Reason: "no answer", Code: fault.Unreachable}}, fault.Unreachable,
			"(no answer): check the proxy"},
		{"it fails each time", []event{{Event: eventState, State: client.StateConnecting,
			Reason: "malformed capsule", Code: fault.Failure}}, fault.Failure,
			"(malformed capsule): see /run/x/home.log"},
		{"between two failures", []event{{Event: eventState, State: client.StateConnecting,
			Reason: "malformed capsule", Code: fault.Failure},
			{Event: eventState, State: client.StateConnecting, Code: fault.Failure}}, fault.Failure,
			"see /run/x/home.log"},
	} {
		t.Run(test.name, func(t *testing.T) {
			read, write, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer read.Close()
			defer write.Close()
			for _, e := range test.events {
				if err := json.NewEncoder(write).Encode(e); err != nil {
					t.Fatal(err)
				}
			}
			b := &background{options: &options{Globals: &cli.Globals{RunDir: "/run/x"}},
				name: "home", events: read}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if e := b.await(ctx, true); e == nil || e.Kind != test.code ||
				!strings.Contains(e.Error(), test.want) {
				t.Errorf("got %v, want code %d and %q", e, test.code, test.want)
			}
		})
	}
}
