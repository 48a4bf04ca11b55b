package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/pelletier/go-toml/v2"

	"masquevpn/internal/lab"
)

// sitePicture shows the hosts of the scenario with two gateways.
const sitePicture = `
   10.1.0.0/24, 2001:db8:a::/64            10.2.0.0/24, 2001:db8:b::/64
      branch1 ---+                                +--- depot1
                 branch ------ router ------ depot
                (gateway)        |         (gateway)
                               proxy
                                 |
                               target
                     192.0.2.0/24, 2001:db8:3::/64
`

// lan is a network behind a client, with one host.
type lan struct {
	user  string         // user name of the gateway
	near  []netip.Prefix // gateway's addresses in the network
	addrs []netip.Addr   // host's addresses
	host  *lab.Host
}

// networks returns the prefixes of l.
func (l *lan) networks() []netip.Prefix {
	var out []netip.Prefix
	for _, p := range l.near {
		out = append(out, p.Masked())
	}
	return out
}

// siteToSite connects two networks with each other and with the proxy's
// network.
func siteToSite(p *pair) []step {
	branch := newLAN("branch", "10.1.0.1/24", "2001:db8:a::1/64")
	depot := newLAN("depot", "10.2.0.1/24", "2001:db8:b::1/64")
	lans := []*lan{branch, depot}
	hosts := func(context.Context) (string, error) {
		o := lab.TopologyOptions{Pool: slices.Concat(lab.Prefixes("10.77.0.0/24", "fd77::/64"),
			branch.networks(), depot.networks())}
		if err := p.makeTopology(o, branch.user, depot.user); err != nil {
			return "", err
		}
		for _, l := range lans {
			if err := p.makeLAN(l); err != nil {
				return "", err
			}
		}
		return "two gateways with a host behind each, router, proxy, target", p.snapshot()
	}
	config := func(config map[string]any) {
		advertise("192.0.2.0/24", "2001:db8:3::/64")(config)
		config["nat"] = map[string]any{"masquerade": false} // the target has routes to all networks
		var sites []map[string]any
		for _, l := range lans {
			sites = append(sites, map[string]any{"user": l.user, "networks": l.networks()})
		}
		config["site"] = sites
	}
	steps := []step{
		{"make the hosts and connect them", hosts},
		{"depot1 is out of reach of branch1", func(ctx context.Context) (string, error) {
			return "", p.outOfReach(ctx, branch.host, depot.addrs[0])
		}},
		{"masque-proxy init: keys and configuration", func(ctx context.Context) (string, error) {
			return p.initProxy(ctx, []func(map[string]any){config})
		}},
	}
	for _, l := range lans {
		steps = append(steps, step{"masque-proxy invite " + l.user + ": and its networks",
			func(ctx context.Context) (string, error) {
				return p.inviteGateway(ctx, l)
			}})
	}
	steps = append(steps, step{"masque-proxy run: on the host proxy", p.startProxy})
	for _, l := range lans {
		steps = append(steps, step{"masque-client up: on the gateway " + l.user,
			p.forUser(l.user, p.connect)})
	}
	for i, to := range depot.addrs {
		steps = append(steps,
			step{"ping depot1 from branch1, " + family(to),
				func(ctx context.Context) (string, error) {
					return p.ping(ctx, branch.host, to)
				}},
			step{"ping branch1 from the target, " + family(to),
				func(ctx context.Context) (string, error) {
					return p.ping(ctx, p.topo.Target, branch.addrs[i])
				}},
			step{"download from depot1 to branch1, " + family(to),
				func(ctx context.Context) (string, error) {
					return p.download(ctx, branch.host, depot.host, to)
				}},
			step{"traceroute to depot1 from branch1, " + family(to),
				func(ctx context.Context) (string, error) {
					return p.traceSites(ctx, branch.host, to)
				}},
		)
	}
	steps = append(steps,
		step{"masque-proxy sessions", func(ctx context.Context) (string, error) {
			return p.run(ctx, p.topo.Proxy, p.programs.proxy, "sessions")
		}},
		step{"masque-client down: on the gateway depot", p.forUser(depot.user, p.disconnect)},
		step{"its networks disappear at the other gateway",
			func(ctx context.Context) (string, error) {
				return p.withdrawn(ctx, branch.user, depot.addrs)
			}},
		step{"masque-client down: on the gateway branch", p.forUser(branch.user, p.disconnect)},
		step{"stop the proxy with SIGTERM", p.stopProxy},
	)
	for _, l := range lans {
		steps = append(steps, step{"the kernel of " + l.user + " is as it was",
			func(context.Context) (string, error) {
				return p.checkRestored(p.client(l.user))
			}})
	}
	return append(steps, step{"the proxy's kernel is as it was",
		func(context.Context) (string, error) {
			return p.checkRestored(p.topo.Proxy)
		}})
}

