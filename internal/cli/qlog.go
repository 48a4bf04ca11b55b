package cli

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
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
)

// Limits of log.qlog_dir: strangers make connections too, and a busy one has
// thousands of events in a second.
const (
	// connections that are followed at the same time, and files that are kept
	// of those before
	maxQlogs     = 32
	maxQlogBytes = 64 << 20 // bytes per file
	qlogFlush    = time.Second
	qlogSuffix   = ".sqlog"
	qlogEnd      = time.Second // time to write the rest at the end
)

// Tracer is what quic.Config.Tracer is.
type Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

// OpenQlog makes the Tracer that writes a file about each connection into the
// folder of log.qlog_dir; nil if none is named. No failure of it disturbs a
// connection. The function waits a moment for the files of connections that are
// closed already.
func OpenQlog(keys Keys, dir string, logger *slog.Logger) (Tracer, func(), error) {
	if dir == "" {
		return nil, func() {}, nil
	}
	q, err := openQlogs(dir, logger)
	if err != nil {
		return nil, nil, keys.Problem("log.qlog_dir", err.Error(),
			"name a folder that can be written to: mkdir -m 700 "+dir)
	}
	logger.Warn("each connection is written to a file, which slows it", "file", dir)
	return http3qlog.RedactHeaders(q.trace, redact), q.wait, nil
}

// checkQlogDir returns why files cannot be made in the folder of log.qlog_dir.
func checkQlogDir(dir string) error {
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

// redact keeps secrets out of a qlog.
func redact(name, value string) string {
	switch name {
	case "Authorization", "Proxy-Authorization", connectip.InstanceHeader,
		connectip.InstallationHeader:
		return "(not shown)"
	}
	return value
}

// qlogs are the files in a folder.
type qlogs struct {
	root   *os.Root
	dir    string
	logger *slog.Logger
	files  sync.WaitGroup // that are open
	failed atomic.Bool    // a file could not be made or written, which was said

	mu    sync.Mutex
	open  int
	ended []string // the files of connections that are no more, oldest first
	full  bool     // there were too many, which was said
}

func openQlogs(dir string, logger *slog.Logger) (*qlogs, error) {
	if err := checkQlogDir(dir); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	q := &qlogs{root: root, dir: dir, logger: logger}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), qlogSuffix) {
			q.ended = append(q.ended, e.Name())
		}
	}
	slices.Sort(q.ended) // the time is in the name
	return q, nil
}

// trace is a Tracer; of a connection that is not followed, it returns nil.
func (q *qlogs) trace(_ context.Context, isClient bool, id quic.ConnectionID) qlogwriter.Trace {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.open >= maxQlogs {
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
		qlogSuffix)
	f, err := q.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		q.fail(err)
		return nil
	}
	q.open++
	q.files.Add(1)
	seq := qlogwriter.NewConnectionFileSeq(
		&qlogFile{qlogs: q, name: name, file: f, w: newQlogBuffer(f)},
		isClient, id, []string{qlog.EventSchema, http3qlog.EventSchema})
	go seq.Run()
	return seq
}

func newQlogBuffer(w io.Writer) *bufio.Writer { return bufio.NewWriterSize(w, 1<<16) }

// fail says the first of many errors.
func (q *qlogs) fail(err error) {
	if !q.failed.Swap(true) {
		q.logger.Error("qlog of a connection cannot be written", "error", err)
	}
}

func (q *qlogs) close(name string) {
	defer q.files.Done()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.open--
	for q.ended = append(q.ended, name); len(q.ended) > maxQlogs; q.ended = q.ended[1:] {
		_ = q.root.Remove(q.ended[0]) // somebody else may have removed it
	}
}

func (q *qlogs) wait() {
	done := make(chan struct{})
	go func() { q.files.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(qlogEnd):
	}
}

// qlogFile is one file. What does not fit, or cannot be written, is left out
// from a record on.
type qlogFile struct {
	qlogs *qlogs
	name  string
	file  *os.File

	mu     sync.Mutex
	w      *bufio.Writer
	flush  *time.Timer // nil while nothing waits to be written
	size   int
	full   bool
	failed bool
}

// Write takes a part of a record. It never fails.
func (f *qlogFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(p) > 0 && p[0] == qlogwriter.RecordSeparator && f.size >= maxQlogBytes {
		// which JSON never has
		f.full = true
	}
	if f.full || f.failed {
		return len(p), nil
	}
	f.size += len(p)
	_, err := f.w.Write(p)
	f.note(err)
	if f.flush == nil { // so that it can be read meanwhile
		f.flush = time.AfterFunc(qlogFlush, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.flush = nil
			f.note(f.w.Flush())
		})
	}
	return len(p), nil
}

// note has the first error said. f.mu is held.
func (f *qlogFile) note(err error) {
	if err != nil && !f.failed {
		f.failed = true
		f.qlogs.fail(err)
	}
}

// Close ends the file. It never fails.
func (f *qlogFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flush != nil {
		f.flush.Stop()
	}
	f.note(f.w.Flush())
	f.note(f.file.Close())
	f.failed = true // a flush that is under way finds nothing to do
	f.qlogs.close(f.name)
	return nil
}
