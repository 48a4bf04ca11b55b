package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"

	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/acme"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/doctor"
	"masquevpn/internal/fault"
	"masquevpn/internal/hostfirewall"
	"masquevpn/routing"
)

func (o *options) checkCommand() *cobra.Command {
	var file string
	var asJSON, online bool
	cmd := &cobra.Command{
		Use: "check -c FILE", Short: "Check a configuration and this host", Args: cobra.NoArgs,
		Long: "Check a configuration and this host, without changing anything. Each line is ok, warn or fail; the exit code\n" +
			"is 2 if anything fails. Nothing is sent to other hosts without --online.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			var c doctor.Report
			o.check(cmd.Context(), &c, file, online)
			return c.Finish(cmd.OutOrStdout(), asJSON)
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&online, "online", false,
		"also get the directory of the ACME server; this requests no certificate")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, one object per line")
	return cmd
}

func (o *options) check(ctx context.Context, c *doctor.Report, file string, online bool) {
	l, err := load(file, slog.New(slog.DiscardHandler))
	if err == nil {
		_, err = l.newServer(l.config(nil))
	}
	usable := c.Config(file, err)
	if usable {
		l.checkCredentials(c, time.Now())
	}
	if usable && l.acme != nil {
		l.checkACME(ctx, c, online, time.Now())
	}
	c.NetAdmin(capabilities)
	c.TUN(l != nil && l.file.TUN.Offload)
	c.RunDir(o.RunDir)
	running, err := control.Running(o.RunDir, instance)
	switch {
	case err != nil:
		c.Warn(fmt.Sprintf("instance: not known: %v", err), "")
	case running:
		c.OK("instance: the proxy is running; its interface, addresses and ports are not checked")
		o.checkRunning(ctx, c)
	case usable:
		c.Interface(l.file.TUN.Name)
		for _, addr := range l.file.Listen {
			c.Listen("listen", "UDP", addr)
		}
		c.Metrics(l.file.Metrics, l.file.MetricsNamed)
		if l.acme != nil {
			checkChallenge(ctx, c, *l.acme)
		}
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			c.Warn(fmt.Sprintf("pool: addresses of this host are not known: %v", err), "")
			break
		}
		checkPool(c, addrs, l.file.Pool4, l.file.Pool6)
	}
	if usable {
		l.checkForwarding(c)
		l.checkFirewall(c)
		c.LogFiles(l.file.QlogDir, l.file.KeyLog, "")
	}
	c.Clock(time.Now())
	c.UDPBuffer()
	c.UDPOffload()
}

// checkRunning reports the warnings of the running proxy about this host.
func (o *options) checkRunning(ctx context.Context, c *doctor.Report) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var s status
	if err := control.NewClient(o.RunDir, instance).Get(ctx, statusPath, &s); err != nil {
		c.Warn(fmt.Sprintf("host: the status of the running proxy is not known: %v", err), "")
		return
	}
	c.Running(s.Warnings, s.KernelRepairs)
}

func (l *loaded) checkCredentials(c *doctor.Report, now time.Time) {
	if l.acme == nil {
		c.Certificate(doctor.Credential{
			Label: "tls.cert", Chain: l.pair.Chain, Name: l.file.Name,
			Usage: x509.ExtKeyUsageServerAuth, Renewal: l.renewal(),
		}, now)
	}
	for _, ca := range l.clientCAs {
		c.Certificate(doctor.Credential{
			Label: "tls.client_ca: " + ca.Subject.CommonName, Chain: []*x509.Certificate{ca},
			Usage:   x509.ExtKeyUsageAny,
			Renewal: "make a new authority, and invite the users again",
		}, now)
	}
	switch {
	case l.users == nil:
		c.Warn(`users: auth.methods is "none"`,
			"everybody who reaches this proxy can use it; set auth.methods")
	case len(l.users.last().All()) == 0:
		c.Warn("users: none", program+" invite NAME -c FILE")
	default:
		c.OK("users: %d", len(l.users.last().All()))
	}
	if l.users != nil {
		l.checkUsers(c, now)
	}
	for _, site := range l.file.Sites {
		if l.users == nil {
			continue
		}
		if _, ok := l.users.ByName(site.User); !ok {
			c.Warn("site: there is no user "+site.User, program+" invite "+site.User+" -c FILE")
		}
	}
}

// checkACME checks the stored certificate and, if online is set, the ACME
// server.
func (l *loaded) checkACME(ctx context.Context, c *doctor.Report, online bool, now time.Time) {
	switch cert, err := acme.Stored(ctx, *l.acme); {
	case err == nil && now.After(cert.Leaf.NotAfter):
		c.Warn("tls.acme: the stored certificate ended on "+
			cert.Leaf.NotAfter.Format(time.DateOnly), "the proxy gets another one when it starts")
	case err == nil:
		c.Certificate(doctor.Credential{
			Label: "tls.acme", Chain: []*x509.Certificate{cert.Leaf}, Name: l.file.Name,
			Usage: x509.ExtKeyUsageServerAuth, Renewal: l.renewal(),
		}, now)
	case errors.Is(err, fs.ErrNotExist):
		c.OK("tls.acme: no certificate yet; the proxy gets it from %s when it starts",
			l.acme.Directory)
	default:
		c.Fail("tls.acme: "+err.Error(),
			"make "+l.acme.Storage+" a folder of the user that the proxy runs as")
	}
	c.Writable("tls.acme.storage", l.acme.Storage,
		"make it a folder of the user that the proxy runs as, or change it")
	if !online {
		return
	}
	if terms, err := acme.CheckDirectory(ctx, *l.acme); err != nil {
		failError(c, err)
	} else {
		c.OK("tls.acme: %s answers; its terms of service: %s", l.acme.Directory,
			cmp.Or(terms, "none"))
	}
}

