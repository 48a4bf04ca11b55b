package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/certs"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/resolver"
	"masquevpn/routing"
)

// ResolveSchema is the version of the JSON form of `resolve`. It does not
// change if members are added.
const ResolveSchema = 1

// ResolveOptions are the settings of `resolve` that a configuration file can
// have.
type ResolveOptions struct {
	Proxy       string // name to resolve if the command line has none
	Method      discovery.Method
	DNSSEC      discovery.DNSSEC
	Nameservers []netip.AddrPort
	WebCA       *x509.CertPool // authorities of web servers; nil: the system's
	TLS         *tls.Config    // authorities and name of the proxy; may be nil
	Private     bool           // peers may be in private networks
}

// Resolver returns a resolver with the settings of o. program is its name
// towards web servers.
func (o *ResolveOptions) Resolver(program string) *discovery.Resolver {
	config := resolver.Config{CA: o.WebCA, UserAgent: program,
		Control: routing.MarkSocketIfAllowed(routing.DefaultMark)}
	if len(o.Nameservers) > 0 {
		config.Servers = resolver.Trusted(o.Nameservers)
	}
	return resolver.New(config)
}

// DiscoveryFlags are the flags of a command that resolves a domain.
type DiscoveryFlags struct {
	dnssec, ca  string
	nameservers []string
}

// Add adds the flags to a command.
func (f *DiscoveryFlags) Add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.dnssec, "dnssec", "", "`MODE` of signatures: off, use or require")
	flags.StringSliceVar(&f.nameservers, "nameserver", nil,
		"DNS server to ask, an `ADDRESS` with an optional port, trusted to validate signatures")
	flags.StringVar(&f.ca, "ca", "", "`FILE` with the authorities of the domain's web server")
}

// resolve is the command `resolve` with its flags.
type resolve struct {
	ResolveOptions
	program               string
	load                  func(file string) (ResolveOptions, error)
	file                  string
	discovery             DiscoveryFlags
	peer, connect, asJSON bool
}

// ResolveCommand returns the command `resolve` of a program. load reads a
// configuration file.
func ResolveCommand(program string, load func(file string) (ResolveOptions, error)) *cobra.Command {
	r := &resolve{program: program, load: load}
	cmd := &cobra.Command{
		Use: "resolve [NAME]", Short: "Find the proxy of a domain", Args: cobra.MaximumNArgs(1),
		Long: "Find the proxy of a domain, as a client does, and show each source. NAME is a domain, HOST:PORT or an\n" +
			"address; with -c the name in the file is the default. Nothing is changed, and no privilege is needed. The\n" +
			"name of the domain goes to DNS, and in clear text to its web server.",
		RunE: Run(func(cmd *cobra.Command, args []string) error {
			return r.run(cmd.Context(), cmd.OutOrStdout(), args)
		}),
	}
	flags := cmd.Flags()
	flags.StringVarP(&r.file, "config", "c", "", "take settings from the configuration `FILE`")
	r.discovery.Add(cmd)
	flags.BoolVar(&r.peer, "peer", false, "resolve as a proxy that looks for a peer")
	flags.BoolVar(&r.connect, "connect", false,
		"connect to each address too, without credentials, and verify its certificate")
	flags.BoolVar(&r.asJSON, "json", false, "as JSON")
	return cmd
}

// apply completes the options by the flags.
func (r *resolve) apply() error {
	if r.file != "" {
		o, err := r.load(r.file)
		if err != nil {
			return err
		}
		r.ResolveOptions = o
	}
	return r.discovery.Apply(&r.ResolveOptions)
}

// Apply completes o by the flags.
func (f *DiscoveryFlags) Apply(o *ResolveOptions) error {
	switch f.dnssec {
	case "":
	case "off":
		o.DNSSEC = discovery.DNSSECOff
	case "use":
		o.DNSSEC = discovery.DNSSECUse
	case "require":
		o.DNSSEC = discovery.DNSSECRequire
	default:
		return &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("--dnssec %q is not known", f.dnssec),
			Remedy: "write off, use or require"}
	}
	for _, s := range f.nameservers {
		server, err := netip.ParseAddrPort(s)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(s); err != nil {
				return &fault.Error{Kind: fault.Usage,
					Reason: fmt.Sprintf("--nameserver %q is not an address", s),
					Remedy: `write for example "127.0.0.1" or "[::1]:5353"`}
			}
			server = netip.AddrPortFrom(a, 53)
		}
		o.Nameservers = append(o.Nameservers, server)
	}
	if f.ca != "" {
		data, err := files.ReadNamed("--ca", f.ca, false)
		if err != nil {
			return err
		}
		roots, err := certs.Parse("--ca", data)
		if err != nil {
			return err
		}
		o.WebCA = certs.Pool(roots)
	}
	if o.DNSSEC != discovery.DNSSECOff && len(o.Nameservers) == 0 && !resolver.TrustsHost() {
		return &fault.Error{Kind: fault.Usage,
			Reason: "no DNS server is trusted to validate signatures",
			Remedy: `name a validating one with --nameserver, or write "options trust-ad" into /etc/resolv.conf if its servers validate`}
	}
	return nil
}

