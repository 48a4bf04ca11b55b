package main

import (
	"context"
	"errors"

	"masquevpn/internal/daemon"
	"masquevpn/internal/metrics"
	"masquevpn/internal/text"
)

// serveMetrics serves metrics, and whether the proxy works, as the
// configuration says. The server is nil when it is nowhere. ctx ends when the
// proxy stops.
func (d *process) serveMetrics(ctx context.Context) (*metrics.Server, error) {
	return daemon.ServeMetrics(program, d.loaded.file.Metrics, d.loaded.file.MetricsNamed,
		metrics.Config{
			Values: d.values, Well: d.server.Stuck, Ready: func() error {
				return d.readiness(ctx)
			}, Logger: d.logger,
		})
}

// readiness returns why the proxy does not accept clients, or does not carry
// their packets, nil when it does. ctx ends when it stops.
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

// values are what metrics show.
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
