package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"masquevpn/internal/cli"
	"masquevpn/internal/connectip"
)

// A run takes over the token of a run that was killed. If the file cannot be
// used, it makes a new token.
func TestInstance(t *testing.T) {
	const kept = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	write := func(text string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(text), 0o600) }
	}
	for _, tc := range []struct {
		name    string
		before  func(path string) error
		same    bool
		warning string
	}{
		{"nothing", func(string) error { return nil }, false, ""},
		{"a token", write(kept), true, ""},
		{"an empty file", write(""), false, "is damaged"},
		{"half a token", write(kept[:8]), false, "is damaged"},
		{"bytes of a disk that was full", write(strings.Repeat("\x00", 26)), false, "is damaged"},
		{"two lines", write(kept + "\n" + kept), false, "is damaged"},
		{"a long text", write(strings.Repeat("A", 5000)), false, "is damaged"},
		{"a folder", func(path string) error {
			return os.Mkdir(path, 0o700)
		}, false, "is not a file"},
		{"a pipe", func(path string) error {
			return unix.Mkfifo(path, 0o600)
		}, false, "is not a file"},
		{"a link", func(path string) error {
			return os.Symlink(filepath.Join(filepath.Dir(path), "elsewhere"), path)
		}, false, "too many levels of symbolic links"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := &options{Globals: &cli.Globals{RunDir: t.TempDir()}}
			elsewhere := filepath.Join(o.RunDir, "elsewhere")
			if err := os.WriteFile(elsewhere, []byte(kept), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := tc.before(o.instancePath("home")); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			logger := slog.New(slog.NewTextHandler(&log, nil))
			token := o.lastInstance("home", logger)
			if (token == kept) != tc.same || !connectip.IsToken(token) {
				t.Errorf("the token is %q", token)
			}
			if tc.warning == "" && log.Len() > 0 || !strings.Contains(log.String(), tc.warning) {
				t.Errorf("the log has %q, want %q", &log, tc.warning)
			}
			forget := o.keepInstance("home", token, logger)
			if info, err := os.Lstat(o.instancePath("home")); err != nil || info.Mode() != 0o600 {
				t.Errorf("the file is %v, %v", info, err)
			}
			if again := o.lastInstance("home", logger); again != token {
				t.Errorf("%q was kept as %q", token, again)
			}
			forget()
			if _, err := os.Lstat(o.instancePath("home")); !os.IsNotExist(err) {
				t.Errorf("the file is still there: %v", err)
			}
			if text, err := os.ReadFile(elsewhere); err != nil || string(text) != kept {
				t.Errorf("another file has %q, %v", text, err)
			}
		})
	}
}

func TestInstallation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	o := &options{stateDir: dir}
	token := func(name, proxy string) string {
		t.Helper()
		s, err := o.installation(name, proxy)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := token("home", "vpn.example.org")
	if again := token("home", "vpn.example.org"); again != first {
		t.Errorf("%s became %s", first, again)
	}
	for _, other := range []string{token("work", "vpn.example.org"),
		token("home", "vpn.example.net")} {
		if other == first {
			t.Error("another tunnel has the same token")
		}
	}
	path := filepath.Join(dir, installationFile)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("%v, %v", files, err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := o.installation("home", "vpn.example.org"); err == nil ||
		!strings.Contains(err.Error(), path+" is damaged") {
		t.Errorf("of an empty file: %q, %v", s, err)
	}
	o.stateDir = filepath.Join(path, "below")
	if s, err := o.installation("home", "vpn.example.org"); err == nil {
		t.Errorf("of a folder that cannot be: %q", s)
	}
}