// run resolves the name and writes the result.
func (r *resolve) run(ctx context.Context, w io.Writer, args []string) error {
	if err := r.apply(); err != nil {
		return err
	}
	input := r.Proxy
	if len(args) > 0 {
		input = args[0]
	}
	if input == "" {
		return &fault.Error{Kind: fault.Usage, Reason: "a name is missing",
			Remedy: "name a domain, or a file with -c"}
	}
	out := &resolution{input: input, purpose: "client"}
	query := discovery.Query{Method: r.Method, DNSSEC: r.DNSSEC, Private: true,
		Transports: []discovery.Transport{discovery.H3}, Asked: out.note}
	if r.TLS != nil {
		query.ServerName = r.TLS.ServerName
	}
	if r.peer {
		out.purpose, query.Purpose, query.Private = "peer", discovery.Peer, r.Private
	}
	var err error
	if query.Name, err = discovery.ParseInput(input); err == nil {
		out.result, err = r.Resolver(r.program).Resolve(ctx, query)
	}
	if r.connect && err == nil {
		out.probe(ctx, r.TLS)
	}
	if r.asJSON {
		if encodeErr := out.encode(w, err); encodeErr != nil {
			return encodeErr
		}
	} else if writeErr := out.write(w, err); writeErr != nil {
		return writeErr
	}
	return resolveError(input, err)
}

// resolveError returns an error of a resolution with its exit code.
func resolveError(input string, err error) error {
	e, ok := errors.AsType[*discovery.Error](err)
	if !ok {
		return err
	}
	if e.Code == discovery.InvalidName {
		return &fault.Error{Kind: fault.Usage, Reason: fmt.Sprintf("%q: %s", input, e.Reason),
			Remedy: e.Remedy}
	}
	return &fault.Error{Kind: fault.Unreachable, Reason: e.Reason, Remedy: e.Remedy}
}

// resolution is the output of `resolve`.
type resolution struct {
	input, purpose string
	result         *discovery.Result
	questions      []discovery.Question
	probes         map[netip.AddrPort]string // outcome of --connect; nil without it
}

// note records a question of the resolution.
func (o *resolution) note(q discovery.Question) { o.questions = append(o.questions, q) }

// probe connects to each address of the result.
func (o *resolution) probe(ctx context.Context, config *tls.Config) {
	d := &dial.Dialer{TLS: &tls.Config{}, Logger: slog.New(slog.DiscardHandler),
		Control: routing.MarkSocketIfAllowed(routing.DefaultMark)}
	if config != nil {
		d.TLS.RootCAs = config.RootCAs
	}
	o.probes = make(map[netip.AddrPort]string)
	for _, g := range o.result.Groups {
		for _, rec := range g.Records {
			for _, a := range rec.Addresses {
				one := rec
				one.Addresses = []netip.Addr{a}
				o.probes[netip.AddrPortFrom(a, rec.Port)] = connectOnce(ctx, d, one)
			}
		}
	}
}

// connectOnce connects to the only address of a record and describes the
// outcome.
func connectOnce(ctx context.Context, d *dial.Dialer, r discovery.Record) string {
	c, err := d.Dial(ctx, []discovery.Group{{Records: []discovery.Record{r}}})
	if err != nil {
		if e, ok := errors.AsType[*dial.Error](err); ok {
			err = e.Err
		}
		return err.Error()
	}
	defer c.Close()
	return fmt.Sprintf("verified as %s, %v", c.Name,
		c.QUIC.ConnectionStats().SmoothedRTT.Round(100*time.Microsecond))
}

// encode writes the output as one JSON object.
func (o *resolution) encode(w io.Writer, failed error) error {
	object := map[string]any{}
	if e, ok := errors.AsType[*discovery.Error](failed); ok {
		object["error"], object["message"] = e.Code, e.Error()
		if e.WellKnown != "" {
			object["well_known"] = e.WellKnown
		}
		if len(e.Skipped) > 0 {
			object["skipped"] = e.Skipped
		}
	} else if o.result != nil {
		data, err := json.Marshal(o.result)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, &object); err != nil {
			return err
		}
	}
	object["schema"], object["input"], object["purpose"] = ResolveSchema, o.input, o.purpose
	object["questions"] = o.questions
	if o.questions == nil {
		object["questions"] = []discovery.Question{}
	}
	if o.probes != nil {
		object["connect"] = o.probes
	}
	return json.NewEncoder(w).Encode(object)
}

