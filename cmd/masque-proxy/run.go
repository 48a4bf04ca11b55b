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
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/acme"
	"masquevpn/internal/buildinfo"
	"masquevpn/internal/capture"
	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
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
	d := newProcess(file, l, logger)
	c, err := o.prepare(d)
	if err != nil {
		return err
	}
	tracer, closeTraces, err := l.traces().Open(c.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	c.Tracer = tracer
	if d.server, err = l.newServer(c); err != nil {
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
		"config", file, "certificate_until", until(d.certificateUntil()))
	tasks := []daemon.Task{
		d.metricsTask(ctx),
		daemon.Control(o.RunDir, instance, d.handler(), logger),
		daemon.NewReporter("watch", d.watch),
	}
	if d.acme != nil {
		tasks = append(tasks, acmeTask{d.acme})
	}
	err = daemon.Run(ctx, append(tasks, proxyTask{d})...)
	if err == nil {
		logger.Info("stopped")
	}
	return err
}

// prepare returns the complete configuration of a proxy that runs.
func (o *options) prepare(d *process) (c proxy.Config, err error) {
	c = d.loaded.config(d.certificate)
	c.Logger, c.Tap = d.logger, d.tap
	c.Journal = filepath.Join(o.RunDir, instance+".journal")
	if c.StatelessResetKey, err = d.loaded.resetKey(); err != nil {
		return c, err
	}
	c.Sockets, err = d.loaded.sockets(d.logger)
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

// process is a running proxy.
type process struct {
	path    string // name of the configuration file
	logger  *slog.Logger
	service *systemd.Service
	server  *proxy.Server
	tap     *capture.Tap
	ended   chan struct{} // closed when the server has stopped
	loaded  *loaded       // configuration of the start
	expiry  certs.ExpiryWarning

	// One of these has the certificate; the other one is nil.
	acme *acme.Manager
	pair *certs.Reloader
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
	// watchInterval is the time between two reports to systemd.
	watchInterval = time.Second
	// usersInterval is the time between two checks of the users file if nobody
	// connects. A removal takes effect within a second.
	usersInterval = 250 * time.Millisecond
)

// watch reloads on SIGHUP, applies changes of the users file to the sessions,
// and reports to systemd. Its watchdog ends a proxy that hangs in one of these,
// or whose sessions are stuck.
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
				d.logger.Error("reload failed; nothing changes", "error", err)
			}
		case <-look.C:
			if before != nil {
				if now := d.loaded.users.current(); now != before {
					d.server.UsersChanged()
					before = now
				}
			}
		case <-tick.C:
			d.checkCertificate()
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

// describe tells systemd the state of the proxy, which is ready.
func (d *process) describe() {
	s := d.server.Status()
	d.service.Status(fmt.Sprintf("%d sessions, listening on %s", s.Sessions,
		strings.Join(s.Listen, ", ")))
}

// reload reads the configuration again. The next handshakes use the certificate
// and its key, and other changes take effect at once, except for the keys that
// it returns: they need a restart. After an error, nothing has changed.
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

// changed returns the keys that differ in two configurations and are used at
// the start only. It lacks the keys that Server.Reload returns.
func changed(a, b *loaded) []string {
	var keys []string
	compare := func(key string, a, b any) {
		if !reflect.DeepEqual(a, b) {
			keys = append(keys, key)
		}
	}
	compare("tls.acme", a.file.ACME, b.file.ACME)
	compare("tls.client_ca", fingerprints(a.clientCAs), fingerprints(b.clientCAs))
	compare("auth.users", a.file.UsersFile, b.file.UsersFile)
	compare("metrics.listen", a.file.Metrics, b.file.Metrics)
	compare("log.qlog_dir", a.file.QlogDir, b.file.QlogDir)
	compare("log.key_log", a.file.KeyLog, b.file.KeyLog)
	return keys
}

// socketName is the FileDescriptorName in masque-proxy.socket.
const socketName = "quic"

// sockets returns the sockets that systemd opened for the proxy. If there are
// any, the proxy ignores the key listen.
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
		logger.Warn("systemd opened other sockets than listen has: listen is ignored",
			"sockets", strings.Join(opened, ", "), "listen", strings.Join(l.file.Listen, ", "))
	}
	return sockets, nil
}

// canonical returns UDP addresses in sorted and uniform notation.
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
