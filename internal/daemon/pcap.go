package daemon

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"

	"masquevpn/internal/capture"
	"masquevpn/internal/fault"
)

// OpenPCAP writes the packets that pass tap to the file of log.pcap until stop
// is called. The file of the previous run is kept as FILE.1. An empty path
// stands for no file. The error is a *fault.Error with the key.
func OpenPCAP(path string, tap *capture.Tap, logger *slog.Logger) (stop func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	f, err := replaceCapture(path)
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage, Key: "log.pcap", Reason: err.Error(),
			Remedy: "name a file that can be written", Err: err}
	}
	logger.Warn("packets inside the tunnel are written to a file: whoever reads it reads what was sent", "file", path)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	running := tap.Start(capture.Options{})
	go func() {
		defer close(done)
		err := running.Write(ctx, f)
		if err = errors.Join(err, f.Close()); err != nil {
			logger.Error("packets are not written any more", "file", path, "error", err)
		}
	}()
	return func() {
		cancel()
		<-done
		captured, dropped := running.Counts()
		logger.Info("capture ended", "file", path, "captured", captured, "dropped", dropped)
	}, nil
}

// replaceCapture renames an existing file and creates a new one that only its
// owner can read.
func replaceCapture(path string) (*os.File, error) {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, &fs.PathError{Op: "replace", Path: path, Err: errors.New("not a file")}
	default:
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}
