package daemon

import (
	"net"

	"masquevpn/internal/buildinfo"
	"masquevpn/internal/fault"
	"masquevpn/internal/metrics"
)

// ServeMetrics serves metrics of a program on a TCP address, "" for nowhere,
// until the server is closed. c lacks the Program. If the configuration does
// not name the address, another proxy on this host may have it: then
// ServeMetrics logs a warning and returns nil. Other errors are *fault.Errors
// with the key.
func ServeMetrics(program, addr string, named bool, c metrics.Config) (*metrics.Server, error) {
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
		c.Logger.Warn("metrics are not served", "reason", e.What(), "remedy", e.Remedy)
		return nil, nil
	}
	return nil, e
}
