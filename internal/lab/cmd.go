package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cmd is a program in a host. Exported fields have the meaning that they have
// in [exec.Cmd] and may be set before Start. If Stdout or Stderr is nil, that
// output goes to the program's log.
type Cmd struct {
	Args           []string // the program and its arguments
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Env            []string // nil: this process's environment
	Dir            string

	// Foreground leaves the program in this process's group, so that it may
	// read from the terminal.
	Foreground bool

	host *Host
	ctx  context.Context
	exec atomic.Pointer[exec.Cmd] // set by Start
	log  string                   // path, set by Start
	done chan struct{}
	err  error // valid when done is closed
}

// Command describes a program to run in the host. Its log is the artifact
// HOST-N-NAME.log, unless it stays empty. The end of ctx kills the program and
// its process group. Lab.Close also kills other processes that it left in the
// host.
func (h *Host) Command(ctx context.Context, name string, args ...string) *Cmd {
	return &Cmd{host: h, ctx: ctx, Args: append([]string{name}, args...), done: make(chan struct{})}
}

// String returns the command line.
func (c *Cmd) String() string { return strings.Join(c.Args, " ") }

// Start starts the program and does not wait for it. It may be called once.
func (c *Cmd) Start() error {
	ctx, cancel := context.WithCancel(c.ctx)
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	if !c.exec.CompareAndSwap(nil, cmd) {
		cancel()
		return fmt.Errorf("lab: host %s: %s was already started", c.host.name, c)
	}
	if err := c.start(cmd); err != nil {
		cancel()
		c.err = fmt.Errorf("lab: host %s: start %s: %w", c.host.name, c.Args[0], err)
		close(c.done)
		return c.err
	}
	stop := context.AfterFunc(c.host.lab.ctx, cancel)
	go func() {
		defer cancel()
		defer stop()
		err := cmd.Wait()
		if errors.Is(err, exec.ErrWaitDelay) { // the program itself succeeded
			err = nil
		}
		if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		if err != nil {
			c.err = fmt.Errorf("lab: host %s: %s: %w", c.host.name, c, err)
		}
		close(c.done)
	}()
	return nil
}

// start fills in cmd and starts it on the host's thread.
func (c *Cmd) start(cmd *exec.Cmd) error {
	log, err := c.host.lab.artifact(c.host, filepath.Base(c.Args[0]), "log")
	if err != nil {
		return err
	}
	defer log.Close() // the program has a descriptor of its own
	c.log = log.Name()

	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env, cmd.Dir = c.Stdin, c.Stdout, c.Stderr, c.Env, c.Dir
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = log
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: !c.Foreground}
	cmd.Cancel = func() error {
		if c.Foreground {
			return cmd.Process.Kill()
		}
		return unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	// Daemons may keep the output open after the program has ended.
	cmd.WaitDelay = time.Second

	l := c.host.lab
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return errClosed
	}
	l.cmds = append(l.cmds, c)
	l.mu.Unlock()
	return c.host.run(cmd.Start)
}

// Done is closed when the program has ended.
func (c *Cmd) Done() <-chan struct{} { return c.done }

// Wait waits for the program to end. The error, if any, wraps an
// [exec.ExitError] when the program ran.
func (c *Cmd) Wait() error {
	<-c.done
	return c.err
}

// Run starts the program and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns its standard output. Standard error goes
// to the log.
func (c *Cmd) Output() ([]byte, error) {
	var b bytes.Buffer
	c.Stdout = &b
	err := c.Run()
	return b.Bytes(), err
}

// CombinedOutput runs the program and returns its standard output and standard
// error.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var b bytes.Buffer
	c.Stdout, c.Stderr = &b, &b
	err := c.Run()
	return b.Bytes(), err
}

// Signal sends s to the program.
func (c *Cmd) Signal(s os.Signal) error {
	cmd := c.exec.Load()
	if cmd == nil || cmd.Process == nil {
		return fmt.Errorf("lab: host %s: signal %s: not started", c.host.name, c.Args[0])
	}
	return cmd.Process.Signal(s)
}

// Stop sends SIGTERM and waits for the program to end. When ctx ends first, it
// kills the program and returns the context's error.
func (c *Cmd) Stop(ctx context.Context) error {
	if err := c.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		c.Signal(unix.SIGKILL)
		<-c.done
		return fmt.Errorf("lab: host %s: %s did not end after SIGTERM: %w", c.host.name, c,
			ctx.Err())
	}
}

// PID returns the process ID of a started program, inside the lab.
func (c *Cmd) PID() int { return c.exec.Load().Process.Pid }

// ExitCode returns the program's exit code, or -1 while it runs, after a signal
// ended it, or when it did not start.
func (c *Cmd) ExitCode() int {
	select {
	case <-c.done:
		return c.exec.Load().ProcessState.ExitCode()
	default:
		return -1
	}
}

// LogFile returns the path of the log of a started program.
func (c *Cmd) LogFile() string { return c.log }

// Log returns the log of a started program so far.
func (c *Cmd) Log() (string, error) {
	b, err := os.ReadFile(c.log)
	return string(b), err
}