// newLAN plans a network. The host's address follows the gateway's.
func newLAN(user string, gateway ...string) *lan {
	l := &lan{user: user, near: lab.Prefixes(gateway...)}
	for _, p := range l.near {
		l.addrs = append(l.addrs, p.Addr().Next())
	}
	return l
}

// makeLAN connects the gateway of l with a host.
func (p *pair) makeLAN(l *lan) (err error) {
	if l.host, err = p.lab.Host(l.user + "1"); err != nil {
		return err
	}
	host := lab.End{Host: l.host, Name: "eth0"}
	for i, a := range l.addrs {
		host.Addrs = append(host.Addrs, netip.PrefixFrom(a, l.near[i].Bits()))
	}
	if err := p.lab.Connect(lab.End{Host: p.client(l.user), Name: "lan0", Addrs: l.near}, host,
		lab.LinkOptions{}); err != nil {
		return err
	}
	for _, g := range l.near {
		if err := l.host.AddDefaultRoute(g.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// outOfReach checks that a host cannot be reached without the tunnel.
func (p *pair) outOfReach(ctx context.Context, from *lab.Host, to netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	switch a, err := from.Probe(ctx, lab.Probe{To: to}); {
	case errors.Is(err, context.DeadlineExceeded):
		return nil
	case err != nil:
		return err
	case a.Echo:
		return fmt.Errorf("%s answers, although there is no tunnel", to)
	}
	return nil
}

// inviteGateway invites the user of l and adds the networks behind the gateway
// to the client's file.
func (p *pair) inviteGateway(ctx context.Context, l *lan) (string, error) {
	result, err := p.invite(ctx, l.user)
	if err != nil {
		return "", err
	}
	b, err := toml.Marshal(map[string]any{"routes": map[string]any{"advertise": l.networks()}})
	if err != nil {
		return "", err
	}
	f, err := os.OpenFile(p.inviteFile(l.user), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return "", err
	}
	_, err = f.WriteString("\n" + string(b))
	return result, errors.Join(err, f.Close())
}

// traceSites checks that the path between two sites goes through the proxy.
func (p *pair) traceSites(ctx context.Context, from *lab.Host, to netip.Addr) (string, error) {
	hops, err := from.Traceroute(ctx, to, 8, 3*time.Second)
	if err != nil {
		return "", err
	}
	// Each of the three routers counts once, and so does each entry into a
	// tunnel.
	path := hopNames(hops)
	proxy := "10.77.0.1"
	if to.Is6() {
		proxy = "fd77::1"
	}
	if last := hops[len(hops)-1]; len(hops) != 6 || !last.Echo || last.From != to ||
		hops[2].From.String() != proxy || hops[3].From.String() != proxy {
		return "", fmt.Errorf("the hops are %s, want the near gateway twice, the proxy twice, the far gateway and %s", path, to)
	}
	return path, nil
}

// withdrawn waits until the routes of a gateway no longer cover addrs.
func (p *pair) withdrawn(ctx context.Context, user string, addrs []netip.Addr) (string, error) {
	for {
		s, err := p.readStatus(ctx, user)
		if err != nil {
			return "", err
		}
		if !slices.ContainsFunc(s.Routes, func(r route) bool {
			return slices.ContainsFunc(addrs, func(a netip.Addr) bool {
				return r.Start.Compare(a) <= 0 && a.Compare(r.End) <= 0
			})
		}) {
			return fmt.Sprintf("%d routes are left", len(s.Routes)), nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%s still has them: %v", user, s.Routes)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
