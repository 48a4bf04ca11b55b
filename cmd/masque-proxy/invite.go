package main

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/certs"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

// invitation has the arguments of `invite`.
type invitation struct {
	user      string
	config    string   // name of proxy.toml
	out       string   // name of the client's file; empty: standard output
	ca        string   // file of the proxy's authority; empty: found
	caKey     string   // file of the key of the clients' authority; empty: beside its certificate
	proxy     string   // Proxy of the client; empty: from proxy.toml
	valid     string   // validity of the certificate; empty: a year, or until expires if later
	expires   string   // end of access; empty: never
	addresses []string // reserved for the user
	routes    []string // permitted destinations; none: all that the proxy advertises
	rateUp    string   // empty: no limit
	rateDown  string   // empty: no limit
	sessions  int      // 0: the proxy's default
}

func inviteCommand() *cobra.Command {
	var in invitation
	cmd := &cobra.Command{
		Use: "invite NAME -c FILE", Short: "Add a user and make the file for the client",
		Args: cobra.ExactArgs(1),
		Long: "Add a user and make one file for the client: the proxy, its authority, and credentials for the proxy's methods.\n" +
			"The file is a secret: give it to the user and to nobody else. The running proxy accepts the user at once.",
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			in.user = args[0]
			return in.make(cmd.OutOrStdout(), cmd.ErrOrStderr(), time.Now())
		}),
	}
	configFlag(cmd, &in.config)
	f := cmd.Flags()
	f.StringVarP(&in.out, "out", "o", "",
		"`FILE` to write, readable by its owner alone, instead of standard output")
	f.StringVar(&in.ca, "ca", "", "`FILE` with the authority of the proxy's certificate; default: the authority of this installation if it\n"+
		"signed the certificate, otherwise the system's on the client")
	f.StringVar(&in.caKey, "ca-key", "",
		"`FILE` with the key of the clients' authority; default: beside its certificate")
	f.StringVar(&in.proxy, "proxy", "",
		"domain, host:port or URI template for the client; default: the proxy's name and port. A domain, such as\n"+
			"example.org, leads here by what `publish` shows")
	f.StringVar(&in.expires, "expires", "",
		"end of the user's access: a time span in days (30d) or hours (12h), a `DATE` (2026-12-31, in UTC) or a\n"+
			"time (2026-12-31T18:00:00Z); default: never")
	f.StringVar(&in.valid, "valid", "",
		"`SPAN` of the certificate's validity in days (d) or hours (h); default: 365d, or until --expires if later")
	f.StringSliceVar(&in.addresses, "address", nil, "address of the pool reserved for the user")
	f.StringSliceVar(&in.routes, "route", nil,
		"`PREFIX` that the user may reach, within the advertised ones; default: all of these")
	f.StringVar(&in.rateUp, "rate-up", "",
		"limit for packets from the user: a `RATE` in bits per second, such as 20Mbit; default: no limit")
	f.StringVar(&in.rateDown, "rate-down", "", "limit for packets to the user (`RATE`)")
	f.IntVar(&in.sessions, "sessions", 0, "sessions at the same time; 0 for the proxy's default")
	return cmd
}

func (in *invitation) make(out, notes io.Writer, now time.Time) (err error) {
	if !config.IsName(in.user) {
		return &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("%q cannot name a user", in.user),
			Remedy: `write 1 to 64 letters, digits and any of ".-_@", a letter or digit first`}
	}
	if in.proxy != "" && config.CheckProxy(in.proxy) != nil {
		return &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("--proxy %q is not a name, host:port or URI template", in.proxy),
			Remedy: "write for example vpn.example.org"}
	}
	user := config.User{Name: in.user, Sessions: in.sessions, Created: now}
	if user.Expires, err = parseExpires(in.expires, now); err != nil {
		return err
	}
	valid, err := in.validity(user.Expires, now)
	if err != nil {
		return err
	}
	if user.RateUp, err = parseRate("--rate-up", in.rateUp); err != nil {
		return err
	}
	if user.RateDown, err = parseRate("--rate-down", in.rateDown); err != nil {
		return err
	}
	f, err := parseFile(in.config)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Connects to %s as %s. Keep it secret.\nproxy = %q\n", f.Name, in.user,
		in.dial(f))
	roots, err := in.roots(f)
	if err != nil {
		return err
	}
	if roots == nil {
		fmt.Fprintln(notes, "note: the proxy's certificate is not from the authority here; clients verify it with their system's, or with --ca")
	} else {
		fmt.Fprintf(&b, "\n[tls]\nca_pem = '''\n%s'''\n", roots)
	}
	if slices.Contains(f.Methods, proxy.MethodNone) {
		fmt.Fprintln(notes, "note: auth.methods is \"none\": the file has no credentials, and no user was added")
		return in.write(out, b.Bytes())
	}

	unlock, err := files.LockDir(filepath.Dir(f.UsersFile))
	if err != nil {
		return err
	}
	defer unlock()
	users, err := readUsers(f.UsersFile)
	if err != nil {
		return err
	}
	if _, known := users.ByName(in.user); known {
		return &fault.Error{Kind: fault.Usage, Reason: "the user " + in.user + " exists already",
			Remedy: fmt.Sprintf("choose another name, or first: %s user remove %s -c %s", program,
				in.user, in.config)}
	}
	if in.sessions < 0 {
		return fault.Errorf(fault.Usage, "--sessions %d is negative: write a number from 0",
			in.sessions)
	}
	if user.Addresses, err = in.reserve(f, users); err != nil {
		return err
	}
	if user.Routes, err = in.reach(f); err != nil {
		return err
	}
	if slices.Contains(f.Methods, proxy.MethodMTLS) {
		pair, err := in.certificate(f, now, valid)
		if err != nil {
			return err
		}
		chain, err := pki.ParseCertificates(pair.Cert)
		if err != nil {
			return err
		}
		user.Certificate = pki.Fingerprint(chain[0])
		if roots == nil {
			b.WriteString("\n[tls]\n")
		}
		fmt.Fprintf(&b, "cert_pem = '''\n%s'''\nkey_pem = '''\n%s'''\n", pair.Cert, pair.Key)
	}
	if slices.Contains(f.Methods, proxy.MethodToken) {
		token := pki.NewToken()
		user.TokenHash = pki.HashToken(token)
		fmt.Fprintf(&b, "\n[auth]\ntoken = %q\n", token)
	}
	if err := in.finish(out, b.Bytes(), f.UsersFile, users.Add(user)); err != nil {
		return err
	}
	if !user.Expires.IsZero() {
		fmt.Fprintf(notes, "note: %s has access until %s\n", in.user,
			user.Expires.UTC().Format(time.RFC3339))
	}
	return nil
}

