package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"masquevpn/internal/acme"
	"masquevpn/internal/buildinfo"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
	"masquevpn/proxy"
)

func (o *options) runCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Serve in the foreground", Args: cobra.NoArgs,
		Long: "Serve in the foreground until SIGINT or SIGTERM; a second one forces the end. SIGHUP reads the configuration\n" +
			"again, like `reload`. The proxy reads the users file again when that changes.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), file)
		}),
	}
	configFlag(cmd, &file)
	return cmd
}

func (o *options) run(ctx context.Context, file string) error {
	logger := o.Log.Logger(os.Stderr)
	daemon.StandardLog(logger)
	l, err := load(file, logger)
	if err != nil {
		return err
	}
	if err := privilege.RequireNetAdmin(capabilities); err != nil {
		return err
	}
	p := newProcess(file, l, logger)
	c, err := o.prepare(p)
	if err != nil {
		return err
	}
	tracer, closeTraces, err := l.traces().Open(c.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	c.Tracer = tracer
	if p.server, err = l.newServer(c); err != nil {
		return err
	}

	lock, err := acquire(o.RunDir)
	if err != nil {
		return err
	}
	defer lock.Release()
	ctx, stop := daemon.SignalContext(ctx, logger)
	defer stop()

	v := buildinfo.Of(program)
	l.describe(logger).Info("starting", "program", program, "version", v.Version, "go", v.Go,
		"config", file, "certificate_until", until(p.certificateUntil()))
	tasks := []daemon.Task{
		p.metricsTask(ctx),
		daemon.Control(o.RunDir, instance, p.handler(), logger),
		daemon.NewReporter("watch", p.watch),
	}
	if p.acme != nil {
		tasks = append(tasks, acmeTask{p.acme})
	}
	err = daemon.Run(ctx, logger, append(tasks, proxyTask{p})...)
	if err == nil {
		logger.Info("stopped")
	}
	return err
}

// prepare returns the complete configuration of a proxy that runs.
func (o *options) prepare(p *process) (c proxy.Config, err error) {
	c = p.loaded.config(p.certificate)
	c.Logger, c.Tap = p.logger, p.tap
	c.Journal = filepath.Join(o.RunDir, instance+".journal")
	if c.StatelessResetKey, err = p.loaded.resetKey(); err != nil {
		return c, err
	}
	c.Sockets, err = p.loaded.sockets(p.logger)
	return c, err
}

// acquire takes the lock of the proxy.
func acquire(runDir string) (*control.Lock, error) {
	lock, err := control.Acquire(runDir, instance)
	switch {
	case errors.Is(err, control.ErrRunning):
		return nil, &fault.Error{Kind: fault.Failure,
			Reason: "a proxy is already running with the run directory " + runDir,
			Remedy: "stop it first, or choose another folder with --run-dir"}
	case errors.Is(err, os.ErrPermission):
		return nil, &fault.Error{Kind: fault.Privileges, Reason: err.Error(),
			Remedy: "run it with sudo, or choose another folder with --run-dir"}
	}
	return lock, err
}

// proxyTask runs the proxy itself.
type proxyTask struct{ *process }

func (t proxyTask) Run(ctx context.Context) error {
	defer close(t.ended)
	return fault.Flatten(t.server.Run(ctx))
}

func (t proxyTask) Ready() <-chan struct{} { return t.server.Ready() }
func (t proxyTask) String() string         { return "proxy" }

// acmeTask renews the certificate. It is ready when there is one.
type acmeTask struct{ *acme.Manager }

func (t acmeTask) Run(ctx context.Context) error {
	t.Manager.Run(ctx)
	return nil
}

func (t acmeTask) String() string { return "ACME" }
