package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/acme"
	"masquevpn/internal/buildinfo"
	"masquevpn/internal/capture"
	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/congestion"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
	"masquevpn/internal/systemd"
	"masquevpn/proxy"
)

func (o *options) runCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Serve in the foreground", Args: cobra.NoArgs,
		Long: "Serve in the foreground until SIGINT or SIGTERM; a second one forces the end. SIGHUP reads the configuration\n" +
			"again, as `reload` does. The users file is read again by itself when it changes.",
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
	d := newProcess(file, l, logger)
	c := l.config(d.certificate)
	if c.StatelessResetKey, err = l.resetKey(); err != nil {
		return err
	}
	c.Logger = logger
	if c.Sockets, err = l.sockets(logger); err != nil {
		return err
	}
	c.Journal = filepath.Join(o.RunDir, instance+".journal")
	tracer, closeTraces, err := l.traces().Open(c.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	c.Tracer = tracer
	c.Tap = d.tap
	if d.server, err = l.newServer(c); err != nil {
		return err
	}

	lock, err := control.Acquire(o.RunDir, instance)
	switch {
	case errors.Is(err, control.ErrRunning):
		return &fault.Error{Kind: fault.Failure,
			Reason: "a proxy is already running with the run directory " + o.RunDir,
			Remedy: "stop it first, or choose another folder with --run-dir"}
	case errors.Is(err, os.ErrPermission):
		return &fault.Error{Kind: fault.Privileges, Reason: err.Error(),
			Remedy: "run it with sudo, or choose another folder with --run-dir"}
	case err != nil:
		return err
	}
	defer lock.Release()
	ctx, stop := daemon.SignalContext(ctx, logger)
	defer stop()
	socket, err := control.Serve(o.RunDir, instance, d.handler(), logger)
	if err != nil {
		return err
	}

	v := buildinfo.Of(program)
	users := 0
	if l.users != nil {
		users = len(l.users.last().All())
	}
	logger.Info("starting", "program", program, "version", v.Version, "go", v.Go, "name",
		l.file.Name, "config", file,
		"methods", strings.Join(l.file.Methods, ","), "users", users, "certificate",
		l.certificateSource(), "certificate_until", until(d.certificateUntil()), "congestion",
		congestion.Mode(l.file.Congestion).Describe())
	monitor, err := d.serveMetrics(ctx)
	if err != nil {
		return errors.Join(err, socket.Close())
	}
	watchCtx, stopWatching := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { d.watch(watchCtx) })
	if d.acme != nil {
		watching.Go(func() { d.acme.Run(watchCtx) })
		select {
		case <-d.acme.Ready():
		case <-ctx.Done():
		}
	}
	if ctx.Err() == nil {
		err = d.server.Run(ctx)
	}
	stopWatching()
	watching.Wait()
	close(d.ended)
	closeErr := socket.Close()
	if monitor != nil {
		closeErr = errors.Join(closeErr, monitor.Close())
	}
	if err == nil {
		logger.Info("stopped")
	}
	return errors.Join(fault.Flatten(err), closeErr)
}

// process is a running proxy.
type process struct {
	path    string // name of the configuration file
	logger  *slog.Logger
	service *systemd.Service
	server  *proxy.Server
	tap     *capture.Tap
	ended   chan struct{}       // closed when the server has stopped
	loaded  *loaded             // what it was started with
	acme    *acme.Manager       // nil: the certificate is in files
	pair    *certs.Reloader     // nil: with ACME
	expiry  certs.ExpiryWarning // warns before the certificate expires
}

func newProcess(path string, l *loaded, logger *slog.Logger) *process {
	d := &process{
		path: path, logger: logger, loaded: l, service: systemd.NewService(logger),
		tap: new(capture.Tap), ended: make(chan struct{}),
	}
	d.expiry = certs.ExpiryWarning{Name: l.certificateSource(), Renewal: l.renewal(),
		Logger: logger}
	if l.acme != nil {
		d.acme = acme.New(*l.acme)
	} else {
		d.pair = certs.NewReloader(l.pair, logger)
	}
	return d
}

const (
	// watchInterval is how often systemd is told how the proxy is.
	watchInterval = time.Second
	// usersInterval is how often the users file is looked at when nobody
	// connects: a removal holds within a second.
	usersInterval = 250 * time.Millisecond
)

