package daemon

import (
	"crypto/tls"
	"log/slog"
	"os"

	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/qlog"
)

// Traces are the logs of connections that an operator turns on under [log].
type Traces struct {
	KeyLog  string // file for TLS secrets; empty: none
	QlogDir string // folder for qlog files; empty: none
}

// Open makes c write its TLS secrets to the file of log.key_log, and returns
// the tracer for log.qlog_dir, nil if there is none. stop closes the file and
// waits a moment for the qlog files of connections that are closed. Errors have
// the key.
func (t Traces) Open(c *tls.Config, logger *slog.Logger) (tracer qlog.Tracer, stop func(),
	err error) {
	closeKeyLog, err := openKeyLog(t.KeyLog, c, logger)
	if err != nil {
		return nil, nil, err
	}
	tracer, wait, err := qlog.Open(t.QlogDir, logger)
	if err != nil {
		closeKeyLog()
		return nil, nil, err
	}
	return tracer, func() { wait(); closeKeyLog() }, nil
}

// openKeyLog makes c write its TLS secrets to a file, if path is not empty. The
// function that it returns closes the file.
func openKeyLog(path string, c *tls.Config, logger *slog.Logger) (func(), error) {
	if path == "" {
		return func() {}, nil
	}
	f, err := files.OpenSecret(path, os.O_WRONLY|os.O_APPEND)
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage, Key: "log.key_log", Reason: err.Error(),
			Remedy: "name a file that can be written", Err: err}
	}
	c.KeyLogWriter = f
	logger.Warn("TLS secrets are written to a file: whoever reads it can read the traffic",
		"file", path)
	return func() { f.Close() }, nil
}
