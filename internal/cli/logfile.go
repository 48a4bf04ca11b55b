package cli

import (
	"bytes"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// logLimit bounds the log of a program in the background, in bytes. Run
// directories are in memory.
const logLimit = 4 << 20

// LogFile is the log of a program in the background: when it is about to grow
// beyond 4 MiB, the older half goes. The file has to be open for reading and
// appending, and stays the caller's. Others may write to it too.
func LogFile(f *os.File) io.Writer { return &logFile{file: f, limit: logLimit} }

// OpenLogFile opens a file for LogFile, which nobody else may read; what is in
// it stays.
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
	limit int64

	mu   sync.Mutex
	file *os.File
}

// Write adds one line.
func (l *logFile) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if info, err := l.file.Stat(); err == nil && info.Size()+int64(len(line)) > l.limit {
		l.shorten(info.Size())
	}
	return l.file.Write(line)
}

// shorten keeps the lines in the newer half of the limit. Where that fails, as
// when the disk is full, none of them stays.
func (l *logFile) shorten(size int64) {
	newer := make([]byte, l.limit/2)
	n, _ := l.file.ReadAt(newer, max(size-l.limit/2, 0))
	_, newer, _ = bytes.Cut(newer[:n], []byte("\n"))
	if l.file.Truncate(0) == nil {
		_, _ = l.file.Write(newer)
	}
}
