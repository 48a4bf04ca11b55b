package main

import (
	"errors"
	"time"

	"masquevpn/client"
	"masquevpn/internal/daemon"
	"masquevpn/internal/metrics"
	"masquevpn/internal/text"
)

// metricsTask returns the task that serves metrics and the health of c.
func (l *loaded) metricsTask(c *client.Client) daemon.Task {
	return daemon.Metrics(program, l.file.Metrics, true, metrics.Config{
		Values: func() metrics.Values { return l.values(c) },
		Well:   c.Stuck,
		Ready:  func() error { return readiness(c.Status()) },
		Logger: l.config.Logger,
	})
}

// readiness returns nil if the tunnel carries packets, and the reason
// otherwise.
func readiness(s client.Status) error {
	switch {
	case s.State == client.StateConnected:
		return nil
	case s.Reason == "":
		return errors.New(s.State)
	}
	return errors.New(s.State + ": " + text.OneLine(s.Reason))
}

// values returns the values of the metrics.
func (l *loaded) values(c *client.Client) metrics.Values {
	counters, s := c.Counters(), c.Status()
	v := metrics.Values{Stats: &counters.Stats, Reconnects: counters.Reconnects,
		Repairs: s.KernelRepairs, Oldest: counters.Oldest, Panics: counters.Panics}
	v.WellKnownRequests = counters.Discovery.FileRequests
	for o, n := range counters.Discovery.Discoveries {
		v.Discoveries = append(v.Discoveries,
			metrics.Discovery{Step: o.Step, Result: o.Result, Count: n})
	}
	if client.HasSession(s) {
		v.Sessions, v.RTT, v.MTU = 1, time.Duration(s.RTT)*time.Microsecond, s.MTU
	}
	if leaf := l.leaf(); leaf != nil {
		v.CertificateExpiry = leaf.NotAfter
	}
	return v
}