// write writes the output for people.
func (o *resolution) write(w io.Writer, failed error) error {
	var b strings.Builder
	e, _ := errors.AsType[*discovery.Error](failed)
	var skipped []discovery.Skipped
	switch {
	case o.result != nil:
		o.writeFile(&b, o.result.WellKnown)
		skipped = o.result.Skipped
	case e != nil && e.Code != discovery.InvalidName:
		o.writeFile(&b, e.WellKnown)
		skipped = e.Skipped
	}
	o.writeQuestions(&b)
	for _, s := range skipped {
		fmt.Fprintf(&b, "%-11sskipped: %s (%s)\n", "", s.Record, s.Reason)
	}
	if o.result != nil {
		o.writeResult(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeFile writes how asking for the delegation file went.
func (o *resolution) writeFile(b *strings.Builder, status string) {
	if status == "none" || status == "" {
		return
	}
	n, err := discovery.ParseInput(o.input)
	if err != nil {
		return
	}
	if o.result != nil && o.result.Delegated != (discovery.Name{}) {
		status = fmt.Sprintf("%s, for %s", o.result.Delegated,
			shortDuration(time.Until(o.result.FileUntil)))
	}
	fmt.Fprintf(b, "%-11shttps://%s%s: %s\n", "file", n.Host(), discovery.FilePath, status)
}

// writeQuestions writes the SRV and HTTPS records, and failures.
func (o *resolution) writeQuestions(b *strings.Builder) {
	list := slices.Clone(o.questions)
	slices.SortStableFunc(list, func(x, y discovery.Question) int {
		return strings.Compare(x.Type.String()+x.Name, y.Type.String()+y.Name)
	})
	for _, q := range list {
		records := q.Type == discovery.TypeSRV || q.Type == discovery.TypeHTTPS
		switch {
		case records && len(q.Answer) > 0:
			signed := ""
			if q.Secure {
				signed = " (signed)"
			}
			fmt.Fprintf(b, "%-11s%s: %s%s\n", q.Type, q.Name, strings.Join(q.Answer, ", "), signed)
		case q.Status != "ok" && q.Status != "none":
			fmt.Fprintf(b, "%-11s%s: %s\n", q.Type, q.Name, q.Status)
		}
	}
}

// writeResult writes the servers as a table.
func (o *resolution) writeResult(b *strings.Builder) {
	r := o.result
	step := r.Step
	if r.TTL >= 0 {
		step += ", for " + shortDuration(r.TTL)
	}
	for _, flag := range []struct {
		set  bool
		text string
	}{{r.Secure, "signed"}, {r.Degraded, "degraded: SRV could not be looked up"},
		{r.Stale, "stale: former SRV records"}} {
		if flag.set {
			step += ", " + flag.text
		}
	}
	fmt.Fprintf(b, "%-11s%s\n%-11s%s\n", "step", step, "authority", r.Authority)
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	header := "PRIORITY\tWEIGHT\tTARGET\tPORT\tPROTOCOL\tADDRESSES\tSNI\tCERTIFICATE FOR"
	if o.probes != nil {
		header += "\tCONNECTION"
	}
	fmt.Fprintln(t, header)
	for _, g := range r.Groups {
		for _, rec := range g.Records {
			o.writeRecord(t, &rec)
		}
	}
	_ = t.Flush()
}

// writeRecord writes a line for a record, or one for each address with its
// connection.
func (o *resolution) writeRecord(w io.Writer, rec *discovery.Record) {
	lines := [][]netip.Addr{rec.Addresses}
	if o.probes != nil {
		lines = nil
		for _, a := range rec.Addresses {
			lines = append(lines, []netip.Addr{a})
		}
	}
	for _, addrs := range lines {
		var list []string
		for _, a := range addrs {
			list = append(list, a.String())
		}
		fmt.Fprintf(w, "%d\t%d\t%s\t%d\t%s\t%s\t%s\t%s", rec.Priority, rec.Weight, rec.Target,
			rec.Port,
			rec.Transport, strings.Join(list, ", "), rec.SNI, strings.Join(rec.Verify, " or "))
		if o.probes != nil {
			fmt.Fprintf(w, "\t%s", o.probes[netip.AddrPortFrom(addrs[0], rec.Port)])
		}
		fmt.Fprintln(w)
	}
}

// shortDuration returns d in seconds without units that are zero.
func shortDuration(d time.Duration) string {
	s := d.Round(time.Second).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
