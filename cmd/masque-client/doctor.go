package main

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"masquevpn/client"
	"masquevpn/internal/doctor"
	"masquevpn/internal/hostfirewall"
	"masquevpn/internal/text"
	"masquevpn/routing"
)

// checkKernel checks that the kernel has the features that the tunnel needs.
func (l *loaded) checkKernel(c *doctor.Report) {
	if l.file.InstallRoutes {
		c.PolicyRouting()
		c.ReversePath()
	}
	if slices.ContainsFunc(slices.Concat(l.file.Request, l.file.Static), func(p netip.Prefix) bool {
		return p.Addr().Is6()
	}) {
		c.IPv6(false)
	}
	switch {
	case l.file.UseKillSwitch:
		c.NFTables("kill switch", "")
	case l.file.InstallRoutes:
		c.NFTables("protection of the tunnel's addresses",
			"packets to them from elsewhere are accepted")
	}
}

// checkFirewall checks that the firewall passes packets to the proxy and
// packets of the tunnel.
func (l *loaded) checkFirewall(c *doctor.Report, tunnel *client.Client) {
	device := strings.ReplaceAll(l.file.TUN.Name, "%d", "0")
	_, text := tunnel.Proxy()
	port, _ := strconv.ParseUint(text, 10, 16) // the dialer reports an invalid port
	iface := cmp.Or(routing.DefaultInterface(false), routing.DefaultInterface(true))
	flows := []hostfirewall.Flow{
		{Name: "UDP " + text + " to the proxy",
			Hook: hostfirewall.HookOutput, Out: iface, Port: uint16(port)},
		{Name: "packets into the tunnel",
			Hook: hostfirewall.HookOutput, Out: device},
	}
	if len(l.file.AdvertiseRoutes) > 0 {
		flows = append(flows,
			hostfirewall.Flow{Name: "packets out of the tunnel to the networks behind this host",
				Hook: hostfirewall.HookForward, In: device},
			hostfirewall.Flow{Name: "packets of the networks behind this host into the tunnel",
				Hook: hostfirewall.HookForward, Out: device})
	}
	c.Firewall(device, flows...)
}

// checkConnects connects to the proxy and reports each step.
func (l *loaded) checkConnects(ctx context.Context, c *doctor.Report) {
	l.config.Nameservers = upstreamServers()
	err := client.CheckProxy(ctx, l.config, func(step string) {
		c.OK("connecting: %s", text.OneLine(step))
	})
	if err == nil {
		return
	}
	if e, ok := errors.AsType[*client.Error](err); ok {
		c.Fail("connecting: "+e.Summary(), e.Remedy)
		return
	}
	c.Fail("connecting: "+err.Error(), "")
}
