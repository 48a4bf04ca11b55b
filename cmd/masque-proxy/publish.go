package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/acme"
	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/discovery"
	"masquevpn/internal/doctor"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/routing"
)

const (
	// httpsPort is the port that clients use if nothing names another one.
	httpsPort = 443
	// publishedFor is the TTL of records and the lifetime of the delegation
	// file that `publish` prints.
	publishedFor = time.Hour
)

// publish is the command `publish` with its flags.
type publish struct {
	file, domain string
	check        bool
	discovery    cli.DiscoveryFlags
}

func publishCommand() *cobra.Command {
	var p publish
	cmd := &cobra.Command{
		Use: "publish -c FILE", Short: "Show how a domain leads to this proxy", Args: cobra.NoArgs,
		Long: "Show what the owner of a domain publishes, so that clients find this proxy by the domain:\n" +
			"lines of a zone file, a file of the domain's web server, and the certificate that each way\n" +
			"needs. With --check, resolve the domain as clients and peers do, and compare: each line is\n" +
			"ok, warn or fail, and the exit code is 2 if the domain does not lead here or the certificate\n" +
			"does not fit. Nothing is changed.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			return p.run(cmd.Context(), cmd.OutOrStdout())
		}),
	}
	configFlag(cmd, &p.file)
	cmd.Flags().StringVar(&p.domain, "domain", "",
		"`DOMAIN` that clients have in their file; default: the first of federation.domains, or the proxy's\n"+
			"name")
	cmd.Flags().BoolVar(&p.check, "check", false, "resolve the domain and compare")
	p.discovery.Add(cmd)
	return cmd
}

// run writes the publication, or compares it with DNS and the web.
func (c *publish) run(ctx context.Context, w io.Writer) error {
	f, err := parseFile(c.file)
	if err != nil {
		return err
	}
	options := cli.ResolveOptions{Nameservers: f.Nameservers}
	if err := c.discovery.Apply(&options); err != nil {
		return err
	}
	local, err := localAddresses()
	if err != nil {
		return err
	}
	p, err := newPublication(f, c.domain, local, outerAddresses(local))
	if err != nil {
		return err
	}
	p.file = c.file
	if err := p.readCertificate(ctx, f); err != nil {
		return f.Locate(err)
	}
	if !c.check {
		_, err := io.WriteString(w, p.text())
		return err
	}
	var report doctor.Report
	check := &publishedCheck{publication: p, report: &report, local: local, now: time.Now(),
		hasPeers: len(f.Peers) > 0, peers: discovery.Query{Private: f.Federation.Private,
			DNSSEC: max(options.DNSSEC, f.Federation.DNSSEC)}}
	check.keyOf = check.connect
	check.run(ctx, options.Resolver(program), options.DNSSEC)
	return report.Finish(w, false)
}

// publication has what the owner of a domain publishes about a proxy.
type publication struct {
	file   string // the configuration
	domain string
	name   discovery.Name   // the proxy's, without a port
	port   uint16           // the proxy's
	listen []netip.AddrPort // unspecified addresses stand for all of the host's
	addrs  []netip.Addr     // the proxy's; may be empty

	source string            // where the certificate comes from
	acme   bool              // renewals of the certificate have new keys
	leaf   *x509.Certificate // nil: there is none yet
}

// newPublication returns the publication for a configuration, without the
// certificate. local has the addresses of the host, and outer those among them
// at which others may reach it.
func newPublication(f *config.Proxy, domain string, local, outer []netip.Addr) (*publication,
	error) {
	p := &publication{source: f.Cert, acme: f.ACME != nil}
	var err error
	if p.name, err = discovery.ParseInput(f.Name); err != nil {
		return nil, f.Locate(&fault.Error{Kind: fault.Usage, Key: "name",
			Reason: "not a name that clients can look up",
			Remedy: `write for example "vpn.example.org"`})
	}
	if p.name.Host() != "" && !p.name.Discovers() {
		return nil, f.Locate(&fault.Error{Kind: fault.Usage, Key: "name",
			Reason: "only hosts of the local network know this name",
			Remedy: "write a name that is in DNS"})
	}
	if domain == "" {
		domain = p.name.Host()
		if len(f.Federation.Domains) > 0 {
			domain = f.Federation.Domains[0]
		}
		if domain == "" {
			return nil, &fault.Error{Kind: fault.Usage,
				Reason: "the proxy's name is an address, which needs no publication",
				Remedy: "name a domain with --domain"}
		}
	}
	d, err := discovery.ParseInput(domain)
	if err != nil || !d.Discovers() {
		return nil, &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("--domain %q is not a domain", domain),
			Remedy: "write for example example.org, without a port"}
	}
	p.domain = d.Host()
	for _, s := range f.Listen {
		a, err := net.ResolveUDPAddr("udp", s)
		if err != nil {
			return nil, err
		}
		p.listen = append(p.listen,
			netip.AddrPortFrom(a.AddrPort().Addr().Unmap(), a.AddrPort().Port()))
	}
	p.port = p.listen[0].Port()
	p.addrs = p.reachable(f, local, outer)
	return p, nil
}

