// Package files reads and writes the files of the programs: configurations,
// keys and tokens.
//
// A file with a secret must not be readable by others ([ReadSecret],
// [OpenSecret]). A file is written as a whole or not at all, even if the
// machine dies meanwhile ([Create], [Replace], [Update]).
package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"masquevpn/internal/fault"
)

// maxLen is the maximum length in bytes of a file that is read. The files of
// the programs are far smaller.
const maxLen = 16 << 20

// Read reads a whole file. shared reports whether users other than the owner
// may read or change it. Members of the group may read a file of root: services
// run as such users.
func Read(path string) (data []byte, shared bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if info.IsDir() {
		return nil, false, &fs.PathError{Op: "read", Path: path, Err: unix.EISDIR}
	}
	data, err = io.ReadAll(io.LimitReader(f, maxLen+1))
	if err == nil && len(data) > maxLen {
		err = &fs.PathError{Op: "read", Path: path, Err: unix.EFBIG}
	}
	others := fs.FileMode(0o077)
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid == 0 {
		others = 0o037
	}
	return data, info.Mode().Perm()&others != 0, err
}

// SecretMode returns the mode for a new file with a secret: 0600, or 0640 in a
// folder of root that gives its files to its group (set-group-ID) and keeps
// others out. Packages make such a folder for the services of that group.
func SecretMode(path string) fs.FileMode {
	const group, others = 0o050, 0o007
	info, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return 0o600
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if ok && st.Uid == 0 && info.Mode()&fs.ModeSetgid != 0 && info.Mode()&group == group &&
		info.Mode()&others == 0 {
		return 0o640
	}
	return 0o600
}

// ReadSecret reads a file and refuses one that is shared (see [Read]).
func ReadSecret(path string) ([]byte, error) {
	data, shared, err := Read(path)
	if err != nil {
		return nil, err
	}
	if shared {
		return nil, Exposed(path)
	}
	return data, nil
}

// OpenSecret opens a file for secrets, with flags of os.OpenFile, and creates
// it if it does not exist. It sets the mode to 0600, does not follow a symbolic
// link, and refuses a file of another user, who could read it all the same. It
// opens other kinds of files, such as a pipe, as they are.
func OpenSecret(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags&^os.O_TRUNC|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := conceal(f, flags&os.O_TRUNC != 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// conceal sets the mode of a regular file to 0600. Then it empties the file if
// truncate is set.
func conceal(f *os.File, truncate bool) error {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return &fs.PathError{Op: "write secrets to", Path: f.Name(),
			Err: errors.New("the file belongs to another user")}
	}
	if info.Mode().Perm()&0o077 != 0 {
		err = f.Chmod(0o600)
	}
	if err == nil && truncate {
		err = f.Truncate(0)
	}
	return err
}

// Exposed returns the error for a secret in a file that others can read.
func Exposed(path string) error {
	return fault.Errorf(fault.Usage, "%s holds a secret and can be read by others: chmod 600 %s",
		path, path)
}

// ReadNamed reads the file that a configuration key names. If secret is set, it
// must not be shared (see [Read]). Errors about the file are *fault.Errors with
// the key, except if this process lacks the permission to read it.
func ReadNamed(key, path string, secret bool) ([]byte, error) {
	data, shared, err := Read(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, err
	case err != nil:
		return nil, &fault.Error{Kind: fault.Usage, Key: key, Reason: err.Error(),
			Remedy: "correct the name, or put the file there", Err: err}
	case secret && shared:
		return nil, &fault.Error{Kind: fault.Usage, Key: key,
			Reason: "is a secret that others can read", Remedy: "chmod 600 " + path}
	}
	return data, nil
}

// Replace writes a file and replaces an existing one.
func Replace(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, func(f *os.File) error { return f.Chmod(mode) }, os.Rename)
}

// Update replaces an existing file and preserves its mode, its owner and its
// group. If path is a symbolic link, it replaces the file that the link leads
// to.
func Update(path string, data []byte) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return write(path, data, func(f *os.File) error {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
				return err
			}
		}
		return f.Chmod(info.Mode().Perm())
	}, os.Rename)
}

// Create writes a new file. If one of that name exists, it stays as it is and
// the error wraps fs.ErrExist.
func Create(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, func(f *os.File) error { return f.Chmod(mode) }, os.Link)
}

// write writes a temporary file, which chmod gives its mode and owner, and
// gives it the name path with rename.
func write(path string, data []byte, chmod func(*os.File) error,
	rename func(from, to string) error) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if removeErr := os.Remove(f.Name()); !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}()
	_, err = f.Write(data)
	err = errors.Join(err, chmod(f), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// LockDir locks a folder against other commands that change files in it. It
// waits while another one holds the lock.
func LockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(d.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { d.Close() }, nil
}
