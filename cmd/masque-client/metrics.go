package main

import (
	"errors"
	"log/slog"
	"time"

	"masquevpn/client"
	"masquevpn/internal/daemon"
	"masquevpn/internal/metrics"
	"masquevpn/internal/text"
)

// serveMetrics serves metrics of c, and whether it is connected, as the
// configuration says. The server is nil when it is nowhere.
func (l *loaded) serveMetrics(c *client.Client, logger *slog.Logger) (*metrics.Server, error) {
	return daemon.ServeMetrics(program, l.file.Metrics, true, metrics.Config{
		Values: func() metrics.Values {
			return l.values(c)
		}, Well: c.Stuck, Ready: func() error { return readiness(c.Status()) }, Logger: logger,
	})
}

// readiness returns why the tunnel carries no packets, nil when it does.
func readiness(s client.Status) error {
	switch {
	case s.State == client.StateConnected:
		return nil
	case s.Reason == "":
		return errors.New(s.State)
	}
	return errors.New(s.State + ": " + text.OneLine(s.Reason))
}

// values are what metrics show.
func (l *loaded) values(c *client.Client) metrics.Values {
	counters, s := c.Counters(), c.Status()
	v := metrics.Values{Stats: &counters.Stats, Reconnects: counters.Reconnects,
		Repairs: s.KernelRepairs, Oldest: counters.Oldest, Panics: counters.Panics}
	if client.HasSession(s) {
		v.Sessions, v.RTT, v.MTU = 1, time.Duration(s.RTT)*time.Microsecond, s.MTU
	}
	if leaf := l.leaf(); leaf != nil {
		v.CertificateExpiry = leaf.NotAfter
	}
	return v
}
