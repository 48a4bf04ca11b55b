package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/congestion"
	"masquevpn/internal/control"
	"masquevpn/proxy"
)

func (o *options) runCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Serve in the foreground", Args: cobra.NoArgs,
		Long: "Serve in the foreground until SIGINT or SIGTERM; a second one forces the end. SIGHUP reads the configuration\n" +
			"again, as `reload` does. The users file is read again by itself when it changes.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context(), file) }),
	}
	configFlag(cmd, &file)
	return cmd
}

func (o *options) run(ctx context.Context, file string) error {
	logger := o.Log.Logger(os.Stderr)
	cli.StandardLog(logger)
	l, err := load(file, logger)
	if err != nil {
		return err
	}
	if err := cli.RequireNetAdmin(capabilities); err != nil {
		return err
	}
	d := &daemon{path: file, logger: logger, loaded: l}
	d.certificate.Store(&l.pair)
	c, err := l.config(d.certificate.Load)
	if err != nil {
		return err
	}
	c.Logger = logger
	c.Journal = filepath.Join(o.RunDir, instance+".journal")
	closeKeyLog, err := cli.OpenKeyLog(l.file, l.file.KeyLog, c.TLS, logger)
	if err != nil {
		return err
	}
	defer closeKeyLog()
	if d.server, err = l.newServer(c); err != nil {
		return err
	}

	lock, err := control.Acquire(o.RunDir, instance)
	switch {
	case errors.Is(err, control.ErrRunning):
		return &cli.Error{Code: cli.Failure, Reason: "a proxy is already running with the run directory " + o.RunDir, Remedy: "stop it first, or choose another folder with --run-dir"}
	case errors.Is(err, os.ErrPermission):
		return &cli.Error{Code: cli.Privileges, Reason: err.Error(), Remedy: "run it with sudo, or choose another folder with --run-dir"}
	case err != nil:
		return err
	}
	defer lock.Release()
	ctx, stop := cli.SignalContext(ctx, logger)
	defer stop()
	socket, err := control.Serve(o.RunDir, instance, d.handler(), logger)
	if err != nil {
		return err
	}

	v := cli.NewVersionInfo(program)
	users := 0
	if l.users != nil {
		users = len(l.users.last().All())
	}
	logger.Info("starting", "program", program, "version", v.Version, "go", v.Go, "name", l.file.Name, "config", file,
		"methods", strings.Join(l.file.Methods, ","), "users", users, "certificate_until", l.chain[0].NotAfter, "congestion", congestion.Mode(l.file.Congestion).Describe())
	watching := make(chan struct{})
	watchCtx, stopWatching := context.WithCancel(ctx)
	go func() {
		defer close(watching)
		d.watch(watchCtx)
	}()
	err = d.server.Run(ctx)
	stopWatching()
	<-watching
	closeErr := socket.Close()
	if err == nil {
		logger.Info("stopped")
	}
	return errors.Join(exitError(err), closeErr)
}

// daemon is a running proxy.
type daemon struct {
	path        string // of the configuration
	logger      *slog.Logger
	server      *proxy.Server
	loaded      *loaded // what it was started with
	certificate atomic.Pointer[tls.Certificate]
}

// watchInterval is how often the users file is looked at when nobody connects.
const watchInterval = time.Second

// watch reloads on SIGHUP, and ends the sessions of users whose credentials are
// not good any more.
func (d *daemon) watch(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var before *config.Users
	if d.loaded.users != nil {
		before = d.loaded.users.last()
	}
	for {
		select {
		case <-hangup:
			if _, err := d.reload(); err != nil {
				d.logger.Error("reload failed; all stays as it was", "err", err)
			}
		case <-tick.C:
			if before == nil {
				continue
			}
			if now := d.loaded.users.current(); now != before {
				d.server.UsersChanged()
				before = now
			}
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the configuration again. The certificate and its key are used
// from the next handshake on, and the rest at once; the keys that it returns
// have changed too, but need a restart. With an error, all stays as it was.
func (d *daemon) reload() (restart []string, err error) {
	l, err := load(d.path, d.logger)
	if err != nil {
		return nil, err
	}
	c, err := l.config(func() *tls.Certificate { return &l.pair })
	if err != nil {
		return nil, err
	}
	if _, err := l.newServer(c); err != nil {
		return nil, err
	}
	if restart, err = d.server.Reload(c); err != nil {
		return nil, exitError(err)
	}
	d.certificate.Store(&l.pair)
	restart = append(restart, changed(d.loaded, l)...)
	if users := d.loaded.users; users != nil {
		users.current()
		d.server.UsersChanged()
	}
	d.logger.Info("reloaded", "certificate_until", l.chain[0].NotAfter, "needs_restart", strings.Join(restart, ","))
	return restart, nil
}

// changed lists the keys that differ in two configurations, that the proxy
// itself does not know, and that are only used at the start.
func changed(a, b *loaded) []string {
	var keys []string
	compare := func(key string, a, b any) {
		if !reflect.DeepEqual(a, b) {
			keys = append(keys, key)
		}
	}
	compare("tls.client_ca", fingerprints(a.clientCAs), fingerprints(b.clientCAs))
	compare("auth.users", a.file.Users, b.file.Users)
	compare("log.key_log", a.file.KeyLog, b.file.KeyLog)
	return keys
}
