package daemon

import (
	"bytes"
	"log"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
)

// Lines of libraries are limited at debug level and absent at other levels.
func TestStandardLog(t *testing.T) {
	defer log.SetFlags(log.Flags())
	defer log.SetOutput(log.Writer())
	for level, want := range map[slog.Level]int{slog.LevelInfo: 0,
		slog.LevelDebug: linesPerSecond} {
		synctest.Test(t, func(t *testing.T) {
			var buf bytes.Buffer
			StandardLog(slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: level})))
			for i := range 1000 {
				log.Printf("line %d", i)
			}
			lines := strings.Count(buf.String(), "\n")
			if lines != want || want > 0 &&
				!strings.Contains(buf.String(), `level=DEBUG msg="from a library" line="line 0"`) {
				t.Errorf("at level %v: %d lines, want %d:\n%s", level, lines, want, buf.String())
			}
		})
	}
}
