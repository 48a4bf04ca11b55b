package files

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"masquevpn/internal/fault"
)

func TestSecretFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0 // the group may read files of root
	for mode, good := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o640: root,
		0o604: false, 0o660: false, 0o644: false, 0o620: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		data, err := ReadSecret(path)
		if good != (err == nil) || good && string(data) != "x" {
			t.Errorf("mode %o: %q, %v", mode, data, err)
		}
		if e, ok := errors.AsType[*fault.Error](err); !good &&
			(!ok || e.Kind != fault.Usage || !strings.Contains(e.Error(), "chmod 600 "+path)) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if _, _, err := Read(filepath.Dir(path)); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a folder: %v", err)
	}
}

func TestSecretsOfServices(t *testing.T) {
	dir := t.TempDir()
	root := os.Geteuid() == 0
	for _, test := range []struct {
		mode fs.FileMode
		want fs.FileMode
	}{
		{0o700, 0o600}, {0o750, 0o600}, {0o750 | fs.ModeSetgid, 0o640},
		{0o755 | fs.ModeSetgid, 0o600}, {0o700 | fs.ModeSetgid, 0o600},
	} {
		t.Run(test.mode.String(), func(t *testing.T) {
			if err := os.Chmod(dir, test.mode); err != nil {
				t.Fatal(err)
			}
			if !root {
				test.want = 0o600
			}
			if got := SecretMode(filepath.Join(dir, "f")); got != test.want {
				t.Errorf("in a folder with mode %v: %o, want %o", test.mode, got, test.want)
			}
		})
	}
	if got := SecretMode(filepath.Join(dir, "none", "f")); got != 0o600 {
		t.Errorf("in no folder: %o", got)
	}
}

func TestWriteFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := Create(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, []byte("two"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	check := func(want string, mode fs.FileMode) {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil || string(data) != want {
			t.Errorf("holds %q, %v; want %q", data, err, want)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("mode %v, %v; want %v", info.Mode(), err, mode)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
	check("one", 0o600)
	if err := Replace(path, []byte("three"), 0o644); err != nil {
		t.Fatal(err)
	}
	check("three", 0o644)
	if err := Replace(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err,
		fs.ErrNotExist) {
		t.Errorf("into a folder that is not there: %v", err)
	}
}

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	free := func() bool {
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	}
	unlock, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if free() {
		t.Error("the folder is not locked")
	}
	unlock()
	if !free() {
		t.Error("the folder stays locked")
	}
	if _, err := LockDir(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}
