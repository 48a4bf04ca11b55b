package acme

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"golang.org/x/sys/unix"
)

// storage is certmagic's file storage with locks that end with the process.
// certmagic's own locks outlive a killed process and delay the next start.
type storage struct {
	*certmagic.FileStorage

	mu    sync.Mutex
	locks map[string]*os.File
}

func newStorage(dir string) *storage {
	return &storage{FileStorage: &certmagic.FileStorage{Path: dir},
		locks: make(map[string]*os.File)}
}

// lockInterval is the interval between attempts to take a lock that another
// process holds.
const lockInterval = 500 * time.Millisecond

// Lock implements certmagic.Locker.
func (s *storage) Lock(ctx context.Context, name string) error {
	dir := filepath.Join(s.Path, "locks")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, certmagic.StorageKeys.Safe(name)),
		os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			s.mu.Lock()
			defer s.mu.Unlock()
			s.locks[name] = f
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return errors.Join(&os.PathError{Op: "flock", Path: f.Name(), Err: err}, f.Close())
		}
		select {
		case <-time.After(lockInterval):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), f.Close())
		}
	}
}

// Unlock implements certmagic.Locker.
func (s *storage) Unlock(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.locks[name]
	if f == nil {
		return os.ErrNotExist
	}
	delete(s.locks, name)
	return f.Close()
}
