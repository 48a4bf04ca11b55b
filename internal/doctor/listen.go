package doctor

import (
	"io"
	"net"
	"net/netip"

	"masquevpn/internal/fault"
)

// Listen checks that an address is free by listening on it. key is its
// configuration key, protocol is TCP or UDP.
func (c *Report) Listen(key, protocol, addr string) {
	if err := tryListen(protocol, addr); err != nil {
		e := fault.ListenError(key, protocol, addr, err)
		c.Fail(e.Summary(), e.Remedy)
		return
	}
	c.OK("%s: %s %s is free", key, protocol, addr)
}

// Metrics checks that metrics can be served on addr, "" for nowhere, and that
// only this host can read them. named reports whether the configuration has the
// address: if not, it need not be free.
func (c *Report) Metrics(addr string, named bool) {
	const key = "metrics.listen"
	if addr == "" {
		return
	}
	if err := tryListen("TCP", addr); err != nil && !named {
		e := fault.ListenError(key, "TCP", addr, err)
		c.Warn(e.Summary()+"; metrics will not be served", e.Remedy)
		return
	}
	c.Listen(key, "TCP", addr)
	if a, err := netip.ParseAddrPort(addr); err != nil || !a.Addr().Unmap().IsLoopback() {
		c.Warn(key+": other hosts can reach TCP "+addr,
			"everybody who can reach it can read the metrics: let a firewall keep others away, or listen on 127.0.0.1")
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
