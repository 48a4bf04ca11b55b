package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/buildinfo"
	"masquevpn/internal/capture"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
	"masquevpn/internal/systemd"
)

// startGrace is the time after which a tunnel that has not failed counts as
// started. Opening the device and setting up the network take milliseconds.
const startGrace = 500 * time.Millisecond

func (o *options) runCommand() *cobra.Command {
	var file string
	var service bool
	var notifyFD int
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Connect in the foreground", Args: cobra.NoArgs,
		Long: "Connect in the foreground until SIGINT or SIGTERM; a second one forces the end.\n" +
			"The base name of the file is the name of the tunnel.\n\n" +
			"Started by hand, it ends if the peer cannot prove to be the proxy, for example with a certificate of another\n" +
			"authority. A service keeps trying, because anybody on the path can answer in place of the proxy. Both end when\n" +
			"the proxy refuses the user.",
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
		"run as a service: nobody waits for the first connection (default under systemd)")
	cmd.Flags().IntVar(&notifyFD, "notify-fd", -1, "file descriptor that `up` reads from")
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
	o.prepare(l, name, service, logger)
	tracer, closeTraces, err := l.traces().Open(l.config.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	l.config.Tracer = tracer
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

	v := buildinfo.Of(program)
	l.describe(logger).Info("starting", "program", program, "version", v.Version, "go", v.Go,
		"name", name, "config", file)
	if list := l.unprotected(); len(list) > 0 {
		logger.Warn("answers of DNS servers that are trusted to validate signatures can be forged on the way",
			"servers", list)
	}
	t := newTunnel(l, c, name, stop)
	err = daemon.Run(ctx, logger,
		daemon.PCAP(l.file.PCAP, t.tap, logger),
		l.metricsTask(c),
		daemon.Control(o.RunDir, name, t.handler(), logger),
		daemon.NewTask("notifier", func(ctx context.Context, ready func()) error {
			ready()
			notify.follow(ctx, t)
			return nil
		}),
		daemon.NewReporter("systemd", t.report),
		daemon.NewTask("tunnel", func(running context.Context, ready func()) error {
			ready()
			return t.run(running, ctx)
		}))
	if err == nil {
		logger.Info("stopped", "name", name)
	}
	return l.file.Locate(err)
}

// prepare completes the configuration of a client that runs.
func (o *options) prepare(l *loaded, name string, service bool, logger *slog.Logger) {
	c := &l.config
	c.Logger, c.Journal, c.Service = logger, o.journal(name), service
	c.Tap = new(capture.Tap)
	l.follow(logger)
	if l.file.UseKillSwitch {
		c.KillSwitch = l.killSwitch(name)
	}
	if l.file.UseKillSwitch || l.file.DNS.Hold {
		c.Nameservers = upstreamServers()
	}
	var err error
	if c.Installation, err = o.installation(name, c.Proxy); err != nil {
		logger.Warn("the proxy cannot recognise this host, so it may have other addresses after a restart", "error", err)
	}
	c.Instance = o.lastInstance(name, logger)
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
