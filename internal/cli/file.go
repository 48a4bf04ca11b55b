package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxFile bounds the files that are read: all of ours are far smaller.
const maxFile = 16 << 20

// ReadFile reads a whole file. The second result tells whether others may read
// or change it than its owner and, if that is root, who may so change it
// anyway, the members of its group: services read what belongs to root.
func ReadFile(path string) (data []byte, shared bool, err error) {
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
	data, err = io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = &fs.PathError{Op: "read", Path: path, Err: unix.EFBIG}
	}
	others := fs.FileMode(0o077)
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid == 0 {
		others = 0o037
	}
	return data, info.Mode().Perm()&others != 0, err
}

// SecretMode is the mode of a file with a secret: 0600, and 0640 in a folder of
// root that hands its files to its group (set-group-ID) and keeps others out.
// Packages make such a folder for the services of that group.
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

// ReadSecret reads a file that is not shared (see ReadFile), and refuses
// others.
func ReadSecret(path string) ([]byte, error) {
	data, shared, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	if shared {
		return nil, Exposed(path)
	}
	return data, nil
}

// OpenSecret opens a file to write secrets to, with flags as os.OpenFile has
// them, and makes it if there is none. Nobody else can read it from then on: it
// is 0600, whatever it was, a link is not followed, and a file of another user,
// who could read it all the same, is refused. What is no file, such as a pipe,
// is opened as it is.
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

// conceal makes a file one that nobody else can read, and then empties it.
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

// Exposed is the error of a secret in a file that others can read.
func Exposed(path string) error {
	return Errorf(Usage, "%s holds a secret and can be read by others: chmod 600 %s", path, path)
}

// WriteFile replaces a file, or makes it, as a whole or not at all, even if
// the machine dies meanwhile.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, func(f *os.File) error { return f.Chmod(mode) }, os.Rename)
}

// UpdateFile is WriteFile for a file that exists, which keeps its mode, its
// owner and its group: somebody else may have to read it. Where path is a link,
// it stays one.
func UpdateFile(path string, data []byte) error {
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

// CreateFile makes a file as a whole or not at all. If there is one of that
// name, it is left alone and the error wraps fs.ErrExist.
func CreateFile(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, func(f *os.File) error { return f.Chmod(mode) }, os.Link)
}

func write(path string, data []byte, share func(*os.File) error,
	place func(from, to string) error) (err error) {
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
	err = errors.Join(err, share(f), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := place(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// LockDir keeps other commands that change the files of a folder away until
// the function that it returns is called.
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
