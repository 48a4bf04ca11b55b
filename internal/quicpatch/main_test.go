package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const source = `package p

const queueLen = 32

type conn struct{ n int }

func (c *conn) send() int { return c.n + queueLen }

func send() int { return 1 }
`

func TestApply(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit edit
		want string // in the result, or in the error
	}{
		{"constant", edit{decl: "queueLen", from: "32", to: "64"}, "queueLen = 64"},
		{"type", edit{decl: "conn", from: "n int", to: "n, m int"}, "n, m int"},
		{"method", edit{decl: "conn.send", from: "c.n", to: "c.m"}, "return c.m + queueLen"},
		{"function", edit{decl: "send", from: "1", to: "2"}, "return 2"},
		{"no such declaration", edit{decl: "receive", from: "1", to: "2"}, "0 declarations of receive"},
		{"not in it", edit{decl: "send", from: "c.n", to: "c.m"}, "0 times"},
		{"twice in it", edit{decl: "conn.send", from: "n", to: "m"}, "times, want 1"},
	} {
		out, err := tc.edit.apply([]byte(source))
		got := string(out)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, tc.want) {
			t.Errorf("%s: got %q, want %q in it", tc.name, got, tc.want)
		}
	}
}

// All edits apply to the version that go.mod names, once: a second run finds nothing to edit, and writes nothing.
func TestEdits(t *testing.T) {
	cmd := exec.Command("go", "list", "-mod=mod", "-m", "-f", "{{.Version}} {{.Dir}}", module)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	have, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if have != version {
		t.Fatalf("go.mod has %s %s, the edits are for %s", module, have, version)
	}
	top := t.TempDir()
	root := filepath.Join(top, "vendor", filepath.FromSlash(module))
	if err := os.CopyFS(root, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(top, "vendor", "modules.txt")
	if err := os.WriteFile(list, []byte("# "+module+" v0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(top); err == nil || !strings.Contains(err.Error(), "not the version in go.mod") {
		t.Errorf("with another version: %v", err)
	}
	if err := os.WriteFile(list, []byte("# "+module+" "+version+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(top); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(root, "connection.go"))
	if err != nil {
		t.Fatal(err)
	}
	if err := run(top); err == nil {
		t.Error("the edits apply twice")
	}
	after, err := os.ReadFile(filepath.Join(root, "connection.go"))
	if err != nil || string(after) != string(before) {
		t.Error("a run that failed has written")
	}
}
