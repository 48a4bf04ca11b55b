package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/client"
	"masquevpn/internal/buildinfo"
	"masquevpn/internal/capture"
	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
	"masquevpn/internal/systemd"
)

// startGrace is how long after its start a tunnel that has not failed counts
// as started: opening the device and setting up the network take milliseconds.
const startGrace = 500 * time.Millisecond

func (o *options) runCommand() *cobra.Command {
	var file string
	var service bool
	var notifyFD int
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Connect in the foreground", Args: cobra.NoArgs,
		Long: "Connect in the foreground until SIGINT or SIGTERM; a second one forces the end.\n" +
			"The base name of the file is the name of the tunnel.\n\n" +
			"Started by hand, it ends when nobody can be dialed who proves to be the proxy, as with a certificate of another\n" +
			"authority. A service goes on trying: anybody on the way can answer in the proxy's place. Either ends when the\n" +
			"proxy refuses the user.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			notify, err := openNotifier(notifyFD)
			if err != nil {
				return err
			}
			err = o.run(cmd.Context(), file, service, notify)
			if err != nil {
				notify.failed(cli.FromError(cmd.ErrOrStderr(), err))
			}
			return err
		}),
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `FILE`")
	cmd.Flags().BoolVar(&service, "service", systemd.IsService(),
		"run as a service: nobody waits for the outcome of the start (default under systemd)")
	cmd.Flags().IntVar(&notifyFD, "notify-fd", -1, "file descriptor that `up` listens on")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
	cobra.CheckErr(cmd.Flags().MarkHidden("notify-fd"))
	return cmd
}

func (o *options) run(ctx context.Context, file string, service bool, notify *notifier) error {
	name, err := tunnelName(file)
	if err != nil {
		return err
	}
	l, err := load(file, name)
	if err != nil {
		return err
	}
	if err := privilege.RequireNetAdmin(capabilities); err != nil {
		return err
	}
	logger := o.Log.Logger(notify.log())
	l.config.Logger = logger
	l.follow(logger)
	l.config.Journal, l.config.Service = o.journal(name), service
	kill := l.killSwitch(name, logger)
	if l.file.KillSwitch {
		l.config.KillSwitch = kill
	}
	if l.file.KillSwitch || !l.file.DNSOutside {
		l.config.Nameservers = upstreamServers()
	}
	if l.config.Installation, err = o.installation(name, l.config.Proxy); err != nil {
		logger.Warn("the proxy cannot know this host again, so it may have other addresses after a restart", "error", err)
	}
	l.config.Instance = o.lastInstance(name, logger)
	tracer, closeTraces, err := l.traces().Open(l.config.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	l.config.Tracer = tracer
	l.config.Tap = new(capture.Tap)
	c, err := l.newClient()
	if err != nil {
		return err
	}

	lock, err := acquire(o.RunDir, name)
	if err != nil {
		return err
	}
	defer lock.Release()
	notify.locked()
	defer o.keepInstance(name, l.config.Instance, logger)()

	ctx, stop := daemon.SignalContext(ctx, logger)
	defer stop()
	closePCAP, err := daemon.OpenPCAP(l.file.PCAP, l.config.Tap, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closePCAP()
	t := &tunnel{
		client: c, tap: l.config.Tap, logger: logger, stop: stop, done: make(chan struct{}),
		leaf:   l.leaf,
		expiry: certs.ExpiryWarning{Name: "the client's own", Renewal: renewal, Logger: logger},
	}
	server, err := control.Serve(o.RunDir, name, t.handler(), logger)
	if err != nil {
		return err
	}
	v := buildinfo.Of(program)
	l.describe(logger).Info("starting", "program", program, "version", v.Version, "go", v.Go,
		"name", name, "config", file)

	monitor, err := l.serveMetrics(c, logger)
	if err != nil {
		return errors.Join(err, server.Close())
	}

	if l.file.KillSwitch {
		l.warnHeld(logger)
	} else { // it may have been on when this tunnel ran last
		if _, err := kill.Lift(); err != nil {
			logger.Warn("a kill switch that may be closed from before cannot be lifted",
				"error", err)
		}
	}
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		notify.follow(t)
	}()
	told := make(chan struct{})
	go func() {
		defer close(told)
		t.tell(ctx, systemd.NewService(logger))
	}()
	t.err = fault.Flatten(c.Run(ctx))
	switch closed := c.Status().KillSwitch != client.KillSwitchOff; {
	case !closed:
	case t.lift.Load() || errors.Is(context.Cause(ctx), daemon.ErrInterrupted):
		if _, err := kill.Lift(); err != nil {
			t.err = withRemedy(errors.Join(t.err, err), staysClosed(name))
		}
	case t.err == nil:
		logger.Warn(staysClosed(name))
	default:
		t.err = withRemedy(t.err, staysClosed(name))
	}
	close(t.done)
	<-reported
	<-told
	closeErr := server.Close()
	if monitor != nil {
		closeErr = errors.Join(closeErr, monitor.Close())
	}
	if t.err == nil {
		logger.Info("stopped", "name", name)
	}
	return errors.Join(t.err, closeErr)
}

// acquire takes the lock of a tunnel.
func acquire(runDir, name string) (*control.Lock, error) {
	lock, err := control.Acquire(runDir, name)
	switch {
	case errors.Is(err, control.ErrRunning):
		return nil, &fault.Error{Kind: fault.Failure, Reason: err.Error(),
			Remedy: "stop it first: " + program + " down " + name}
	case errors.Is(err, os.ErrPermission):
		return nil, &fault.Error{Kind: fault.Privileges, Reason: err.Error(),
			Remedy: "run it with sudo, or choose another folder with --run-dir"}
	}
	return lock, err
}

// tunnel is a running client as the control socket sees it.
type tunnel struct {
	client *client.Client
	tap    *capture.Tap
	logger *slog.Logger
	stop   context.CancelFunc
	lift   atomic.Bool // the kill switch, at the end
	done   chan struct{}
	err    error // result of Run, valid when done is closed

	leaf   func() *x509.Certificate // its own certificate; nil if it has none
	expiry certs.ExpiryWarning      // warns before the certificate expires
}

// stopped is the answer to a request to stop.
type stopped struct {
	Error string `json:"error,omitempty"` // what went wrong at the end
}

// Paths of the control socket.
const (
	statusPath = "/v1/status"
	watchPath  = "/v1/watch"
	stopPath   = "/v1/stop"
)

func (t *tunnel) handler() http.Handler {
	mux := http.NewServeMux()
	control.HandleCaptures(mux, t.tap, nil, t.done, t.logger)
	mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, _ *http.Request) {
		control.Reply(w, t.status())
	})
	mux.HandleFunc("GET "+watchPath, func(w http.ResponseWriter, r *http.Request) {
		var changed <-chan struct{}
		ended := false
		control.Stream(w, r, func(ctx context.Context) (any, bool) {
			if ended {
				return nil, false
			}
			if changed != nil {
				select {
				case <-changed:
				case <-t.done: // once more, for the last state
					ended = true
				case <-ctx.Done():
					return nil, false
				}
			}
			changed = t.client.Changed() // before the status, so that no change is missed
			return t.status(), true
		})
	})
	mux.HandleFunc("POST "+stopPath, func(w http.ResponseWriter, r *http.Request) {
		t.lift.Store(true)
		t.stop()
		select {
		case <-t.done:
		case <-r.Context().Done():
			return
		}
		var answer stopped
		if t.err != nil {
			answer.Error = t.err.Error()
		}
		control.Reply(w, answer)
	})
	return mux
}

