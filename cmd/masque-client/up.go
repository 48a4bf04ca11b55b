package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
)

// restoreTimeout limits the time for a tunnel to end and restore the host.
const restoreTimeout = 15 * time.Second

func (o *options) upCommand() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "up NAME|FILE", Short: "Connect in the background", Args: cobra.ExactArgs(1),
		Long: "Connect in the background. NAME stands for NAME.toml in the configuration folder; an argument with a slash or\n" +
			"with the suffix .toml is a file. The log is NAME.log in the run directory, the newest 2 to 4 MiB of it.\n\n" +
			"Without --wait, the command returns when the tunnel has started, which then keeps trying to connect. With --wait,\n" +
			"it returns when packets flow; after the timeout or an interrupt, it takes the tunnel down again.",
		ValidArgsFunction: o.completeConfigured,
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			return o.up(cmd.Context(), args[0], wait, timeout)
		}),
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return when packets flow")
	timeoutFlag(cmd, &timeout, 30*time.Second)
	return cmd
}

// timeoutFlag adds --timeout to a command.
func timeoutFlag(cmd *cobra.Command, timeout *time.Duration, byDefault time.Duration) {
	*timeout = byDefault
	cmd.Flags().Var((*waitTime)(timeout), "timeout", "how long to wait")
}

// waitTime is a duration that is not negative.
type waitTime time.Duration

func (w *waitTime) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("it cannot be negative")
	}
	*w = waitTime(d)
	return err
}

func (w *waitTime) String() string { return time.Duration(*w).String() }
func (w *waitTime) Type() string   { return "duration" }

func (o *options) up(ctx context.Context, arg string, wait bool, timeout time.Duration) error {
	name, file, err := o.resolve(arg)
	if err != nil {
		return err
	}
	// The process in the background checks all this again. Here the errors come
	// before it is started.
	l, err := load(file, name)
	if err != nil {
		return err
	}
	if _, err := l.newClient(); err != nil {
		return err
	}
	if err := privilege.RequireNetAdmin(capabilities); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	b, err := o.startBackground(name, file)
	if err != nil {
		return err
	}
	defer b.events.Close()
	result := b.await(ctx, wait)
	if result == nil {
		return nil
	}
	if b.failed {
		return result
	}
	end := syscall.SIGTERM // leaves the kill switch closed
	if b.interrupted {
		end = syscall.SIGINT
	} else if l.file.UseKillSwitch {
		result = withRemedy(result, staysClosed(name))
	}
	if err := b.takeDown(end); err != nil {
		result.Reason += "; " + err.Error()
	}
	return result
}

// background is a tunnel in the background that this process started.
type background struct {
	options *options
	name    string
	process *exec.Cmd
	events  *os.File // read end of the pipe
	failed  bool     // the process has ended with an error

	interrupted bool // the user interrupted it

	lastReason string // reason of the tunnel's state

	// lastCode is the kind of the last failure to connect. 0: none.
	lastCode fault.Kind
}

// startBackground runs `run` in a session of its own. Its standard error is the
// log file; it reports failures through a pipe.
func (o *options) startBackground(name, file string) (*background, error) {
	// Taking the lock finds an unusable run directory or a running tunnel
	// early. The process in the background takes it again.
	lock, err := acquire(o.RunDir, name)
	if err != nil {
		return nil, err
	}
	if err := lock.Release(); err != nil {
		return nil, err
	}
	// The process in the background empties the log when it has the lock.
	log, err := daemon.OpenLogFile(o.logPath(name))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer write.Close()

	// The process runs in the root folder, so that it keeps no file system
	// busy. Names must be absolute.
	if file, err = filepath.Abs(file); err != nil {
		return nil, err
	}
	runDir, err := filepath.Abs(o.RunDir)
	if err != nil {
		return nil, err
	}
	stateDir, err := filepath.Abs(o.stateDir)
	if err != nil {
		return nil, err
	}
	const pipeFD = 3 // the first of ExtraFiles
	args := []string{"run", "--config=" + file, "--run-dir=" + runDir, "--state-dir=" + stateDir,
		fmt.Sprintf("--notify-fd=%d", pipeFD)}
	cmd := exec.Command("/proc/self/exe", append(args, o.Log.Args()...)...)
	cmd.Args[0] = program
	cmd.Dir = "/"
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{write}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the tunnel in the background: %w", err),
			read.Close())
	}
	return &background{options: o, name: name, process: cmd, events: read}, nil
}

