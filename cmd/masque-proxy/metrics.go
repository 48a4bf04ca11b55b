package main

import (
	"context"
	"errors"

	"masquevpn/internal/daemon"
	"masquevpn/internal/metrics"
	"masquevpn/internal/text"
)

// metricsTask returns the task that serves metrics and the health of the proxy.
// ctx is done when the proxy stops.
func (d *process) metricsTask(ctx context.Context) daemon.Task {
	return daemon.Metrics(program, d.loaded.file.Metrics, d.loaded.file.MetricsNamed,
		metrics.Config{
			Values: d.values,
			Well:   d.server.Stuck,
			Ready:  func() error { return d.readiness(ctx) },
			Logger: d.logger,
		})
}

// readiness returns nil if the proxy accepts clients and forwards their
// packets, and the reason otherwise. ctx is done when the proxy stops.
func (d *process) readiness(ctx context.Context) error {
	if ctx.Err() != nil {
		return errors.New("the proxy is stopping")
	}
	select {
	case <-d.server.Ready():
		if problem := d.server.Problem(); problem != "" {
			return errors.New(text.OneLine(problem))
		}
		return nil
	default:
		return errors.New(d.starting())
	}
}

// values returns the values of the metrics.
func (d *process) values() metrics.Values {
	c := d.server.Counters()
	v := metrics.Values{Stats: &c.Stats, Repairs: c.KernelRepairs, Oldest: c.Oldest,
		Panics: c.Panics, Sessions: c.Sessions, MaxSessions: c.MaxSessions, UDPFlows: c.UDPFlows,
		MaxUDPFlows: c.MaxUDPFlows, AuthFailures: c.AuthFailures}
	v.PendingConnections, v.ConnectionsEnded = c.PendingConnections, c.ConnectionsEnded
	for _, r := range c.Requests {
		v.Requests = append(v.Requests, metrics.Request(r))
	}
	for _, p := range c.Pool {
		v.Pool = append(v.Pool, metrics.Pool(p))
	}
	v.CertificateExpiry = d.certificateUntil()
	return v
}
