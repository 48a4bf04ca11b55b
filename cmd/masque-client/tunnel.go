package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"masquevpn/client"
	"masquevpn/internal/capture"
	"masquevpn/internal/certs"
	"masquevpn/internal/control"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/systemd"
	"masquevpn/internal/text"
)

// tunnel is a running client.
type tunnel struct {
	name   string
	loaded *loaded
	client *client.Client
	tap    *capture.Tap
	logger *slog.Logger
	stop   context.CancelFunc // ends the program
	expiry certs.ExpiryWarning

	// lift makes the end of the tunnel lift the kill switch.
	lift atomic.Bool

	// done is closed when the tunnel has ended. err is its error, valid then.
	done chan struct{}
	err  error
}

// newTunnel returns a tunnel that does not run yet. stop ends the program.
func newTunnel(l *loaded, c *client.Client, name string, stop context.CancelFunc) *tunnel {
	logger := l.config.Logger
	return &tunnel{
		name: name, loaded: l, client: c, tap: l.config.Tap, logger: logger, stop: stop,
		done: make(chan struct{}),
		expiry: certs.ExpiryWarning{Name: "the client's own", Renewal: renewal,
			Logger: logger},
	}
}

// run runs the client until ctx is done, and decides about the kill switch. The
// cause of signals is daemon.ErrInterrupted if the user stopped the program.
func (t *tunnel) run(ctx, signals context.Context) error {
	defer close(t.done)
	kill := t.loaded.killSwitch(t.name)
	if t.loaded.file.UseKillSwitch {
		t.loaded.warnBlocked(t.logger)
	} else if _, err := kill.Lift(); err != nil { // an earlier run may have closed it
		t.logger.Warn("the kill switch of an earlier run cannot be lifted",
			"error", err)
	}
	t.err = fault.Flatten(t.client.Run(ctx))
	switch closed := t.client.Status().KillSwitch != client.KillSwitchOff; {
	case !closed:
	case t.lift.Load() || errors.Is(context.Cause(signals), daemon.ErrInterrupted):
		if _, err := kill.Lift(); err != nil {
			t.err = withRemedy(errors.Join(t.err, err), staysClosed(t.name))
		}
	case t.err == nil:
		t.logger.Warn(staysClosed(t.name))
	default:
		t.err = withRemedy(t.err, staysClosed(t.name))
	}
	return t.err
}

// status returns the status of the client with the end of its certificate.
func (t *tunnel) status() client.Status {
	s := t.client.Status()
	if leaf := t.loaded.leaf(); leaf != nil {
		s.CertificateUntil = &leaf.NotAfter
	}
	return s
}

// reportInterval is the time between two keep-alives for systemd's watchdog.
const reportInterval = 5 * time.Second

// report tells systemd the state of the tunnel until ctx is done or the tunnel
// has ended. The service is ready when the interface exists: a proxy that does
// not answer must not delay the start of a host. The watchdog is fed while the
// tunnel is healthy. report also warns of a certificate that expires.
func (t *tunnel) report(ctx context.Context) {
	service := systemd.NewService(t.logger)
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	ready := false
	for {
		changed := t.client.Changed()
		s := t.client.Status()
		if s.Interface != "" && !ready {
			ready = true
			service.Ready()
		}
		status := s.State
		if s.Reason != "" {
			status += ": " + text.OneLine(s.Reason)
		}
		service.Status(status)
		if leaf := t.loaded.leaf(); leaf != nil {
			t.expiry.Check(leaf, time.Now())
		}
		select {
		case <-changed:
		case <-tick.C:
			service.Health(t.client.Stuck())
		case <-ctx.Done():
			service.Stopping()
			return
		case <-t.done:
			return
		}
	}
}

// The paths of the control socket.
const (
	statusPath = "/v1/status"
	watchPath  = "/v1/watch"
	stopPath   = "/v1/stop"
)

// stopped is the response to a request to stop.
type stopped struct {
	Error string `json:"error,omitempty"` // failure to restore the host
}

// handler returns the handler of the control socket.
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
