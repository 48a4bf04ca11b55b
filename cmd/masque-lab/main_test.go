package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"masquevpn/internal/cli"
	"masquevpn/internal/fault"
	"masquevpn/internal/lab"
)

func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "masque-client", "masque-proxy":
		fake()
	}
	lab.Enter()
	os.Exit(m.Run())
}

// fake is a masque-proxy whose disk is full.
func fake() {
	for i := range 2 * tailLines {
		fmt.Fprintln(os.Stderr, "line", i)
	}
	fmt.Fprintln(os.Stderr, filepath.Base(os.Args[0])+": the disk is full: make room")
	os.Exit(int(fault.Failure))
}

// execute runs a command line.
func execute(args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errs)
	code = cli.Main(root)
	return out.String(), errs.String(), code
}

// useFakes adds failing programs to PATH.
func useFakes(t *testing.T) {
	t.Helper()
	if err := lab.CheckTUN(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"masque-client", "masque-proxy"} {
		if err := os.Symlink(exe, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

func TestFailureExplains(t *testing.T) {
	useFakes(t)
	dir := t.TempDir()
	stdout, stderr, code := execute("demo", "--artifacts", dir)
	if code != int(fault.Failure) {
		t.Errorf("exit code %d, want %d", code, fault.Failure)
	}
	for _, want := range []string{
		"Step 3 failed: masque-proxy init",
		"the disk is full: make room (masque-proxy, exit code 1)",
		fmt.Sprintf("line %d\n", 2*tailLines-1),
		"kept in " + dir,
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in:\n%s", want, stdout)
		}
	}
	if strings.Contains(stdout, "line 0\n") {
		t.Errorf("the whole log is shown:\n%s", stdout)
	}
	if strings.Count(stderr, "\n") != 1 ||
		!strings.Contains(stderr, "the disk is full: make room") {
		t.Errorf("standard error: %q", stderr)
	}
}

func TestFailureAsJSON(t *testing.T) {
	useFakes(t)
	dir := t.TempDir()
	stdout, _, code := execute("run", "remote-access", "--json", "--artifacts", dir)
	if code != int(fault.Failure) {
		t.Errorf("exit code %d, want %d", code, fault.Failure)
	}
	var got struct {
		Schema    int
		Scenario  string
		OK        bool
		Steps     []struct{ OK bool }
		Error     string
		Logs      []struct{ Tail []string }
		Artifacts string
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatalf("%v:\n%s", err, stdout)
	}
	if got.Schema != 1 || got.Scenario != "remote-access" || got.OK || got.Error == "" ||
		got.Artifacts != dir ||
		len(got.Logs) != 1 || len(got.Logs[0].Tail) != tailLines {
		t.Errorf("got %+v", got)
	}
	if diff := cmp.Diff([]struct{ OK bool }{{true}, {true}, {false}}, got.Steps); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}

// TestScenarios runs the real programs.
func TestScenarios(t *testing.T) {
	if err := lab.CheckTUN(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir, "masquevpn/cmd/masque-client",
		"masquevpn/cmd/masque-proxy")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", t.TempDir())
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			stdout, stderr, code := execute("run", s.name)
			if code != 0 {
				t.Errorf("exit code %d\n%s\n%s", code, stdout, stderr)
			}
			left, err := filepath.Glob(filepath.Join(os.TempDir(), "*"))
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestArtifactsNotEmpty(t *testing.T) {
	useFakes(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := execute("demo", "--artifacts", dir); code != int(fault.Usage) ||
		!strings.Contains(stderr, "not empty") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestProgramsMissing(t *testing.T) {
	if err := lab.CheckTUN(); err != nil {
		t.Skip(err)
	}
	t.Setenv("PATH", t.TempDir())
	_, stderr, code := execute("demo")
	if code != int(fault.Failure) || !strings.Contains(stderr, "make build") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"run"}, {"run", "no-such"}, {"demo", "extra"},
		{"demo", "--no-such"}, {"list", "--log-level", "loud"}, {"no-such"}} {
		t.Run("arguments "+strings.Join(args, " "), func(t *testing.T) {
			stdout, stderr, code := execute(args...)
			if code != int(fault.Usage) || stdout != "" || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%v: exit code %d, %q, %q", args, code, stdout, stderr)
			}
		})
	}
}

func TestList(t *testing.T) {
	stdout, _, code := execute("list")
	if code != 0 || strings.Count(stdout, "\n") != len(scenarios) {
		t.Errorf("exit code %d:\n%s", code, stdout)
	}
	stdout, _, code = execute("list", "--json")
	var got []struct{ Name, About string }
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != 0 ||
		len(got) != len(scenarios) || got[0].Name != scenarios[0].name {
		t.Errorf("exit code %d, %v:\n%s", code, err, stdout)
	}
}

func TestChangeConfig(t *testing.T) {
	name := filepath.Join(t.TempDir(), "proxy.toml")
	if err := os.WriteFile(name, []byte("name = \"x\" # comment\n[nat]\nmasquerade = true\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	err := changeConfig(name, []func(map[string]any){advertise("192.0.2.0/24"), advertise("2001:db8::/32")})
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := "name = 'x'\n\n[nat]\nmasquerade = true\n\n[routes]\nadvertise = ['2001:db8::/32']\n"
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB",
		33554432: "33.6 MB", 1 << 63: "9.2 EB"} {
		t.Run(want, func(t *testing.T) {
			if got := byteCount(n); got != want {
				t.Errorf("%d: %s, want %s", n, got, want)
			}
		})
	}
}
