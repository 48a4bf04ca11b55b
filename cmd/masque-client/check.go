package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/discovery"
	"masquevpn/internal/doctor"
	"masquevpn/internal/hostdns"
	"masquevpn/internal/text"
	"masquevpn/routing"
)

func (o *options) checkCommand() *cobra.Command {
	var file string
	var asJSON, connect bool
	cmd := &cobra.Command{
		Use: "check -c FILE", Short: "Check a configuration and this host", Args: cobra.NoArgs,
		Long: "Check a configuration and this host, without changing anything. Each line is ok, warn or fail; the exit code\n" +
			"is 2 if anything fails. Nothing is sent to the proxy without --connect.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			var c doctor.Report
			if err := o.check(cmd.Context(), &c, file, connect); err != nil {
				return err
			}
			return c.Finish(cmd.OutOrStdout(), asJSON)
		}),
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `FILE`")
	cmd.Flags().BoolVar(&connect, "connect", false,
		"also connect to the proxy and send the request; this makes no tunnel and needs no privileges")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, one object per line")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
	return cmd
}

func (o *options) check(ctx context.Context, c *doctor.Report, file string, connect bool) error {
	name, err := tunnelName(file)
	if err != nil {
		return err
	}
	var tunnel *client.Client
	l, err := load(file, name)
	if err == nil {
		tunnel, err = l.newClient()
	}
	if c.Config(file, err) {
		l.checkCredentials(c, time.Now())
		l.checkResolves(ctx, c)
	}
	if l != nil {
		l.checkDNS(c)
	}
	c.NetAdmin(capabilities)
	c.TUN(l != nil && l.file.TUN.Offload)
	c.RunDir(o.RunDir)
	running, err := control.Running(o.RunDir, name)
	switch {
	case err != nil:
		c.Warn(fmt.Sprintf("instance: not known: %v", err), "")
	case running:
		c.OK("instance: %s is running", name)
		var s client.Status
		if err := control.NewClient(o.RunDir, name).Get(ctx, statusPath, &s); err == nil {
			for _, w := range s.Warnings {
				c.Warn("instance: "+text.OneLine(w), "")
			}
		}
	case l != nil:
		c.Interface(l.file.TUN.Name)
		c.Metrics(l.file.Metrics, true)
	}
	c.Clock(time.Now())
	if tunnel != nil {
		l.checkKernel(c)
		l.checkFirewall(c, tunnel)
		c.LogFiles(l.file.QlogDir, l.file.KeyLog, l.file.PCAP)
	}
	c.UDPBuffer()
	c.UDPOffload()
	if connect && tunnel != nil {
		l.checkConnects(ctx, c)
	}
	return nil
}

func (l *loaded) checkCredentials(c *doctor.Report, now time.Time) {
	for _, root := range l.roots {
		c.Certificate(doctor.Credential{
			Label: "tls.ca: " + root.Subject.CommonName, Chain: []*x509.Certificate{root},
			Usage:   x509.ExtKeyUsageAny,
			Renewal: "ask the operator of the proxy for the new one",
		}, now)
	}
	if len(l.chain) > 0 {
		c.Certificate(doctor.Credential{
			Label: "tls.cert: " + l.chain[0].Subject.CommonName, Chain: l.chain,
			Usage:   x509.ExtKeyUsageClientAuth,
			Renewal: renewal,
		}, now)
	}
	if len(l.chain) == 0 && l.config.Token == "" {
		c.Warn("credentials: none",
			"the proxy will ask for some unless it lets everyone in; set tls.cert and tls.key, or auth.token")
	}
}

// checkDNS checks how the host's resolver would get the tunnel's servers.
func (l *loaded) checkDNS(c *doctor.Report) {
	if l.config.DNS.Off {
		c.OK("DNS: off, the host's resolver stays as it is")
		l.checkOutside(c)
		return
	}
	defer l.checkOutside(c)
	via, splits := hostdns.Detect(hostdns.Config{})
	switch {
	case splits:
		c.OK("DNS: through %s", via)
	case len(l.config.DNS.Domains) > 0 && !slices.Contains(l.config.DNS.Domains, hostdns.Root):
		c.Warn(fmt.Sprintf("DNS: %s cannot ask servers about some names only, so dns.domains will not be applied", via),
			"use systemd-resolved, with /etc/resolv.conf a link to /run/systemd/resolve/stub-resolv.conf")
	default:
		c.OK("DNS: through %s, for all names or none", via)
	}
}

