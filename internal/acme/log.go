package acme

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"go.uber.org/zap/zapcore"
)

// logCore writes certmagic's log at level debug. Its failures are also returned
// as errors, which Run logs with a remedy.
type logCore struct {
	zapcore.LevelEnabler
	logger *slog.Logger
	fields []zapcore.Field
}

func (c logCore) With(fields []zapcore.Field) zapcore.Core {
	c.fields = slices.Concat(c.fields, fields)
	return c
}

func (c logCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return checked.AddCore(e, c)
}

func (c logCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	encoder := zapcore.NewMapObjectEncoder()
	for _, f := range slices.Concat(c.fields, fields) {
		f.AddTo(encoder)
	}
	var line strings.Builder
	line.WriteString(e.Message)
	for _, key := range slices.Sorted(maps.Keys(encoder.Fields)) {
		fmt.Fprintf(&line, " %s=%v", key, encoder.Fields[key])
	}
	c.logger.Debug("about the certificate", "line", line.String())
	return nil
}

func (logCore) Sync() error { return nil }
