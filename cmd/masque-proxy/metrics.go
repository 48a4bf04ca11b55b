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
func (p *process) metricsTask(ctx context.Context) daemon.Task {
	return daemon.Metrics(program, p.loaded.file.Metrics, p.loaded.file.MetricsNamed,
		metrics.Config{
			Values: p.values,
			Well:   p.server.Stuck,
			Ready:  func() error { return p.readiness(ctx) },
			Logger: p.logger,
		})
}

// readiness returns nil if the proxy accepts clients and forwards their
// packets, and the reason otherwise. ctx is done when the proxy stops.
func (p *process) readiness(ctx context.Context) error {
	if ctx.Err() != nil {
		return errors.New("the proxy is stopping")
	}
	select {
	case <-p.server.Ready():
		if problem := p.server.Problem(); problem != "" {
			return errors.New(text.OneLine(problem))
		}
		return nil
	default:
		return errors.New(p.starting())
	}
}

// values returns the values of the metrics.
func (p *process) values() metrics.Values {
	c := p.server.Counters()
	v := metrics.Values{Stats: &c.Stats, Repairs: c.KernelRepairs, Oldest: c.Oldest,
		Panics: c.Panics, Sessions: c.Sessions, MaxSessions: c.MaxSessions, UDPFlows: c.UDPFlows,
		MaxUDPFlows: c.MaxUDPFlows, AuthFailures: c.AuthFailures}
	v.PendingConnections, v.ConnectionsEnded = c.PendingConnections, c.ConnectionsEnded
	for _, r := range c.Requests {
		v.Requests = append(v.Requests, metrics.Request(r))
	}
	for _, pool := range c.Pool {
		v.Pool = append(v.Pool, metrics.Pool(pool))
	}
	if peers := c.Peers; peers != nil {
		v.PeerPairs, v.PeerRequests, v.PeerRevocations = peers.Pairs, peers.Requests,
			peers.Revocations
		v.PeerStates = make(map[string]int)
		for state, n := range peers.States {
			v.PeerStates[string(state)] = n
		}
		for o, n := range peers.Verifications {
			v.PeerVerifications = append(v.PeerVerifications,
				metrics.PeerVerification{Identity: o.Identity, Result: o.Result, Count: n})
		}
	}
	v.CertificateExpiry = p.certificateUntil()
	return v
}
