package files

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Nobody else can read a file of secrets, whatever its mode was before.
func TestOpenSecret(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before func(path string) error
		flags  int
		want   string // contents after writing "new"; "": refused
	}{
		{"new", func(string) error { return nil }, os.O_APPEND, "new"},
		{"appended to", mode(0o600), os.O_APPEND, "oldnew"},
		{"readable by others", mode(0o644), os.O_APPEND, "oldnew"},
		{"writable by others", mode(0o622), os.O_TRUNC, "new"},
		{"of another user", func(path string) error {
			if err := mode(0o600)(path); err != nil {
				return err
			}
			return os.Chown(path, 4321, 4321)
		}, os.O_TRUNC, ""},
		{"a link", func(path string) error {
			if err := mode(0o600)(path + ".to"); err != nil {
				return err
			}
			return os.Symlink(path+".to", path)
		}, os.O_TRUNC, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "secret")
			if err := tc.before(path); errors.Is(err, fs.ErrPermission) {
				t.Skip("root alone can give files away")
			} else if err != nil {
				t.Fatal(err)
			}
			f, err := OpenSecret(path, os.O_WRONLY|tc.flags)
			if tc.want == "" {
				if err == nil {
					t.Fatal("it was opened")
				}
				if text, err := os.ReadFile(path); err != nil || string(text) != "old" {
					t.Errorf("it has %q, %v", text, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteString("new"); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if err != nil || string(text) != tc.want {
				t.Errorf("it has %q, %v, want %q", text, err, tc.want)
			}
			if info, err := f.Stat(); err != nil || info.Mode() != 0o600 {
				t.Errorf("its mode is %v, %v", info.Mode(), err)
			}
		})
	}
}

// mode returns a function that creates a file with a mode.
func mode(m fs.FileMode) func(path string) error {
	return func(path string) error {
		if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
			return err
		}
		return os.Chmod(path, m)
	}
}
