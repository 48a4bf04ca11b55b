// Package qlog writes a qlog file about each QUIC connection
// (draft-ietf-quic-qlog-main-schema) into a folder. Failures to write never
// disturb a connection. Headers with secrets are redacted.
package qlog

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	http3qlog "github.com/quic-go/quic-go/http3/qlog"
	quicqlog "github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
	"masquevpn/internal/fault"
)

// The limits of a folder: strangers make connections too, and a busy connection
// has thousands of events a second.
const (
	// maxFiles is the maximum number of connections that are traced at the same
	// time, and of files of earlier connections.
	maxFiles = 32

	// maxFileLen is the length in bytes at which a file ends.
	maxFileLen = 64 << 20

	flushInterval = time.Second
	closeTimeout  = time.Second // for the files that are open at the end
)

// suffix is the suffix of file names.
const suffix = ".sqlog"

// Tracer is the type of quic.Config.Tracer.
type Tracer = func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

// Open returns the Tracer that writes a file about each connection into dir,
// the value of log.qlog_dir. If dir is empty, the Tracer is nil. wait waits a
// moment for the files of connections that are closed. The error is a
// *fault.Error with the key.
func Open(dir string, logger *slog.Logger) (t Tracer, wait func(), err error) {
	if dir == "" {
		return nil, func() {}, nil
	}
	q, err := openFolder(dir, logger)
	if err != nil {
		return nil, nil, &fault.Error{Kind: fault.Usage, Key: "log.qlog_dir", Reason: err.Error(),
			Remedy: "name a folder that can be written to: mkdir -m 700 " + dir, Err: err}
	}
	logger.Warn("each connection is written to a file, which slows it", "file", dir)
	return http3qlog.RedactHeaders(q.trace, redact), q.wait, nil
}

// CheckDir returns an error if files cannot be created in dir.
func CheckDir(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: unix.ENOTDIR}
	}
	if err == nil {
		if err = unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			err = &fs.PathError{Op: "write to", Path: dir, Err: err}
		}
	}
	return err
}

// redact returns the value to write for a header.
func redact(name, value string) string {
	switch name {
	case "Authorization", "Proxy-Authorization", connectip.InstanceHeader,
		connectip.InstallationHeader:
		return "(not shown)"
	}
	return value
}

// folder holds the files of connections.
type folder struct {
	root   *os.Root
	dir    string
	logger *slog.Logger
	files  sync.WaitGroup // open files
	failed atomic.Bool    // a failure to create or write a file was logged

	mu    sync.Mutex // guards the fields below
	open  int        // number of open files
	ended []string   // names of the files of closed connections, oldest first
	full  bool       // a connection beyond maxFiles was logged
}

func openFolder(dir string, logger *slog.Logger) (*folder, error) {
	if err := CheckDir(dir); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	q := &folder{root: root, dir: dir, logger: logger}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), suffix) {
			q.ended = append(q.ended, e.Name())
		}
	}
	slices.Sort(q.ended) // names start with the time
	return q, nil
}

// trace implements Tracer. It returns nil for connections beyond maxFiles.
func (q *folder) trace(_ context.Context, isClient bool, id quic.ConnectionID) qlogwriter.Trace {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.open >= maxFiles {
		if !q.full {
			q.full = true
			q.logger.Warn("there are more connections at the same time than qlog follows",
				"file", q.dir)
		}
		return nil
	}
	role := "server"
	if isClient {
		role = "client"
	}
	name := fmt.Sprintf("%s_%v_%s%s", time.Now().UTC().Format("20060102T150405.000Z"), id, role,
		suffix)
	f, err := q.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		q.fail(err)
		return nil
	}
	q.open++
	q.files.Add(1)
	seq := qlogwriter.NewConnectionFileSeq(
		&file{folder: q, name: name, file: f, w: newBuffer(f)},
		isClient, id, []string{quicqlog.EventSchema, http3qlog.EventSchema})
	go seq.Run()
	return seq
}

func newBuffer(w io.Writer) *bufio.Writer { return bufio.NewWriterSize(w, 1<<16) }

// fail logs the first of many errors.
func (q *folder) fail(err error) {
	if !q.failed.Swap(true) {
		q.logger.Error("qlog of a connection cannot be written", "error", err)
	}
}

func (q *folder) close(name string) {
	defer q.files.Done()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.open--
	for q.ended = append(q.ended, name); len(q.ended) > maxFiles; q.ended = q.ended[1:] {
		_ = q.root.Remove(q.ended[0]) // another program may have removed it
	}
}

func (q *folder) wait() {
	done := make(chan struct{})
	go func() { q.files.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(closeTimeout):
	}
}

// file is the file of one connection. When it is full or cannot be written, it
// discards all later records.
type file struct {
	folder *folder
	name   string
	file   *os.File

	mu     sync.Mutex // guards the fields below
	w      *bufio.Writer
	flush  *time.Timer // nil if w is empty
	size   int         // bytes
	full   bool
	failed bool
}

// Write takes a part of a record. It never fails.
func (f *file) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(p) > 0 && p[0] == qlogwriter.RecordSeparator && f.size >= maxFileLen {
		f.full = true // JSON never contains the separator
	}
	if f.full || f.failed {
		return len(p), nil
	}
	f.size += len(p)
	_, err := f.w.Write(p)
	f.note(err)
	if f.flush == nil { // so that people can read the file meanwhile
		f.flush = time.AfterFunc(flushInterval, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.flush = nil
			f.note(f.w.Flush())
		})
	}
	return len(p), nil
}

// note logs the first error. f.mu is held.
func (f *file) note(err error) {
	if err != nil && !f.failed {
		f.failed = true
		f.folder.fail(err)
	}
}

// Close closes the file. It never fails.
func (f *file) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flush != nil {
		f.flush.Stop()
	}
	f.note(f.w.Flush())
	f.note(f.file.Close())
	f.failed = true // a concurrent flush finds nothing to do
	f.folder.close(f.name)
	return nil
}
