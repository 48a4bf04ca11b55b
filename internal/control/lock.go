// Package control is the control interface of a running proxy or tunnel: HTTP
// with JSON over a unix socket in the run directory. Only the owner of the
// process and root may use it.
//
// A [Server] answers requests and a [Client] sends them.
//
// # Instances
//
// An instance has a name. While it runs, it holds an exclusive [Lock] on the
// file NAME.lock. The kernel releases the lock of a killed process, so a socket
// without a locked file is left over.
package control

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultDir is the default run directory.
const DefaultDir = "/run/masque"

// ErrRunning is returned for a second instance of a name.
var ErrRunning = errors.New("already running")

const (
	socketSuffix = ".sock"
	lockSuffix   = ".lock"
	pollInterval = 20 * time.Millisecond
)

// SocketPath returns the path of an instance's socket.
func SocketPath(dir, name string) string { return filepath.Join(dir, name+socketSuffix) }

func lockPath(dir, name string) string { return filepath.Join(dir, name+lockSuffix) }

// Lock is held by the running instance of a name.
type Lock struct {
	file *os.File
}

// Acquire takes the lock of the name and makes the run directory if it is
// missing. The error wraps ErrRunning when another process holds the lock, and
// fs.ErrPermission when this user may not write to the directory.
func Acquire(dir, name string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	path := lockPath(dir, name)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		// The lock belongs to the open file: it ends with the process, and
		// unlike flock(2) it can be tested without taking it.
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			f.Close()
			return nil, fmt.Errorf("%s: %w", name, ErrRunning)
		}
		if err != nil {
			f.Close()
			return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		// The previous holder may have removed the file after the open: then
		// this lock is on a deleted file.
		if sameFile(f, path) {
			return &Lock{file: f}, nil
		}
		f.Close()
	}
}

func sameFile(f *os.File, path string) bool {
	a, errA := f.Stat()
	b, errB := os.Lstat(path)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// Release releases the lock and removes its file.
func (l *Lock) Release() error {
	return errors.Join(os.Remove(l.file.Name()), l.file.Close())
}

// Running reports whether a living process holds the lock of the name.
func Running(dir, name string) (bool, error) {
	f, err := os.OpenFile(lockPath(dir, name), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	held := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &held); err != nil {
		return false, &fs.PathError{Op: "look at the lock of", Path: f.Name(), Err: err}
	}
	return held.Type != unix.F_UNLCK, nil
}

// List returns the names of the running instances, sorted.
func List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), socketSuffix)
		if !ok {
			continue
		}
		if running, err := Running(dir, name); err != nil {
			return nil, err
		} else if running {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}