// checkOutside lists the servers to which this host may send queries outside a
// full tunnel.
func (l *loaded) checkOutside(c *doctor.Report) {
	d, full := l.config.DNS, routing.IsFull(l.config.Accept, false) ||
		routing.IsFull(l.config.Accept, true)
	if !l.config.InstallRoutes || !full ||
		!d.Off && len(d.Servers) > 0 &&
			(len(d.Domains) == 0 || slices.Contains(d.Domains, hostdns.Root)) {
		return
	}
	tunnel := routing.State{Routes: l.config.Accept, HostRoutes: l.config.HostRoutes,
		Private: l.config.AdvertiseRoutes}
	var outside []string
	for _, a := range hostdns.Servers(hostdns.Config{}) {
		addr := a.Addr().WithZone("")
		if addr.IsLoopback() || tunnel.HostFirst(netip.PrefixFrom(addr, addr.BitLen())) {
			outside = append(outside, addr.String())
		}
	}
	if len(outside) == 0 {
		return
	}
	servers := strings.Join(outside, ", ")
	switch {
	case d.Hold:
		c.OK("DNS: under a full tunnel, queries to %s are refused (dns.outside = false)", servers)
	case d.Off:
		c.Warn(fmt.Sprintf("DNS: queries go to %s, outside a full tunnel", servers),
			`set dns.mode = "auto", or dns.outside = false to have such queries refused`)
	default:
		c.OK("DNS: if the proxy hands out no nameservers, queries go to %s, outside a full tunnel; dns.servers or dns.outside = false change that", servers)
	}
}

// checkResolves checks that the proxy can be found. It sends nothing to the
// proxy itself.
func (l *loaded) checkResolves(ctx context.Context, c *doctor.Report) {
	if list := l.unprotected(); len(list) > 0 {
		c.Warn(fmt.Sprintf("discovery.nameservers: answers of %v can be forged on the way", list),
			"name a validating resolver on this host, such as 127.0.0.1")
	}
	r, err := client.ResolveProxy(ctx, l.config)
	if err != nil {
		if e, ok := errors.AsType[*client.Error](err); ok {
			c.Warn("proxy: "+text.OneLine(e.Summary()), e.Remedy)
			return
		}
		c.Warn("proxy: "+text.OneLine(err.Error()), "")
		return
	}
	if r.Step == "literal" {
		c.OK("proxy: %s is an address", r.Authority)
		return
	}
	c.OK("proxy: %s is %v, found by %s; it has to prove %s", l.config.Proxy, serverAddresses(r),
		stepText(r.Step),
		strings.Join(r.Groups[0].Records[0].Verify, " or "))
	if status, ok := strings.CutPrefix(r.WellKnown, "error: "); ok &&
		!strings.HasPrefix(status, "status 4") &&
		status != "unreachable" {
		c.Warn(fmt.Sprintf("proxy: the delegation file of %s is not used (%s)", l.config.Proxy,
			status),
			"tell the operator of the domain")
	}
	if r.Degraded {
		c.Warn("proxy: SRV records could not be looked up, so the addresses of the name are used",
			"check this host's DNS")
	}
	if len(l.roots) > 0 && r.Delegated.Host() != "" {
		c.Warn(fmt.Sprintf("proxy: %s delegates to %s, which needs a certificate of tls.ca",
			l.config.Proxy,
			r.Delegated), "ask the operator whether it has one, or remove tls.ca")
	}
}

// serverAddresses returns the addresses of all servers of r, without ports.
func serverAddresses(r *discovery.Result) []netip.Addr {
	var list []netip.Addr
	for _, a := range r.Addrs() {
		if !slices.Contains(list, a.Addr()) {
			list = append(list, a.Addr())
		}
	}
	return list
}

// stepText returns the text for a step of discovery.
func stepText(step string) string {
	prefix := ""
	if rest, ok := strings.CutPrefix(step, "well-known/"); ok {
		prefix, step = "the delegation file and ", rest
	}
	switch step {
	case "literal":
		return prefix + "an address"
	case "srv":
		return prefix + "SRV records"
	case "https":
		return prefix + "HTTPS records"
	case "hosts":
		return prefix + "/etc/hosts"
	}
	return prefix + "the addresses of the name"
}
