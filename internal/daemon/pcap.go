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

// PCAP returns a task that writes the packets that pass tap to the file of
// log.pcap. It keeps the file of the previous run as FILE.1. An empty path
// stands for no file. Errors are *fault.Errors with the key.
func PCAP(path string, tap *capture.Tap, logger *slog.Logger) Task {
	return NewTask("pcap file", func(ctx context.Context, ready func()) error {
		if path == "" {
			ready()
			<-ctx.Done()
			return nil
		}
		f, err := replaceCapture(path)
		if err != nil {
			return &fault.Error{Kind: fault.Usage, Key: "log.pcap", Reason: err.Error(),
				Remedy: "name a file that can be written", Err: err}
		}
		logger.Warn("packets inside the tunnel are written to a file: whoever reads it can read the traffic", "file", path)
		running := tap.Start(capture.Options{})
		ready()
		err = running.Write(ctx, f)
		if err = errors.Join(err, f.Close()); err != nil {
			logger.Error("packets can no longer be written to the file", "file", path, "error", err)
		}
		<-ctx.Done() // a full disk does not end the tunnel
		captured, dropped := running.Counts()
		logger.Info("capture ended", "file", path, "captured", captured, "dropped", dropped)
		return nil
	})
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
