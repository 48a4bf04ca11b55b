package daemon

import (
	"context"
	"net"

	"masquevpn/internal/buildinfo"
	"masquevpn/internal/fault"
	"masquevpn/internal/metrics"
)

// Metrics returns a task that serves metrics of a program on a TCP address, ""
// for nowhere. c lacks the Program. If the configuration does not name the
// address, another proxy on this host may have it: then the task logs a warning
// and serves nothing. Errors are *fault.Errors with the key.
func Metrics(program, addr string, named bool, c metrics.Config) Task {
	return NewTask("metrics", func(ctx context.Context, ready func()) error {
		server, err := serveMetrics(program, addr, named, c)
		if err != nil {
			return err
		}
		ready()
		<-ctx.Done()
		if server == nil {
			return nil
		}
		return server.Close()
	})
}

// serveMetrics returns nil if there is nothing to serve.
func serveMetrics(program, addr string, named bool, c metrics.Config) (*metrics.Server, error) {
	if addr == "" {
		return nil, nil
	}
	v := buildinfo.Of(program)
	c.Program = metrics.Program{Name: v.Program, Version: v.Version, Revision: v.Commit,
		GoVersion: v.Go}
	ln, err := net.Listen("tcp", addr)
	if err == nil {
		c.Logger.Info("serving metrics", "address", ln.Addr().String())
		return metrics.Serve(ln, c), nil
	}
	e := fault.ListenError("metrics.listen", "TCP", addr, err)
	if !named {
		c.Logger.Warn("metrics are not served", "reason", e.Summary(), "remedy", e.Remedy)
		return nil, nil
	}
	return nil, e
}
