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

// crashChild is an environment variable with the crash of crashMain in JSON. It
// makes the test binary run crashMain.
const crashChild = "ROUTING_TEST_CRASH"

// crash describes the Manager of a process that is killed.
type crash struct {
	Config Config
	State  State
}

// crashMain opens a TUN device and a Manager in the current namespace, prints
// "ready", and waits until it is killed.
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
	defer tun.Close() // keeps the device referenced
	c.Config.Logger = slog.New(slog.DiscardHandler)
	m, err := Open(c.Config)
	fail(err)
	fail(m.Apply(c.State))
	fmt.Println("ready")
	select {}
}

// startAndKill runs a process with a Manager, calls during, and kills the
// process with SIGKILL.
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
		logged string                             // part of the log of the second process
		sysctl string                             // ip_forward after Open in the second process
	}{
		{"journal intact", func(*testing.T, string) {}, "left behind by a dead process", "0"},
		{"journal deleted", func(t *testing.T, journal string) {
			if err := os.Remove(journal); err != nil {
				t.Fatal(err)
			}
		}, "left behind by a dead process", "1"},
		{"journal truncated", func(t *testing.T, journal string) {
			if err := os.Truncate(journal, 40); err != nil {
				t.Fatal(err)
			}
		}, "journal ignored", "1"},
		{"journal empty", func(t *testing.T, journal string) {
			if err := os.Truncate(journal, 0); err != nil {
				t.Fatal(err)
			}
		}, "journal ignored", "1"},
		{"journal without a format", func(t *testing.T, journal string) {
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
					t.Errorf("203.0.113.1 is routed to interface %d, not to the tunnel", got)
				}
			})
			after := h.snapshot()
			for _, object := range []string{"rule", "rule6", "ruleset", "route", "route6"} {
				if after[object] == before[object] {
					t.Errorf("the killed process left nothing in %s", object)
				}
			}
			tt.mangle(t, c.Journal)

			var log logtest.Buffer
			c.Logger = log.Logger()
			_, closeTUN := h.tun("masque0")
			m := h.open(c)
			if !strings.Contains(log.String(), tt.logged) {
				t.Errorf("no %q in the log:\n%s", tt.logged, log.String())
			}
			for _, line := range []string{
				"delete IPv4 rule 9549", "delete IPv6 rule 9741",
				"delete nftables table inet masque-one", "delete 1 IPv4 routes",
			} {
				if !strings.Contains(log.String(), line) {
					t.Errorf("no %q in the log:\n%s", line, log.String())
				}
			}
			if got := h.readSysctl("net/ipv4/ip_forward"); got != tt.sysctl {
				t.Errorf("ip_forward after Open: %s, want %s", got, tt.sysctl)
			}
			h.apply(m, fullState())
			h.close(m)
			closeTUN()
			if tt.sysctl == "1" { // the previous values are lost
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

// The next process restores an interface that remained after its process was
// killed.
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
				c.Interface = "masque1" // the next process may use another interface
			}
			m = h.open(c)
			if withJournal {
				h.wantSnapshot(before)
			}
			if rules := h.ip("rule"); strings.Contains(rules, "9549:") {
				t.Errorf("rules of the killed process remain:\n%s", rules)
			}
			h.apply(m, fullState())
			h.close(m)
			if withJournal {
				h.wantSnapshot(before)
			}
		})
	}
}

// An instance removes the rules of interfaces that no longer exist, but not the
// rules of instances that run.
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
	for _, object := range []string{"rule", "rule6", "route", "route6"} {
		if now[object] != alone[object] {
			t.Errorf("%s is\n%s\nwant\n%s", object, now[object], alone[object])
		}
	}
	h.close(live)
	closeLive()

	_, closeDead := h.tun("dead0")
	h.close(h.open(dead))
	closeDead()
	h.wantSnapshot(before)
}