// checkChallenge checks that the address of the challenge is free by listening
// on it.
func checkChallenge(ctx context.Context, c *doctor.Report, cfg acme.Config) {
	if err := acme.CheckListen(ctx, cfg); err != nil {
		failError(c, err)
		return
	}
	c.OK("tls.acme: TCP %s is free for the challenge; port %d of %s has to lead there", cfg.Listen,
		cfg.Challenge.Port(), cfg.Name)
}

func failError(c *doctor.Report, err error) {
	if e, ok := errors.AsType[*fault.Error](err); ok {
		c.Fail("tls.acme: "+e.Summary(), e.Remedy)
		return
	}
	c.Fail("tls.acme: "+err.Error(), "")
}

// checkUsers reports users who have expired, or whose routes the proxy does not
// advertise.
func (l *loaded) checkUsers(c *doctor.Report, now time.Time) {
	for _, u := range l.users.last().All() {
		if !u.Expires.IsZero() && !now.Before(u.Expires) {
			c.Warn(fmt.Sprintf("users: %s expired at %s", u.Name,
				u.Expires.UTC().Format(time.RFC3339)),
				"change expires in "+l.file.UsersFile+", or "+program+" user remove "+u.Name+
					" -c FILE")
		}
		for _, p := range u.Routes {
			if !advertised(l.file, p) {
				c.Warn(fmt.Sprintf("users: %s may reach %v, which routes.advertise does not have",
					u.Name, p), "add it there, or correct routes in "+l.file.UsersFile)
			}
		}
	}
}

// checkPool checks that the pools do not overlap the networks of this host.
func checkPool(c *doctor.Report, addrs []net.Addr, pools ...netip.Prefix) {
	for _, pool := range pools {
		if !pool.IsValid() {
			continue
		}
		used := ""
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Overlaps(pool) {
				used = a.String()
			}
		}
		if used != "" {
			c.Fail(fmt.Sprintf("pool: %s overlaps %s of this host", pool, used),
				"choose a network that nobody uses")
		} else {
			c.OK("pool: %s is not used on this host", pool)
		}
	}
}

// checkForwarding checks that the kernel can forward and masquerade.
func (l *loaded) checkForwarding(c *doctor.Report) {
	f := l.file
	if f.Pool4.IsValid() {
		c.Forwarding("net.ipv4.ip_forward")
	}
	if f.Pool6.IsValid() {
		c.IPv6(true)
		c.Forwarding("net.ipv6.conf.all.forwarding")
	}
	if f.Masquerade {
		c.NFTables("nat", "")
	} else {
		c.OK("nat: off; hosts behind the proxy need a route through this host to the addresses of [pool]")
	}
	for _, family := range []struct {
		pool netip.Prefix
		name string
		ipv6 bool
	}{{f.Pool4, "IPv4", false}, {f.Pool6, "IPv6", true}} {
		everything := slices.ContainsFunc(f.Advertise, func(p netip.Prefix) bool {
			return p.Bits() == 0 && p.Addr().Is6() == family.ipv6
		})
		if family.pool.IsValid() && everything && routing.DefaultInterface(family.ipv6) == "" {
			c.Warn("default route: clients get "+family.name+
				" addresses and routes to everywhere, but this host has no default route for it",
				"give this host "+family.name+", or take it out of [pool]")
		}
	}
}

// checkFirewall checks that the firewall passes packets to the proxy and
// packets of clients.
func (l *loaded) checkFirewall(c *doctor.Report) {
	var flows []hostfirewall.Flow
	for _, addr := range l.file.Listen {
		if a, err := net.ResolveUDPAddr("udp", addr); err == nil {
			flows = append(flows, hostfirewall.Flow{
				Name: fmt.Sprintf("UDP %d from clients", a.Port),
				Hook: hostfirewall.HookInput, Port: uint16(a.Port),
				Untracked: l.file.Masquerade,
			})
		}
	}
	device := strings.ReplaceAll(l.file.TUN.Name, "%d", "0")
	iface := cmp.Or(routing.DefaultInterface(false), routing.DefaultInterface(true))
	out := cmp.Or(iface, "elsewhere")
	c.Firewall(device, append(flows,
		hostfirewall.Flow{Name: "packets of clients from " + device + " to " + out,
			Hook: hostfirewall.HookForward, In: device, Out: iface},
		hostfirewall.Flow{Name: "answers from " + out + " to " + device,
			Hook: hostfirewall.HookForward, In: iface, Out: device,
			Reply: true},
	)...)
}