// finish writes both the client's file and the users file, or neither of them.
func (in *invitation) finish(out io.Writer, client []byte, usersPath string, users []byte) error {
	if in.out == "" { // output cannot be taken back, so it comes last
		before, _, err := files.Read(usersPath)
		if err != nil {
			return err
		}
		if err := files.Update(usersPath, users); err != nil {
			return err
		}
		if err := in.write(out, client); err != nil {
			return errors.Join(err, files.Update(usersPath, before))
		}
		return nil
	}
	if err := in.write(out, client); err != nil {
		return err
	}
	if err := files.Update(usersPath, users); err != nil {
		return errors.Join(err, os.Remove(in.out))
	}
	return nil
}

// write writes the client's file.
func (in *invitation) write(out io.Writer, client []byte) error {
	if in.out == "" {
		_, err := out.Write(client)
		return err
	}
	err := files.Create(in.out, client, files.SecretMode(in.out))
	if errors.Is(err, fs.ErrExist) {
		return &fault.Error{Kind: fault.Usage, Reason: in.out + " exists already and is left alone",
			Remedy: "name another file with -o, or remove it"}
	}
	return err
}

// dial returns the value of the client's key proxy: the name with its port, so
// that the client looks up addresses alone, or the template if it is not the
// default one.
func (in *invitation) dial(f *config.Proxy) string {
	if in.proxy != "" {
		return in.proxy
	}
	if f.Template != "" {
		return f.Template
	}
	_, port, err := net.SplitHostPort(f.Listen[0])
	if err != nil {
		port = "443"
	}
	return net.JoinHostPort(f.Name, port)
}

// roots returns the authority of the proxy's certificate: the file of --ca, or
// the clients' authority or ca.crt beside the configuration, if one of these
// signed it. Otherwise it returns nil.
func (in *invitation) roots(f *config.Proxy) ([]byte, error) {
	if in.ca != "" {
		data, _, err := files.Read(in.ca)
		if err == nil {
			_, err = pki.ParseCertificates(data)
		}
		if err != nil {
			return nil, fault.Errorf(fault.Usage,
				"--ca %s: %v: name a file with certificates in PEM form", in.ca, err)
		}
		return data, nil
	}
	if f.ACME != nil {
		return nil, nil
	}
	data, err := files.ReadNamed("tls.cert", f.Cert, false)
	if err != nil {
		return nil, f.Locate(err)
	}
	chain, err := certs.Parse("tls.cert", data)
	if err != nil {
		return nil, f.Locate(err)
	}
	for _, path := range []string{f.ClientCA, filepath.Join(filepath.Dir(in.config), caCertFile)} {
		if path == "" {
			continue
		}
		data, _, err := files.Read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		authorities, err := pki.ParseCertificates(data)
		if err != nil {
			continue // the file is for something else
		}
		signed := func(ca *x509.Certificate) bool {
			return slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
				return c.CheckSignatureFrom(ca) == nil
			})
		}
		if slices.ContainsFunc(authorities, signed) {
			return data, nil
		}
	}
	return nil, nil
}