func (o *options) logPath(name string) string { return filepath.Join(o.RunDir, name+".log") }

// await reads events until the tunnel has started or, if wait is set, is
// connected. It returns an error if that will not happen.
func (b *background) await(ctx context.Context, wait bool) *fault.Error {
	defer context.AfterFunc(ctx, func() { _ = b.events.SetReadDeadline(time.Unix(1, 0)) })()
	decoder := json.NewDecoder(b.events)
	for {
		var e event
		err := decoder.Decode(&e)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) &&
			errors.Is(ctx.Err(), context.DeadlineExceeded):
			return b.late()
		case errors.Is(err, os.ErrDeadlineExceeded):
			b.interrupted = true
			return fault.Errorf(fault.Failure,
				"interrupted: the tunnel %s is taken down again", b.name)
		case err != nil: // it ended without an event
			b.failed = true
			if werr := b.process.Wait(); werr != nil {
				err = werr
			}
			if err == io.EOF {
				err = errors.New("it ended")
			}
			return &fault.Error{Kind: fault.Failure,
				Reason: fmt.Sprintf("the tunnel %s did not start (%v)", b.name, err),
				Remedy: "see " + b.options.logPath(b.name)}
		case e.Event == eventFailed && e.Error != nil:
			b.failed = true
			_ = b.process.Wait() // its exit code is the kind of e.Error
			return e.Error
		case e.Event == eventStarted && !wait:
			return nil
		case e.Event == eventState:
			b.lastReason, b.lastCode = e.Reason, e.Code
			if e.State == client.StateConnected {
				return nil
			}
		}
	}
}

// late returns the error for a timeout.
func (b *background) late() *fault.Error {
	reason := fmt.Sprintf("the tunnel %s was not connected in time and is taken down again", b.name)
	if b.lastReason != "" {
		reason = fmt.Sprintf("%s (%s)", reason, b.lastReason)
	}
	if b.lastCode == 0 || b.lastCode == fault.Unreachable {
		return &fault.Error{Kind: fault.Unreachable, Reason: reason,
			Remedy: "check the proxy, or give it more time with --timeout"}
	}
	return &fault.Error{Kind: b.lastCode, Reason: reason,
		Remedy: "see " + b.options.logPath(b.name)}
}

// takeDown ends the process with a signal, and the process restores the host.
func (b *background) takeDown(end syscall.Signal) error {
	if err := b.process.Process.Signal(end); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	ended := make(chan struct{})
	go func() { _ = b.process.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-time.After(restoreTimeout):
		return fmt.Errorf("process %d does not end", b.process.Process.Pid)
	}
}

func (o *options) downCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "down NAME", Short: "Disconnect and restore the host", Args: cobra.ExactArgs(1),
		Long: "Disconnect, wait until the host is restored, and lift the kill switch. If the tunnel was killed, or ended with its\n" +
			"kill switch closed, the command cleans up after it.",
		ValidArgsFunction: o.completeRunning,
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			name, err := tunnelName(args[0])
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return o.down(ctx, name)
		}),
	}
	timeoutFlag(cmd, &timeout, restoreTimeout)
	return cmd
}

func (o *options) down(ctx context.Context, name string) error {
	c := control.NewClient(o.RunDir, name)
	var answer stopped
	err := c.Post(ctx, stopPath, &answer)
	if err == nil {
		err = c.WaitGone(ctx)
	}
	switch {
	case errors.Is(err, control.ErrNotRunning):
		return o.cleanUp(name)
	case errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Kind: fault.Failure, Reason: fmt.Sprintf("%s is still stopping", name),
			Remedy: "see its log, or try again with a longer --timeout"}
	case err != nil:
		return err
	case answer.Error != "":
		return &fault.Error{Kind: fault.Failure,
			Reason: fmt.Sprintf("%s stopped with an error (%s)", name, answer.Error),
			Remedy: "the next start cleans up what is left"}
	}
	return nil
}

func notRunning(name string) error {
	if closedKillSwitch(name) {
		return &fault.Error{Kind: fault.NotConnected,
			Reason: name + ": not running, and its kill switch is closed",
			Remedy: fmt.Sprintf("connect with: %s up %s, or lift it with: %s down %s", program,
				name, program, name)}
	}
	return &fault.Error{Kind: fault.NotConnected, Reason: name + ": not running",
		Remedy: fmt.Sprintf("start it with: %s up %s", program, name)}
}