// localAddresses returns the addresses of this host.
func localAddresses() ([]netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var list []netip.Addr
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			list = append(list, p.Addr())
		}
	}
	return list, nil
}

// outerAddresses returns the addresses in local that are on the interfaces of
// the default routes, or all of a family without a default route.
func outerAddresses(local []netip.Addr) []netip.Addr {
	list := slices.Clone(local)
	for _, ipv6 := range []bool{false, true} {
		iface, err := net.InterfaceByName(routing.DefaultInterface(ipv6))
		if err != nil {
			continue
		}
		addrs, err := iface.Addrs()
		if err != nil {
			continue
		}
		list = slices.DeleteFunc(list, func(a netip.Addr) bool {
			return a.Is6() == ipv6 && !slices.ContainsFunc(addrs, func(n net.Addr) bool {
				p, err := netip.ParsePrefix(n.String())
				return err == nil && p.Addr() == a
			})
		})
	}
	return list
}

// reachable returns the addresses at which others reach the proxy: those among
// outer that it listens on. It returns private ones only if there are no
// others.
func (p *publication) reachable(f *config.Proxy, local, outer []netip.Addr) []netip.Addr {
	if p.name.Addr().IsValid() {
		return []netip.Addr{p.name.Addr()}
	}
	var list []netip.Addr
	for _, a := range outer {
		inPool := f.Pool4.IsValid() && f.Pool4.Contains(a) ||
			f.Pool6.IsValid() && f.Pool6.Contains(a)
		if a.IsGlobalUnicast() && !inPool && p.listensOn(netip.AddrPortFrom(a, p.port), local) {
			list = append(list, a)
		}
	}
	if slices.ContainsFunc(list, isPublic) {
		list = slices.DeleteFunc(list, func(a netip.Addr) bool { return !isPublic(a) })
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

// carrierNAT has the addresses between customers and a translator (RFC 6598).
var carrierNAT = netip.MustParsePrefix("100.64.0.0/10")

func isPublic(a netip.Addr) bool { return !a.IsPrivate() && !carrierNAT.Contains(a) }

// listensOn reports whether a is an address and a port of this host on which
// the proxy listens.
func (p *publication) listensOn(a netip.AddrPort, local []netip.Addr) bool {
	return slices.ContainsFunc(p.listen, func(l netip.AddrPort) bool {
		switch {
		case l.Port() != a.Port():
			return false
		case !l.Addr().IsUnspecified():
			return l.Addr() == a.Addr()
		case l.Addr().Is4() && !a.Addr().Is4():
			return false
		}
		return slices.Contains(local, a.Addr())
	})
}

// readCertificate reads the proxy's certificate.
func (p *publication) readCertificate(ctx context.Context, f *config.Proxy) error {
	if f.ACME == nil {
		data, err := files.ReadNamed("tls.cert", f.Cert, false)
		if err != nil {
			return err
		}
		chain, err := certs.Parse("tls.cert", data)
		if err != nil {
			return err
		}
		p.leaf = chain[0]
		return nil
	}
	c, err := acmeConfig(f, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	p.source = c.Directory
	stored, err := acme.Stored(ctx, *c)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return &fault.Error{Kind: fault.Privileges, Key: "tls.acme.storage", Reason: err.Error(),
			Remedy: "run this as the user of the proxy, or as root"}
	}
	p.leaf = stored.Leaf
	return nil
}

// text returns the publication for people. A block behind a colon and an empty
// line can be copied as it is.
func (p *publication) text() string {
	var b strings.Builder
	p.writeSummary(&b)
	p.writeName(&b)
	if p.domain != p.name.Host() {
		p.writeFile(&b)
	}
	if p.name.Host() == "" {
		b.WriteString("\n# SRV and HTTPS records\n\n" +
			"These need a name of the proxy: write one into name, in place of the address.\n")
	} else {
		p.writeSRV(&b)
		p.writeHTTPS(&b)
	}
	p.writeNone(&b)
	fmt.Fprintf(&b, "\nnext:\n  %[1]s publish -c %[2]s --domain %[3]s --check\n"+
		"  %[1]s invite NAME -c %[2]s --proxy %[3]s -o NAME.toml\n", program, p.file, p.domain)
	return b.String()
}

// writeSummary writes the facts that all ways share.
func (p *publication) writeSummary(b *strings.Builder) {
	certificate, pin := p.source+", none yet", "none yet"
	if p.leaf != nil {
		certificate = fmt.Sprintf("%s, for %s, until %s", p.source,
			strings.Join(names(p.leaf), ", "),
			p.leaf.NotAfter.UTC().Format(time.DateOnly))
		pin = pinOf(p.leaf)
		if p.acme {
			pin += ", until the next renewal"
		}
	}
	fmt.Fprintf(b, "%-13s%s\n%-13s%s, UDP port %d\n%-13s%s\n%-13s%s\n\n", "domain", p.domain,
		"proxy", p.name, p.port, "certificate", certificate, "pin", pin)
	b.WriteString("Each of the following ways but the last leads clients here. Publish one of them. Blocks behind a\n" +
		"colon are complete: copy them as they are.\n")
}

// names returns the names and addresses that a certificate is for.
func names(leaf *x509.Certificate) []string {
	list := slices.Clone(leaf.DNSNames)
	for _, a := range leaf.IPAddresses {
		list = append(list, a.String())
	}
	return list
}

// pinOf returns the hash of a certificate's public key, by which peers
// recognize it.
func pinOf(leaf *x509.Certificate) string {
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return "sha256:" + base64.StdEncoding.EncodeToString(sum[:])
}

// certificate returns the line about the certificate that a way needs.
func (p *publication) certificate(name string) string {
	switch {
	case p.leaf == nil:
		return fmt.Sprintf("Certificate: for %s. The proxy has none yet.\n", name)
	case p.leaf.VerifyHostname(name) == nil:
		return fmt.Sprintf("Certificate: for %s, as the proxy's is.\n", name)
	}
	return fmt.Sprintf("Certificate: for %s. The proxy's is for %s: get another one.\n", name,
		strings.Join(names(p.leaf), ", "))
}

// server returns the proxy's name, with its port unless that is 443.
func (p *publication) server() string {
	if p.port == httpsPort {
		return p.name.String()
	}
	return fmt.Sprintf("%s:%d", p.name, p.port)
}

// writeName writes the addresses of the proxy's name.
func (p *publication) writeName(b *strings.Builder) {
	fmt.Fprintf(b, "\n# The name itself\n\n")
	switch {
	case p.name.Host() == "":
		b.WriteString("An address needs no record.")
	case len(p.addrs) == 0:
		fmt.Fprintf(b, "Publish A and AAAA records of %s. This host has no address that others reach.",
			p.name)
	default:
		private := ""
		if !isPublic(p.addrs[0]) {
			private = "\nThis host has private ones alone: replace them if clients come from elsewhere."
		}
		fmt.Fprintf(b, "Publish the addresses of %s, which all ways need.%s Zone file:\n\n", p.name,
			private)
		for _, a := range p.addrs {
			kind := "A"
			if a.Is6() {
				kind = "AAAA"
			}
			b.WriteString(zoneLine(p.name.Host(), kind, a.String()))
		}
	}
	fmt.Fprintf(b, "\nClient:\n\nproxy = %q\n\n%s", p.server(), p.certificate(plain(p.name)))
}

// plain returns a name or an address as a certificate has it.
func plain(n discovery.Name) string {
	if n.Addr().IsValid() {
		return n.Addr().String()
	}
	return n.Host()
}

// zoneLine returns a record as a zone file has it.
func zoneLine(owner, kind, data string) string {
	return fmt.Sprintf("%s. %d IN %s %s\n", owner, publishedFor/time.Second, kind, data)
}

// srvLine returns an SRV record that leads to the proxy.
func (p *publication) srvLine(host string) string {
	return zoneLine("_masque._udp."+host, "SRV",
		fmt.Sprintf("10 60 %d %s.", p.port, p.name.Host()))
}

// delegation returns the contents of a delegation file.
func delegation(server string) string { return fmt.Sprintf(`{"masque.server": %q}`, server) }

// writeFile writes the delegation file and how web servers serve it.
func (p *publication) writeFile(b *strings.Builder) {
	path, body := discovery.FilePath, delegation(p.server())
	maxAge := fmt.Sprintf("max-age=%d", publishedFor/time.Second)
	fmt.Fprintf(b, "\n# A file of the domain's web server (recommended)\n\n"+
		"https://%s%s has this content:\n\n%s\n\n", p.domain, path, body)
	fmt.Fprintf(b, "nginx, in the server block of %s:\n\nlocation = %s {\n"+
		"    default_type application/json;\n    add_header Cache-Control \"%s\";\n"+
		"    return 200 '%s';\n}\n\n", p.domain, path, maxAge, body)
	fmt.Fprintf(b, "Caddy, in the site block of %s:\n\nheader %s Content-Type application/json\n"+
		"header %s Cache-Control %s\nrespond %s `%s`\n\n", p.domain, path, path, maxAge, path, body)
	p.writeClient(b)
	b.WriteString(p.certificate(plain(p.name)))
	b.WriteString("When the file changes, keep the former proxy running for three days: clients may remember the\n" +
		"former content for so long.\n")
}

// writeClient writes the line of the client's file.
func (p *publication) writeClient(b *strings.Builder) {
	fmt.Fprintf(b, "Client:\n\nproxy = %q\n\n", p.domain)
}

// writeSRV writes the ways with SRV records.
func (p *publication) writeSRV(b *strings.Builder) {
	fmt.Fprintf(b, "\n# SRV records, for several hosts and other ports\n\nZone file:\n\n%s\n",
		p.srvLine(p.domain))
	p.writeClient(b)
	b.WriteString(p.certificate(p.domain))
	if p.domain != p.name.Host() {
		fmt.Fprintf(b, "By http-01 and tls-alpn-01, ACME gives it to the host of %s alone.\n",
			p.domain)
	}
	b.WriteString("Targets are names with A or AAAA records of their own, not aliases. For further hosts, add records:\n" +
		"those with the lowest first number are tried first, and the second number is their share. If\n" +
		"another service has the same port, add a record for a port that it does not have.\n")
	if p.domain == p.name.Host() {
		return
	}
	fmt.Fprintf(b, "\n# Signed SRV records, where clients validate\n\n"+
		"The same record, in a zone that is signed by DNSSEC. Client:\n\n"+
		"proxy = %q\n[discovery]\ndnssec = \"use\"\n\n%s", p.domain, p.certificate(p.name.Host()))
	fmt.Fprintf(b, "\n# A file and SRV records (recommended for several hosts)\n\n"+
		"https://%s%s has this content:\n\n%s\n\nZone file:\n\n%s\n", p.domain, discovery.FilePath,
		delegation(p.name.Host()), p.srvLine(p.name.Host()))
	p.writeClient(b)
	b.WriteString(p.certificate(p.name.Host()))
	b.WriteString("The certificate of each host has to be for this name.\n")
}

// writeHTTPS writes the HTTPS record of the proxy's name.
func (p *publication) writeHTTPS(b *strings.Builder) {
	fmt.Fprintf(b, "\n# An HTTPS record, for another port than 443\n\nZone file:\n\n%s\n"+
		"Client:\n\nproxy = %q\n\n%s", zoneLine(p.name.Host(), "HTTPS",
		fmt.Sprintf("1 . alpn=h3 port=%d", p.port)), p.name.Host(), p.certificate(p.name.Host()))
}

// writeNone writes the records of a domain without a proxy.
func (p *publication) writeNone(b *strings.Builder) {
	fmt.Fprintf(b, "\n# No proxy\n\n"+
		"To say that %s has none, in place of all of the above. Zone file:\n\n", p.domain)
	for _, service := range []string{"_masque._udp.", "_masque._tcp.", "_masque-fed._udp.",
		"_masque-fed._tcp."} {
		b.WriteString(zoneLine(service+p.domain, "SRV", "0 0 0 ."))
	}
}
