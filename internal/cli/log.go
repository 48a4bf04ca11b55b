package cli

import (
	"context"
	"io"
	"log"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// LogOptions are the flags --log-level and --log-format.
type LogOptions struct {
	Level  slog.Level
	Format string // auto, text or json
}

// Log formats.
const (
	FormatAuto = "auto"
	FormatText = "text"
	FormatJSON = "json"
)

// ParseLogOptions checks the flags.
func ParseLogOptions(level, format string) (LogOptions, error) {
	o := LogOptions{Format: format}
	switch strings.ToLower(level) {
	case "debug":
		o.Level = slog.LevelDebug
	case "info":
		o.Level = slog.LevelInfo
	case "warn":
		o.Level = slog.LevelWarn
	case "error":
		o.Level = slog.LevelError
	default:
		return o, Errorf(Usage, "--log-level %q is not known: write debug, info, warn or error", level)
	}
	switch format {
	case FormatAuto, FormatText, FormatJSON:
		return o, nil
	}
	return o, Errorf(Usage, "--log-format %q is not known: write auto, text or json", format)
}

// Logger makes a logger that writes to w. The format auto is text, for people,
// unless w is systemd's journal, where it is JSON: fields stay fields.
func (o LogOptions) Logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: o.Level}
	f, isFile := w.(*os.File)
	if o.Format == FormatJSON || o.Format == FormatAuto && isFile &&
		isJournal(f, os.Getenv("JOURNAL_STREAM")) {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// linesPerSecond bounds what StandardLog lets through.
const linesPerSecond = 10

// StandardLog has what libraries write to the standard logger go to logger, at
// debug level and a few lines a second: some write a line for whatever a peer
// does.
func StandardLog(logger *slog.Logger) {
	log.SetFlags(0)
	if !logger.Enabled(context.Background(), slog.LevelDebug) {
		log.SetOutput(io.Discard) // log then formats no lines at all
		return
	}
	log.SetOutput(&standardLog{logger, rate.NewLimiter(linesPerSecond, linesPerSecond)})
}

type standardLog struct {
	logger *slog.Logger
	limit  *rate.Limiter
}

// Write takes one line.
func (l *standardLog) Write(line []byte) (int, error) {
	if l.limit.Allow() {
		l.logger.Debug("from a library", "line", OneLine(string(line)))
	}
	return len(line), nil
}

// isJournal tells whether f is the stream that systemd names, as DEVICE:INODE,
// in JOURNAL_STREAM (systemd.exec(5)). The variable alone says nothing: it is
// inherited by processes whose output was redirected.
func isJournal(f *os.File, stream string) bool {
	device, inode, ok := strings.Cut(stream, ":")
	if !ok {
		return false
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return device == strconv.FormatUint(st.Dev, 10) && inode == strconv.FormatUint(st.Ino, 10)
}

// Args are the flags as they are given to another process of ours.
func (o LogOptions) Args() []string {
	return []string{"--log-level=" + strings.ToLower(o.Level.String()), "--log-format=" + o.Format}
}
