package files

import (
	"os"

	"golang.org/x/sys/unix"
)

// Version identifies a state of a file. It is comparable. The zero Version
// stands for a file that does not exist.
type Version struct {
	id       fileID
	size     uint64
	modified unix.StatxTimestamp
}

// fileID identifies a file. The time of birth belongs to it because a file
// system gives the inode number of a deleted file to the next one. It is zero
// on file systems that do not keep it.
type fileID struct {
	major, minor uint32
	inode        uint64
	born         unix.StatxTimestamp
}

// SameFile reports whether v and w are states of one file that was written in
// place. It returns false if another file replaced it.
func (v Version) SameFile(w Version) bool { return v.id == w.id }

// Empty reports whether the file has no contents.
func (v Version) Empty() bool { return v.size == 0 }

// VersionOf returns the version of a file. It follows symbolic links.
func VersionOf(path string) (Version, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME,
		&st); err != nil {
		return Version{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	id := fileID{st.Dev_major, st.Dev_minor, st.Ino, st.Btime}
	return Version{id, st.Size, st.Mtime}, nil
}
