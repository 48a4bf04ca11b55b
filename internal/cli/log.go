package cli

import (
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"masquevpn/internal/fault"
)

// LogOptions are the values of the flags --log-level and --log-format.
type LogOptions struct {
	Level  slog.Level
	Format string // FormatAuto, FormatText or FormatJSON
}

// The values of --log-format.
const (
	FormatAuto = "auto"
	FormatText = "text"
	FormatJSON = "json"
)

// ParseLogOptions validates the values of the flags.
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
		return o, fault.Errorf(fault.Usage,
			"--log-level %q is not known: write debug, info, warn or error", level)
	}
	switch format {
	case FormatAuto, FormatText, FormatJSON:
		return o, nil
	}
	return o, fault.Errorf(fault.Usage, "--log-format %q is not known: write auto, text or json",
		format)
}

// Logger returns a logger that writes to w. FormatAuto selects JSON if w is
// systemd's journal, which keeps the fields, and text otherwise.
func (o LogOptions) Logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: o.Level}
	f, isFile := w.(*os.File)
	if o.Format == FormatJSON || o.Format == FormatAuto && isFile &&
		isJournal(f, os.Getenv("JOURNAL_STREAM")) {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// isJournal reports whether f is the stream that JOURNAL_STREAM names as
// DEVICE:INODE (systemd.exec(5)). The variable alone is not enough: processes
// inherit it even if their output is redirected.
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

// Args returns the flags for another process of this program.
func (o LogOptions) Args() []string {
	return []string{"--log-level=" + strings.ToLower(o.Level.String()), "--log-format=" + o.Format}
}
