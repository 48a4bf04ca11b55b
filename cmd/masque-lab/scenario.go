package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/fault"
	"masquevpn/internal/lab"
)

// scenario is a sequence of steps.
type scenario struct {
	name  string
	about string // one line
	intro string // shown before the steps
	steps func(*pair) []step
}

// picture shows the hosts and their addresses.
const picture = `
      client ----------- router ----------- proxy ------------ target
   198.51.100.2       (no route to       203.0.113.5          192.0.2.2
   2001:db8:1::2       the target)      2001:db8:2::5      2001:db8:3::2
`

// demonstration is the scenario of `masque-lab demo`.
var demonstration = scenario{
	name:  "demo",
	about: "a VPN between hosts that exist only inside this command",
	intro: picture,
	steps: remoteAccess,
}

// shellScenario prepares the tunnel for `masque-lab shell`.
var shellScenario = scenario{
	name:  "shell",
	about: "a VPN between hosts that exist only inside this command, and a shell on the client",
	intro: picture,
}

// scenarios are the scenarios of `masque-lab run`.
var scenarios = []scenario{
	{
		name:  "remote-access",
		about: "one client with all defaults: ping, download, traceroute, and everything put back",
		intro: picture,
		steps: remoteAccess,
	},
	{
		name:  "full-tunnel",
		about: "nothing but the tunnel leaves the client, while it uses the tunnel",
		intro: picture,
		steps: fullTunnel,
	},
	{
		name:  "split-tunnel",
		about: "the proxy advertises the target's networks only; the rest goes around the tunnel",
		intro: picture,
		steps: splitTunnel,
	},
	{
		name:  "site-to-site",
		about: "two gateways connect the networks behind them with each other and with the proxy's",
		intro: sitePicture,
		steps: siteToSite,
	},
}

func findScenario(name string) (scenario, error) {
	i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
	if i < 0 {
		return scenario{}, fault.Errorf(fault.Usage,
			"there is no scenario %q: `%s list` shows them",
			name, program)
	}
	return scenarios[i], nil
}

func remoteAccess(p *pair) []step {
	return slices.Concat(p.connectSteps(), p.useSteps(), p.disconnectSteps())
}

// fullTunnel captures on the client's link.
func fullTunnel(p *pair) []step {
	var leaks *lab.Capture
	watch := func(context.Context) (string, error) {
		var err error
		leaks, err = p.topo.Client.Capture("eth0", isLeak)
		return "all but QUIC to the proxy is a leak", err
	}
	outside := func(ctx context.Context) (string, error) {
		// The proxy has no service there. Only the path of the packets matters.
		for _, to := range []string{"203.0.113.1", "2001:db8:2::1"} {
			if err := p.checkPath(ctx, netip.MustParseAddr(to), true); err != nil {
				return "", err
			}
		}
		return "it goes through the tunnel", nil
	}
	count := func(context.Context) (string, error) {
		if err := leaks.Close(); err != nil {
			return "", err
		}
		if packets := leaks.Packets(); len(packets) > 0 {
			return "", fmt.Errorf("%d packets left the client outside of the tunnel, the first one is\n%s", len(packets), packets[0])
		}
		return "none", nil
	}
	return slices.Concat(p.connectSteps(),
		[]step{{"watch the client's cable", watch}},
		p.useSteps(),
		[]step{
			{"traffic to other hosts of the internet", outside},
			{"packets that went around the tunnel", count},
		},
		p.disconnectSteps())
}

// isLeak reports whether a captured packet must not leave the client outside a
// full tunnel: anything but packets to the proxy's port and the link's own
// address resolution.
func isLeak(c lab.Packet) bool {
	if !c.Outgoing {
		return false
	}
	if udp, ok := c.Layer(layers.LayerTypeUDP).(*layers.UDP); ok && udp.DstPort == 443 {
		dst, _ := netip.AddrFromSlice(c.NetworkLayer().NetworkFlow().Dst().Raw())
		return dst != lab.ProxyIPv4 && dst != lab.ProxyIPv6
	}
	if c.Layer(layers.LayerTypeARP) != nil {
		return false
	}
	ip, ok := c.NetworkLayer().(*layers.IPv6)
	return !ok || !(ip.SrcIP.IsLinkLocalUnicast() || ip.DstIP.IsLinkLocalUnicast() ||
		ip.DstIP.IsLinkLocalMulticast())
}

// advertise replaces the list of routes that the proxy advertises.
func advertise(prefixes ...string) func(config map[string]any) {
	return func(config map[string]any) {
		routes, ok := config["routes"].(map[string]any)
		if !ok {
			routes = make(map[string]any)
			config["routes"] = routes
		}
		routes["advertise"] = prefixes
	}
}

// splitTunnel makes the proxy advertise only some destinations.
func splitTunnel(p *pair) []step {
	around := func(ctx context.Context) (string, error) {
		for _, to := range []string{"203.0.113.1", "2001:db8:2::1"} {
			if err := p.checkPath(ctx, netip.MustParseAddr(to), false); err != nil {
				return "", err
			}
		}
		return "it goes around the tunnel", nil
	}
	return slices.Concat(p.connectSteps(advertise("192.0.2.0/24", "2001:db8:3::/64")), p.useSteps(),
		[]step{{"traffic to other hosts of the internet", around}},
		p.disconnectSteps())
}

// checkPath checks whether packets to an address of the router go through the
// tunnel. Those arrive from the proxy, others from the client.
func (p *pair) checkPath(ctx context.Context, to netip.Addr, tunnel bool) error {
	iface := "client1"
	if tunnel {
		iface = "proxy"
	}
	c, err := p.topo.Router.Capture(iface, func(c lab.Packet) bool { return !c.Outgoing })
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := p.topo.Client.Ping(ctx, to); err != nil {
		return err
	}
	if err := c.Close(); err != nil {
		return err
	}
	for _, packet := range c.Packets() {
		if n := packet.NetworkLayer(); n != nil {
			if dst, _ := netip.AddrFromSlice(n.NetworkFlow().Dst().Raw()); dst == to {
				return nil
			}
		}
	}
	return fmt.Errorf("%s answered, but the packets to it did not come to the router's interface %q", to, iface)
}
