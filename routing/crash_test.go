package routing

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"masquevpn/internal/logtest"
)

// crashChild is the environment variable that makes the test binary a process
// to be killed: it holds what crashMain does.
const crashChild = "ROUTING_TEST_CRASH"

type crash struct {
	Config Config
	State  State
}

// crashMain opens a TUN device and a Manager in the namespace it was started
// in, says so, and waits for the end.
func crashMain() {
	var c crash
	fail := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	fail(json.Unmarshal([]byte(os.Getenv(crashChild)), &c))
	tun, err := makeTUN(c.Config.Interface)
	fail(err)
	defer tun.Close() // keeps it open
	c.Config.Logger = slog.New(slog.DiscardHandler)
	m, err := Open(c.Config)
	fail(err)
	fail(m.Apply(c.State))
	fmt.Println("ready")
	select {}
}

// startAndKill runs a process with a Manager and kills it with SIGKILL. While
// it is there, during is called.
func (h *host) startAndKill(c Config, s State, during func()) {
	h.t.Helper()
	b, err := json.Marshal(crash{c, s})
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crashChild+"="+string(b))
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	h.do(func() {
		if err := cmd.Start(); err != nil {
			h.t.Fatal(err)
		}
	})
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		h.t.Fatalf("child: %q, %v", line, err)
	}
	during()
}

func TestKilled(t *testing.T) {
	state := fullState()
	state.Forward, state.Masquerade = true, prefixes("10.77.0.0/24")
	for _, tt := range []struct {
		name   string
		mangle func(t *testing.T, journal string) // between the two processes
		logged string
		sysctl string // ip_forward after the second has opened
	}{
		{"journal intact", func(*testing.T, string) {}, "left behind by a dead process", "0"},
		{"journal gone", func(t *testing.T, journal string) {
			if err := os.Remove(journal); err != nil {
				t.Fatal(err)
			}
		}, "left behind by a dead process", "1"},
		{"journal cut", func(t *testing.T, journal string) {
			if err := os.Truncate(journal, 40); err != nil {
				t.Fatal(err)
			}
		}, "journal ignored", "1"},
		{"journal empty", func(t *testing.T, journal string) {
			if err := os.Truncate(journal, 0); err != nil {
				t.Fatal(err)
			}
		}, "journal ignored", "1"},
		{"journal of something else", func(t *testing.T, journal string) {
			if err := os.WriteFile(journal, []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "journal ignored", "1"},
		{"journal of an earlier boot", func(t *testing.T, journal string) {
			b, err := os.ReadFile(journal)
			if err != nil {
				t.Fatal(err)
			}
			var rec record
			if err := json.Unmarshal(b, &rec); err != nil {
				t.Fatal(err)
			}
			b = []byte(strings.Replace(string(b), rec.Boot, "another boot", 1))
			if err := os.WriteFile(journal, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "earlier boot", "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			before := h.snapshot()
			c := Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
				Journal: filepath.Join(t.TempDir(), "one.json")}
			h.startAndKill(c, state, func() {
				if _, err := h.tryOpen(c); !errors.Is(err, ErrInUse) {
					t.Errorf("Open beside a live process: %v, want ErrInUse", err)
				}
				if got := h.lookup("203.0.113.1", 0); got != h.index("masque0") {
					t.Errorf("lookup leads to interface %d, not to the tunnel", got)
				}
			})
			after := h.snapshot()
			for _, what := range []string{"rule", "rule6", "ruleset", "route", "route6"} {
				if after[what] == before[what] {
					t.Errorf("%s is as before: the crash left nothing there", what)
				}
			}
			tt.mangle(t, c.Journal)

			var log logtest.Buffer
			c.Logger = log.Logger()
			_, closeTUN := h.tun("masque0")
			m := h.open(c)
			if !strings.Contains(log.String(), tt.logged) {
				t.Errorf("log says nothing of %q:\n%s", tt.logged, log.String())
			}
			for _, thing := range []string{
				"delete IPv4 rule 9549", "delete IPv6 rule 9741",
				"delete nftables table inet masque-one", "delete 1 IPv4 routes",
			} {
				if !strings.Contains(log.String(), thing) {
					t.Errorf("log says nothing of %q:\n%s", thing, log.String())
				}
			}
			if got := h.readSysctl("net/ipv4/ip_forward"); got != tt.sysctl {
				t.Errorf("ip_forward after Open: %s, want %s", got, tt.sysctl)
			}
			h.apply(m, fullState())
			h.close(m)
			closeTUN()
			if tt.sysctl == "1" { // nobody knows any more what it was
				h.sysctl("net/ipv4/ip_forward", "0")
				h.sysctl("net/ipv6/conf/all/forwarding", "0")
				h.sysctl("net/ipv4/conf/all/src_valid_mark", "0")
				h.sysctl("net/ipv4/conf/all/send_redirects", "1")
				for path := range before {
					if strings.HasSuffix(path, "/accept_ra") {
						delete(before, path)
					}
				}
			}
			h.wantSnapshot(before)
		})
	}
}

// An interface that outlives the process keeps addresses, MTU and routes.
func TestKilledWithPersistentInterface(t *testing.T) {
	for _, withJournal := range []bool{true, false} {
		t.Run(fmt.Sprintf("journal=%t", withJournal), func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			h.tun("masque1")
			before := h.snapshot()
			c := Config{Instance: "one", Interface: "masque0", Mark: DefaultMark}
			if withJournal {
				c.Journal = filepath.Join(t.TempDir(), "one.json")
			}
			m := h.open(c)
			h.apply(m, fullState())
			h.abandon(m)
			if withJournal {
				c.Interface = "masque1" // the next one may use another
			}
			m = h.open(c)
			if withJournal {
				h.wantSnapshot(before)
			}
			if rules := h.ip("rule"); strings.Contains(rules, "9549:") {
				t.Errorf("rules stayed:\n%s", rules)
			}
			h.apply(m, fullState())
			h.close(m)
			if withJournal {
				h.wantSnapshot(before)
			}
		})
	}
}

// Rules of an interface that is gone are of no use to anybody: another instance
// removes them. Those of live ones stay.
func TestOtherInstances(t *testing.T) {
	h := newHost(t)
	h.underlay()
	before := h.snapshot()
	dir := t.TempDir()
	_, closeLive := h.tun("live0")
	live := h.open(Config{Instance: "live", Interface: "live0", Mark: DefaultMark,
		Journal: filepath.Join(dir, "live.json")})
	h.apply(live, State{Addresses: prefixes("10.77.1.2/32"), Routes: prefixes("10.0.0.0/8")})
	alone := h.snapshot()

	dead := Config{Instance: "dead", Interface: "dead0", Mark: DefaultMark,
		Journal: filepath.Join(dir, "dead.json")}
	h.startAndKill(dead, State{Addresses: prefixes("10.77.2.2/32"), Routes: prefixes("0.0.0.0/0"),
		Exclude: prefixes("10.1.0.0/16")}, func() {})
	_, closeThird := h.tun("third0")
	third := h.open(Config{Instance: "third", Interface: "third0", Mark: DefaultMark,
		Journal: filepath.Join(dir, "third.json")})
	h.close(third)
	closeThird()
	now := h.snapshot()
	for _, what := range []string{"rule", "rule6", "route", "route6"} {
		if now[what] != alone[what] {
			t.Errorf("%s is\n%s\nwant\n%s", what, now[what], alone[what])
		}
	}
	h.close(live)
	closeLive()

	_, closeDead := h.tun("dead0")
	h.close(h.open(dead))
	closeDead()
	h.wantSnapshot(before)
}
