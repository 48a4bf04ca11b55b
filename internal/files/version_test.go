package files

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A file that replaced another one is another file, even if it has the inode
// number of a deleted one.
func TestSameFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func() Version {
		t.Helper()
		next := path + ".new"
		if err := os.WriteFile(next, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, path); err != nil {
			t.Fatal(err)
		}
		v, err := VersionOf(path)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := write()
	if first.id.born == (unix.StatxTimestamp{}) {
		t.Skip("this file system does not keep the time of birth")
	}
	again := first
	for range 100 { // until the number is used again, at once on ext4
		if again = write(); again.id.inode == first.id.inode && again.id.born != first.id.born {
			break
		}
	}
	if again.SameFile(first) {
		t.Errorf("%+v and %+v are one file", first, again)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if now, err := VersionOf(path); err != nil || !now.SameFile(again) || now == again {
		t.Errorf("written in place, %+v became %+v, %v", again, now, err)
	}
}