// An event is what a tunnel in the background tells the `up` that started it:
// JSON values on a pipe.
type event struct {
	Event  string       `json:"event"`
	State  string       `json:"state,omitempty"`
	Code   fault.Kind   `json:"code,omitempty"`
	Reason string       `json:"reason,omitempty"`
	Error  *fault.Error `json:"error,omitempty"`
}

// Events.
const (
	eventStarted = "started" // the process lives and has not failed
	// State and Reason changed; Code is that of the last failure to connect
	eventState  = "state"
	eventFailed = "failed" // the process ends with Error
)

// notifier tells `up` how the start goes; nil tells nobody.
type notifier struct {
	pipe *os.File
}

func openNotifier(fd int) (*notifier, error) {
	if fd < 0 {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, fault.Errorf(fault.Usage,
			"--notify-fd %d is not a pipe: leave the flag to `up`", fd)
	}
	unix.CloseOnExec(fd)
	return &notifier{pipe: os.NewFile(uintptr(fd), "notify")}, nil
}

// log is where the log goes.
func (n *notifier) log() io.Writer {
	if n == nil {
		return os.Stderr
	}
	return daemon.LogFile(os.Stderr)
}

// locked empties the log of the run before: only now is it certain that none
// is writing to it.
func (n *notifier) locked() {
	if n != nil {
		_ = os.Stderr.Truncate(0) // a log that stays is no reason not to run
	}
}

func (n *notifier) send(e event) {
	if n != nil {
		_ = json.NewEncoder(n.pipe).Encode(e) // `up` may be gone
	}
}

func (n *notifier) failed(e *fault.Error) {
	n.send(event{Event: eventFailed, Error: e})
}

// follow reports the changes of the tunnel's state until its end.
func (n *notifier) follow(t *tunnel) {
	if n == nil {
		return
	}
	grace := time.NewTimer(startGrace)
	defer grace.Stop()
	started := false
	for {
		changed := t.client.Changed()
		s := t.client.Status()
		if s.Interface != "" && !started {
			started = true
			n.send(event{Event: eventStarted})
		}
		e := event{Event: eventState, State: s.State, Reason: s.Reason}
		if failure := t.client.Failure(); failure != nil {
			e.Code = failure.Kind
		}
		n.send(e)
		select {
		case <-changed:
		case <-grace.C:
			if !started {
				started = true
				n.send(event{Event: eventStarted})
			}
		case <-t.done:
			return
		}
	}
}
