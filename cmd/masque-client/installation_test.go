package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
	for _, other := range []string{token("work", "vpn.example.org"), token("home", "vpn.example.net")} {
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
	if s, err := o.installation("home", "vpn.example.org"); err == nil || !strings.Contains(err.Error(), path+" is damaged") {
		t.Errorf("of an empty file: %q, %v", s, err)
	}
	o.stateDir = filepath.Join(path, "below")
	if s, err := o.installation("home", "vpn.example.org"); err == nil {
		t.Errorf("of a folder that cannot be: %q", s)
	}
}
