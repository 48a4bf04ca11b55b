package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/internal/capture"
	"masquevpn/internal/control"
)

// Paths of the control socket, with the parameters of a capture, and the fields
// of its answer.
const (
	capturePath = "/v1/capture"

	paramSession = "session"
	paramSnapLen = "snaplen"
	paramCount   = "count"

	captureID       = "Capture-Id" // identifies the capture to stop
	captureCaptured = "Capture-Captured"
	captureDropped  = "Capture-Dropped"
)

func captureStopPath(id string) string { return capturePath + "/" + id + "/stop" }

// maxCaptures is how many captures by way of the control socket there may be at
// the same time.
const maxCaptures = 8

// captures are those by way of a control socket.
type captures struct {
	tap     *capture.Tap
	session func(id string) (ends <-chan struct{}, err error)
	ended   <-chan struct{}
	logger  *slog.Logger

	mu     sync.Mutex
	lastID int
	stop   map[string]context.CancelFunc
}

// HandleCaptures has mux serve captures of what passes tap. session returns a
// channel that is closed when a session ends, or an error when there is none;
// it is nil where there are no sessions to choose from. All captures end when
// ended is closed.
func HandleCaptures(mux *http.ServeMux, tap *capture.Tap,
	session func(id string) (<-chan struct{}, error), ended <-chan struct{}, logger *slog.Logger) {
	c := &captures{tap: tap, session: session, ended: ended, logger: logger,
		stop: make(map[string]context.CancelFunc)}
	mux.HandleFunc("POST "+capturePath, c.serve)
	mux.HandleFunc("POST "+captureStopPath("{id}"), func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		stop := c.stop[r.PathValue("id")]
		c.mu.Unlock()
		if stop != nil { // else it has ended by itself
			stop()
		}
		control.Reply(w, struct{}{})
	})
}

func (c *captures) serve(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	o := capture.Options{Session: q.Get(paramSession)}
	var err error
	if s := q.Get(paramSnapLen); s != "" {
		o.SnapLen, err = strconv.Atoi(s)
	}
	if s := q.Get(paramCount); s != "" && err == nil {
		o.Count, err = strconv.ParseUint(s, 10, 64)
	}
	if err != nil {
		control.Fail(w, http.StatusUnprocessableEntity, err)
		return
	}
	var ends <-chan struct{} // closed when the captured session ends; nil: all sessions
	if o.Session != "" {
		if ends, err = c.session(o.Session); err != nil {
			control.Fail(w, http.StatusNotFound, err)
			return
		}
	}
	ctx, stop := context.WithCancel(r.Context())
	defer stop()
	c.mu.Lock()
	if len(c.stop) >= maxCaptures {
		c.mu.Unlock()
		control.Fail(w, http.StatusServiceUnavailable,
			fmt.Errorf("%d captures are running already", maxCaptures))
		return
	}
	c.lastID++
	id := strconv.Itoa(c.lastID)
	c.stop[id] = stop
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.stop, id)
		c.mu.Unlock()
	}()
	go func() {
		select {
		case <-ends:
		case <-c.ended:
		case <-ctx.Done():
		}
		stop()
	}()

	h := w.Header()
	h.Set("Content-Type", "application/vnd.tcpdump.pcap")
	h.Set(captureID, id)
	h.Add("Trailer", captureCaptured)
	h.Add("Trailer", captureDropped)
	running := c.tap.Start(o)
	c.logger.Info("packets inside the tunnel are captured by the operator", "session", o.Session)
	// a caller that is gone wants no more
	_ = running.Write(ctx, flushed{w, http.NewResponseController(w)})
	captured, dropped := running.Counts()
	c.logger.Info("capture ended", "session", o.Session, "captured", captured, "dropped", dropped)
	h.Set(captureCaptured, strconv.FormatUint(captured, 10))
	h.Set(captureDropped, strconv.FormatUint(dropped, 10))
}

// flushed sends each part of an answer at once.
type flushed struct {
	w     io.Writer
	flush *http.ResponseController
}

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.flush.Flush()
	}
	return n, err
}

// CaptureFlags are those of the command capture.
type CaptureFlags struct {
	out     string
	snapLen int
	count   uint64
}

// CaptureText is what `capture` is, for its help.
const CaptureText = `The file is for tcpdump and Wireshark, also while it grows. It has the IP packets as they are inside the tunnel, in both
directions, until SIGINT or SIGTERM; what was dropped by policy or for its size is not there. What does not get written in time
is left out and counted: packets never wait for it.

Who captures reads what others send: the file is 0600.`

// Add adds the flags to a command.
func (f *CaptureFlags) Add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.out, "output", "o", "", "`FILE` to write, - for standard output")
	cmd.Flags().IntVar(&f.snapLen, "snaplen", capture.MaxSnapLen, "`bytes` to keep of each packet")
	cmd.Flags().Uint64VarP(&f.count, "count", "c", 0, "end after so many packets, 0 for no end")
	cobra.CheckErr(cmd.MarkFlagRequired("output"))
}

// Capture writes what passes in a running instance until the command is
// interrupted, or the capture ends by itself. Errors of the instance are those
// of control.Client.
func (f *CaptureFlags) Capture(cmd *cobra.Command, instance *control.Client, session string) error {
	if f.snapLen < 1 || f.snapLen > capture.MaxSnapLen {
		return Errorf(Usage, "--snaplen %d: write a number from 1 to %d", f.snapLen,
			capture.MaxSnapLen)
	}
	if f.out == "-" && isTerminal(cmd.OutOrStdout()) {
		return &Error{Code: Usage, Reason: "packets are nothing for a terminal",
			Remedy: "write to a file with -o FILE, or into a pipe: | tcpdump -nr -"}
	}
	// A second signal ends the process as if nobody cared for signals.
	interrupted, again := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer again()
	q := url.Values{paramSession: {session}, paramSnapLen: {strconv.Itoa(f.snapLen)},
		paramCount: {strconv.FormatUint(f.count, 10)}}
	answer, err := instance.Open(cmd.Context(), capturePath+"?"+q.Encode())
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	defer context.AfterFunc(interrupted, func() {
		again()
		ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
		defer cancel()
		// if it has ended, so does what follows
		_ = instance.Post(ctx, captureStopPath(answer.Header.Get(captureID)), nil)
	})()
	out := cmd.OutOrStdout()
	if f.out != "-" {
		file, err := OpenSecret(f.out, os.O_WRONLY|os.O_TRUNC)
		if err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	_, err = io.Copy(out, answer.Body)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return &Error{Code: Failure, Reason: "the program ended while it was captured",
			Remedy: "what was written until then can be read"}
	case err != nil:
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s packets captured, %s more were not written in time\n",
		cmd.Root().Name(),
		answer.Trailer.Get(captureCaptured), answer.Trailer.Get(captureDropped))
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// OpenPCAP has all that passes tap written to the file of log.pcap, if one is
// named, until the function is called that it returns. A file of the run before
// is kept beside it, as FILE.1.
func OpenPCAP(keys Keys, path string, tap *capture.Tap, logger *slog.Logger) (func(), error) {
	if path == "" {
		return func() {}, nil
	}
	f, err := replaceCapture(path)
	if err != nil {
		return nil, keys.Problem("log.pcap", err.Error(), "name a file that can be written")
	}
	logger.Warn("packets inside the tunnel are written to a file: whoever reads it reads what was sent", "file", path)
	ctx, stop := context.WithCancel(context.Background())
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
		stop()
		<-done
		captured, dropped := running.Counts()
		logger.Info("capture ended", "file", path, "captured", captured, "dropped", dropped)
	}, nil
}

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
