package daemon

import (
	"context"
	"io"
	"log"
	"log/slog"

	"golang.org/x/time/rate"

	"masquevpn/internal/text"
)

// linesPerSecond limits the lines of libraries in the log.
const linesPerSecond = 10

// StandardLog sends the lines that libraries write to the standard logger to
// logger, at debug level and at most a few a second: some libraries log a line
// for each action of a peer.
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

// Write logs one line.
func (l *standardLog) Write(line []byte) (int, error) {
	if l.limit.Allow() {
		l.logger.Debug("from a library", "line", text.OneLine(string(line)))
	}
	return len(line), nil
}