// certificate issues the user's certificate.
func (in *invitation) certificate(f *config.Proxy, now time.Time, valid time.Duration) (pki.Pair,
	error) {
	key := in.caKey
	if key == "" {
		key = strings.TrimSuffix(f.ClientCA, filepath.Ext(f.ClientCA)) + ".key"
	}
	authority, err := readAuthority(f.ClientCA, key)
	if err != nil {
		return pki.Pair{}, err
	}
	return authority.Client(in.user, now, valid)
}

// reserve parses and checks the addresses for the user.
func (in *invitation) reserve(f *config.Proxy, users *config.Users) ([]netip.Addr, error) {
	var list []netip.Addr
	for _, s := range in.addresses {
		a, err := netip.ParseAddr(s)
		bad := func(reason, remedy string) error {
			return &fault.Error{Kind: fault.Usage,
				Reason: fmt.Sprintf("--address %s: %s", s, reason),
				Remedy: remedy}
		}
		pool := f.Pool4
		if err == nil && a.Is6() {
			pool = f.Pool6
		}
		switch {
		case err != nil:
			return nil, bad("not an address", "write for example 10.77.0.9")
		case !pool.IsValid() || !pool.Contains(a):
			return nil, bad("not of the pool", fmt.Sprintf("choose one of %v", pools(f)))
		case a == pool.Addr() || a == pool.Addr().Next():
			return nil, bad("the proxy's own", "choose another one")
		case users.Holder(a) != "":
			return nil, bad("reserved for "+users.Holder(a), "choose another one")
		case slices.Contains(list, a):
			return nil, bad("given twice", "remove one")
		}
		list = append(list, a)
	}
	return list, nil
}

// reach parses and checks the routes for the user.
func (in *invitation) reach(f *config.Proxy) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, s := range in.routes {
		p, err := netip.ParsePrefix(s)
		bad := func(reason, remedy string) error {
			return &fault.Error{Kind: fault.Usage, Reason: fmt.Sprintf("--route %s: %s", s, reason),
				Remedy: remedy}
		}
		switch {
		case err != nil:
			return nil, bad("not an address prefix", "write for example 192.0.2.0/24")
		case p != p.Masked():
			return nil, bad("bits are set behind the prefix length", "write "+p.Masked().String())
		case !advertised(f, p):
			return nil, bad("not of what the proxy advertises",
				"choose a part of routes.advertise in "+in.config)
		}
		list = append(list, p)
	}
	return list, nil
}

// advertised reports whether one of the advertised prefixes contains p.
func advertised(f *config.Proxy, p netip.Prefix) bool {
	return slices.ContainsFunc(f.Advertise, func(a netip.Prefix) bool {
		return a.Bits() <= p.Bits() && a.Contains(p.Addr())
	})
}

func pools(f *config.Proxy) string {
	var words []string
	for _, p := range []netip.Prefix{f.Pool4, f.Pool6} {
		if p.IsValid() {
			words = append(words, p.String())
		}
	}
	return strings.Join(words, " or ")
}

// validity returns the validity of the certificate.
func (in *invitation) validity(expires, now time.Time) (time.Duration, error) {
	if in.valid == "" {
		return max(defaultValidity, expires.Sub(now)), nil
	}
	d, ok := parseSpan(in.valid)
	if !ok {
		return 0, fault.Errorf(fault.Usage,
			"--valid %q is not a time span of at most ten years: write for example 365d", in.valid)
	}
	return d, nil
}

const defaultValidity = 365 * 24 * time.Hour

// parseExpires parses the end of a user's access. The zero Time stands for
// never.
func parseExpires(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, ok := parseSpan(s); ok {
		return now.Add(d).UTC().Truncate(time.Second), nil
	}
	t, err := time.Parse(time.DateOnly, s)
	if err != nil {
		t, err = time.Parse(time.RFC3339, s)
	}
	switch {
	case err != nil || t.Sub(now) > pki.AuthorityValidity:
		return t, fault.Errorf(fault.Usage,
			"--expires %q is neither a time span nor a date within ten years: write for example 30d or %s", s, now.AddDate(0, 1, 0).UTC().Format(time.DateOnly))
	case !t.After(now):
		return t, fault.Errorf(fault.Usage, "--expires %s is in the past: write a later time", s)
	}
	return t, nil
}

// parseSpan parses a number of days, as in 365d, or a time.Duration. It accepts
// at most ten years.
func parseSpan(s string) (time.Duration, bool) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		n, err = strconv.Atoi(days)
		d = time.Duration(n) * 24 * time.Hour
		if n > int(pki.AuthorityValidity/(24*time.Hour)) {
			return 0, false // before it overflows a Duration
		}
	}
	return d, err == nil && d > 0 && d <= pki.AuthorityValidity
}

// parseRate parses the rate of a flag. "" gives 0, no limit.
func parseRate(flag, s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	rate, err := config.ParseRate(s)
	if err != nil {
		return 0, fault.Errorf(fault.Usage, "%s %q is %v: write for example 20Mbit", flag, s, err)
	}
	return rate, nil
}