// watch reloads on SIGHUP, makes the sessions follow the users file, and tells
// systemd how the proxy is. The watchdog so ends a proxy that hangs in any of
// it, or whose sessions do not answer.
func (d *process) watch(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	look := time.NewTicker(usersInterval)
	defer look.Stop()
	var before *config.Users
	if d.loaded.users != nil {
		before = d.loaded.users.last()
	}
	ready := d.server.Ready()
	for {
		select {
		case <-ready:
			ready = nil
			d.service.Ready()
			d.describe()
		case <-hangup:
			if _, err := d.reload(); err != nil {
				d.logger.Error("reload failed; all stays as it was", "error", err)
			}
		case <-look.C:
			if before != nil {
				if now := d.loaded.users.current(); now != before {
					d.server.UsersChanged()
					before = now
				}
			}
		case <-tick.C:
			d.lookAtCertificate()
			if ready == nil {
				d.describe()
			} else if why := d.waiting(); why != "" {
				d.service.Waiting(why)
			}
			d.service.Health(d.server.Stuck())
		case <-ctx.Done():
			d.service.Stopping()
			return
		}
	}
}

// describe tells systemd what the proxy, which is ready, does.
func (d *process) describe() {
	s := d.server.Status()
	d.service.Status(fmt.Sprintf("%d sessions, listening on %s", s.Sessions,
		strings.Join(s.Listen, ", ")))
}

// reload reads the configuration again. The certificate and its key are used
// from the next handshake on, and the rest at once; the keys that it returns
// have changed too, but need a restart. With an error, all stays as it was.
func (d *process) reload() (restart []string, err error) {
	select {
	case <-d.server.Ready():
		d.service.Reloading()
		defer d.service.Ready()
	default:
	}
	l, err := load(d.path, d.logger)
	if err != nil {
		return nil, err
	}
	c := l.config(nil)
	if _, err := l.newServer(c); err != nil {
		return nil, err
	}
	if restart, err = d.server.Reload(c); err != nil {
		return nil, fault.Flatten(err)
	}
	switch {
	case d.acme != nil:
		d.acme.Again()
	case l.acme == nil:
		d.pair.Set(l.pair)
	}
	restart = append(restart, changed(d.loaded, l)...)
	if users := d.loaded.users; users != nil {
		users.reload()
		d.server.UsersChanged()
	}
	d.logger.Info("reloaded", "certificate_until", until(d.certificateUntil()), "needs_restart",
		strings.Join(restart, ","))
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
	compare("tls.acme", a.file.ACME, b.file.ACME)
	compare("tls.client_ca", fingerprints(a.clientCAs), fingerprints(b.clientCAs))
	compare("auth.users", a.file.Users, b.file.Users)
	compare("metrics.listen", a.file.Metrics, b.file.Metrics)
	compare("log.qlog_dir", a.file.QlogDir, b.file.QlogDir)
	compare("log.key_log", a.file.KeyLog, b.file.KeyLog)
	return keys
}

// socketName is what masque-proxy.socket calls the sockets that it opens.
const socketName = "quic"

// sockets returns the sockets that systemd opened for the proxy, none if there
// are none. They count instead of what the configuration says.
func (l *loaded) sockets(logger *slog.Logger) ([]*net.UDPConn, error) {
	sockets, err := systemd.UDPSockets(socketName)
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage, Reason: "from systemd: " + err.Error(),
			Remedy: "correct masque-proxy.socket"}
	}
	var opened []string
	for _, c := range sockets {
		opened = append(opened, c.LocalAddr().String())
	}
	if len(opened) > 0 && !slices.Equal(canonical(opened), canonical(l.file.Listen)) {
		logger.Warn("systemd opened other sockets than the configuration says: listen is ignored",
			"sockets", strings.Join(opened, ", "), "listen", strings.Join(l.file.Listen, ", "))
	}
	return sockets, nil
}

// canonical sorts UDP addresses that are written in the same way.
func canonical(addrs []string) []string {
	var list []string
	for _, s := range addrs {
		if a, err := net.ResolveUDPAddr("udp", s); err == nil {
			if a.IP == nil {
				a.IP = net.IPv6unspecified
			}
			s = a.String()
		}
		list = append(list, s)
	}
	slices.Sort(list)
	return list
}
