package daemon

import (
	"bytes"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// logLimit is the maximum length in bytes of the log of a program in the
// background. Run directories are in memory.
const logLimit = 4 << 20

// LogFile returns a writer for the log of a program in the background. When the
// file is about to exceed 4 MiB, the writer removes the older half. f must be
// open for reading and appending. The caller closes it. Other processes may
// write to the file too.
func LogFile(f *os.File) io.Writer { return &logFile{file: f, limit: logLimit} }

// OpenLogFile opens a file for LogFile and preserves its contents. Nobody else
// may read it.
func OpenLogFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

type logFile struct {
	limit int64 // bytes

	mu   sync.Mutex // guards the contents of file
	file *os.File
}

// Write appends one line.
func (l *logFile) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if info, err := l.file.Stat(); err == nil && info.Size()+int64(len(line)) > l.limit {
		l.shorten(info.Size())
	}
	return l.file.Write(line)
}

// shorten removes all lines but those in the newer half of the limit. If it
// cannot write these back, for example to a full disk, they are lost.
func (l *logFile) shorten(size int64) {
	newer := make([]byte, l.limit/2)
	n, _ := l.file.ReadAt(newer, max(size-l.limit/2, 0))
	_, newer, _ = bytes.Cut(newer[:n], []byte("\n"))
	if l.file.Truncate(0) == nil {
		_, _ = l.file.Write(newer)
	}
}
