package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"syscall"
	"time"

	"masquevpn/internal/acme"
	"masquevpn/internal/capture"
	"masquevpn/internal/certs"
	"masquevpn/internal/config"
	"masquevpn/internal/fault"
	"masquevpn/internal/systemd"
	"masquevpn/proxy"
)

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
	p := &process{
		path: path, logger: logger, loaded: l, service: systemd.NewService(logger),
		tap: new(capture.Tap), ended: make(chan struct{}),
	}
	p.expiry = certs.ExpiryWarning{Name: l.certificateSource(), Renewal: l.renewal(),
		Logger: logger}
	if l.acme != nil {
		p.acme = acme.New(*l.acme)
	} else {
		p.pair = certs.NewReloader(l.pair, logger)
	}
	return p
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
func (p *process) watch(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	look := time.NewTicker(usersInterval)
	defer look.Stop()
	var before *config.Users
	if p.loaded.users != nil {
		before = p.loaded.users.last()
	}
	ready := p.server.Ready()
	for {
		select {
		case <-ready:
			ready = nil
			p.service.Ready()
			p.describe()
		case <-hangup:
			if _, err := p.reload(); err != nil {
				p.logger.Error("reload failed; nothing changes", "error", err)
			}
		case <-look.C:
			if before != nil {
				if now := p.loaded.users.current(); now != before {
					p.server.UsersChanged()
					before = now
				}
			}
		case <-tick.C:
			p.checkCertificate()
			if ready == nil {
				p.describe()
			} else if why := p.waiting(); why != "" {
				p.service.Waiting(why)
			}
			p.service.Health(p.server.Stuck())
		case <-ctx.Done():
			p.service.Stopping()
			return
		}
	}
}

// describe tells systemd the state of the proxy, which is ready.
func (p *process) describe() {
	s := p.server.Status()
	p.service.Status(fmt.Sprintf("%d sessions, listening on %s", s.Sessions,
		strings.Join(s.Listen, ", ")))
}

// reload reads the configuration again. The next handshakes use the certificate
// and its key, and other changes take effect at once, except for the keys that
// it returns: they need a restart. After an error, nothing has changed.
func (p *process) reload() (restart []string, err error) {
	select {
	case <-p.server.Ready():
		p.service.Reloading()
		defer p.service.Ready()
	default:
	}
	l, err := load(p.path, p.logger)
	if err != nil {
		return nil, err
	}
	c := l.config(nil)
	if _, err := l.newServer(c); err != nil {
		return nil, err
	}
	if restart, err = p.server.Reload(c); err != nil {
		return nil, fault.Flatten(err)
	}
	switch {
	case p.acme != nil:
		p.acme.Again()
	case l.acme == nil:
		p.pair.Set(l.pair)
	}
	restart = append(restart, changed(p.loaded, l)...)
	if users := p.loaded.users; users != nil {
		users.reload()
		p.server.UsersChanged()
	}
	p.logger.Info("reloaded", "certificate_until", until(p.certificateUntil()), "needs_restart",
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
