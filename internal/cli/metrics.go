package cli

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"

	"masquevpn/internal/metrics"
)

// metricsKey is where both programs are told where to serve metrics.
const metricsKey = "metrics.listen"

// ServeMetrics serves what a program counts on a TCP address until the server
// is closed. c lacks the Program. Of an address that the configuration names,
// it is an error when that cannot be listened on. Of the default one, which
// another proxy on this host may have, it is a warning, and there is no server.
// Neither is there one without an address.
func ServeMetrics(program, addr string, named bool, c metrics.Config) (*metrics.Server, error) {
	if addr == "" {
		return nil, nil
	}
	v := NewVersionInfo(program)
	c.Program = metrics.Program{Name: v.Program, Version: v.Version, Revision: v.Commit,
		GoVersion: v.Go}
	ln, err := net.Listen("tcp", addr)
	if err == nil {
		c.Logger.Info("serving metrics", "address", ln.Addr().String())
		return metrics.Serve(ln, c), nil
	}
	reason, remedy := listenProblem(metricsKey, "TCP", addr, err)
	if !named {
		c.Logger.Warn("metrics are not served", "reason", reason, "remedy", remedy)
		return nil, nil
	}
	code := Failure
	if errors.Is(err, os.ErrPermission) {
		code = Privileges
	}
	return nil, &Error{Code: code, Reason: reason, Remedy: remedy}
}

// Listen checks that an address can be listened on, by doing it. key names it
// in the configuration, protocol is TCP or UDP.
func (c *Checks) Listen(key, protocol, addr string) {
	if err := tryListen(protocol, addr); err != nil {
		reason, remedy := listenProblem(key, protocol, addr, err)
		c.Fail(reason, remedy)
		return
	}
	c.OK("%s: %s %s is free", key, protocol, addr)
}

// Metrics checks that metrics can be served on addr, "" for nowhere, and that
// they are not for everybody. An address that the configuration does not name
// need not be free.
func (c *Checks) Metrics(addr string, named bool) {
	if addr == "" {
		return
	}
	if err := tryListen("TCP", addr); err != nil && !named {
		reason, remedy := listenProblem(metricsKey, "TCP", addr, err)
		c.Warn(reason+"; metrics will not be served", remedy)
		return
	}
	c.Listen(metricsKey, "TCP", addr)
	if a, err := netip.ParseAddrPort(addr); err != nil || !a.Addr().Unmap().IsLoopback() {
		c.Warn(metricsKey+": not only this host reaches TCP "+addr,
			"everybody who does can read the metrics: let a firewall keep others away, or listen on 127.0.0.1")
	}
}

func tryListen(protocol, addr string) error {
	var opened io.Closer
	var err error
	if protocol == "UDP" {
		opened, err = net.ListenPacket("udp", addr)
	} else {
		opened, err = net.Listen("tcp", addr)
	}
	if err != nil {
		return err
	}
	return opened.Close()
}

// listenProblem explains why addr, which the configuration has under key,
// cannot be listened on.
func listenProblem(key, protocol, addr string, err error) (reason, remedy string) {
	what := fmt.Sprintf("%s: %s %s", key, protocol, addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		tool := "ss -tlpn"
		if protocol == "UDP" {
			tool = "ss -ulpn"
		}
		return what + " is in use", "stop what uses it (" + tool + "), or change " + key
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return what + " is not an address of this host", "change " + key
	case errors.Is(err, os.ErrPermission):
		return what + ": " + err.Error(),
			"run with sudo or the capability CAP_NET_BIND_SERVICE, or choose a port above 1023"
	}
	return what + ": " + err.Error(), "change " + key
}
