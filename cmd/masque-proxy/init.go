package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
)

// The names of the files of an installation.
const (
	caCertFile = "ca.crt"
	caKeyFile  = "ca.key"
	certFile   = "proxy.crt"
	keyFile    = "proxy.key"
	usersFile  = "users.toml"
	configFile = "proxy.toml"
)

// installation has the arguments of `init`.
type installation struct {
	name         string
	listen       []string
	pool4, pool6 string
	advertise    []string
	acme         string // e-mail address of the account; empty: no ACME
	agreed       bool   // the user agrees to the ACME server's terms of service
	directory    string // the ACME server's URL; empty: the default
}

func initCommand() *cobra.Command {
	var in installation
	var renew bool
	cmd := &cobra.Command{
		Use: "init --name HOST DIR", Short: "Make a folder ready for a new proxy",
		Args: cobra.ExactArgs(1),
		Long: "Make a folder ready for a new proxy: a certificate authority, the proxy's certificate, an empty users file and a\n" +
			"configuration that runs as it is. Existing files are never overwritten.\n\n" +
			"With --acme, the proxy gets its certificate from an ACME server, by default Let's Encrypt, and the authority is only\n" +
			"for the certificates of users.\n\n" +
			"With --renew, the proxy gets a new certificate for its key, valid for two more years; `reload` then makes the\n" +
			"running proxy use it.",
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			if renew {
				return renewCertificate(cmd.OutOrStdout(), args[0], in.name, time.Now())
			}
			return in.make(cmd.OutOrStdout(), args[0], time.Now())
		}),
	}
	f := cmd.Flags()
	f.StringVar(&in.name, "name", "", "name or address that clients dial")
	f.StringSliceVar(&in.listen, "listen", []string{"[::]:443"},
		"UDP addresses and ports to listen on")
	f.StringVar(&in.pool4, "ipv4", "10.77.0.0/24", "IPv4 addresses for clients; empty for none")
	f.StringVar(&in.pool6, "ipv6", "fd77::/64", "IPv6 addresses for clients; empty for none")
	f.StringSliceVar(&in.advertise, "route", []string{"0.0.0.0/0", "::/0"},
		"networks that clients reach through the proxy")
	f.StringVar(&in.acme, "acme", "",
		"get the proxy's certificate by ACME; `EMAIL` is where the server may write to")
	f.BoolVar(&in.agreed, "agree-tos", false, "agree to the terms of service of the ACME server")
	f.StringVar(&in.directory, "acme-directory", "",
		"`URL` of the directory of another ACME server than Let's Encrypt")
	f.BoolVar(&renew, "renew", false, "renew the certificate of an installation")
	return cmd
}

func (in *installation) make(w io.Writer, dir string, now time.Time) (err error) {
	if in.name == "" {
		return &fault.Error{Kind: fault.Usage, Reason: "the name that clients dial is missing",
			Remedy: "give it with --name, for example --name vpn.example.org"}
	}
	if in.acme == "" && (in.agreed || in.directory != "") {
		return &fault.Error{Kind: fault.Usage,
			Reason: "--agree-tos and --acme-directory are for ACME",
			Remedy: "add --acme EMAIL, or leave them out"}
	}
	if in.acme != "" && !in.agreed {
		return &fault.Error{Kind: fault.Usage,
			Reason: "the ACME server's terms of service have to be agreed to",
			Remedy: "read them (of Let's Encrypt: https://letsencrypt.org/repository/), and add --agree-tos"}
	}
	text := in.config()
	if _, err := config.ParseProxy(configFile, []byte(text)); err != nil {
		return err
	}
	authority, ca, err := pki.NewAuthority("MASQUE CA of "+shorten(in.name, 48), now)
	if err != nil {
		return err
	}
	var server pki.Pair
	if in.acme == "" {
		if server, err = authority.Server(in.name, nil, now); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	unlock, err := files.LockDir(dir)
	if err != nil {
		return err
	}
	defer unlock()
	secret := files.SecretMode(filepath.Join(dir, keyFile))
	type file struct {
		name string
		data []byte
		mode fs.FileMode
	}
	all := []file{
		{caCertFile, ca.Cert, 0o644},
		{caKeyFile, ca.Key, 0o600}, // the proxy itself does not need it
	}
	if in.acme == "" {
		all = append(all, file{certFile, server.Cert, 0o644}, file{keyFile, server.Key, secret})
	}
	all = append(all, file{usersFile, []byte(usersText), secret},
		file{configFile, []byte(text), 0o644}) // last: with it, the installation is complete
	for _, f := range all {
		if _, err := os.Lstat(filepath.Join(dir, f.name)); !errors.Is(err, fs.ErrNotExist) {
			return exists(filepath.Join(dir, f.name), err)
		}
	}
	for i, f := range all {
		if err := files.Create(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			for _, made := range all[:i] {
				err = errors.Join(err, os.Remove(filepath.Join(dir, made.name)))
			}
			return err
		}
	}
	path := filepath.Join(dir, configFile)
	_, err = fmt.Fprintf(w, "made %s for %s\n\nnext:\n  %s invite NAME -c %s -o NAME.toml\n  sudo %s run -c %s\n", dir, in.name, program, path, program, path)
	return err
}

// exists returns the error for a file that exists. err is the error of Lstat.
func exists(path string, err error) error {
	if err != nil {
		return err
	}
	return &fault.Error{Kind: fault.Usage, Reason: path + " exists already and is left alone",
		Remedy: "name another folder, or remove the old installation"}
}

// shorten limits the length of a string in a common name, which has at most 64
// characters.
func shorten(s string, limit int) string {
	return s[:min(len(s), limit)]
}

// renewCertificate issues a new certificate for the existing key.
func renewCertificate(w io.Writer, dir, name string, now time.Time) error {
	file := filepath.Join(dir, configFile)
	f, err := parseFile(file)
	if err != nil {
		return err
	}
	if name != "" && name != f.Name {
		return f.Locate(&fault.Error{Kind: fault.Usage, Key: "name",
			Reason: "not the name given with --name",
			Remedy: "leave out --name, or change the file"})
	}
	if f.ACME != nil {
		return f.Locate(&fault.Error{Kind: fault.Usage, Key: "tls.acme",
			Reason: "the running proxy renews the certificate by itself",
			Remedy: "leave out --renew"})
	}
	authority, err := readAuthority(filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile))
	if err != nil {
		return err
	}
	key, err := files.ReadNamed("tls.key", f.Key, true)
	if err != nil {
		return f.Locate(err)
	}
	signer, err := pki.ParseKey(key)
	if err != nil {
		return f.Locate(&fault.Error{Kind: fault.Usage, Key: "tls.key", Reason: err.Error(),
			Remedy: "write a private key in PEM form"})
	}
	pair, err := authority.Server(f.Name, signer, now)
	if err != nil {
		return err
	}
	if err := files.Replace(f.Cert, pair.Cert, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "renewed %s\n\nnext:\n  sudo %s reload\n", f.Cert, program)
	return err
}

// readAuthority reads the authority of an installation.
func readAuthority(cert, key string) (*pki.Authority, error) {
	certPEM, _, err := files.Read(cert)
	if err != nil {
		return nil, authorityError(err)
	}
	keyPEM, err := files.ReadSecret(key)
	if err != nil {
		return nil, authorityError(err)
	}
	a, err := pki.ParseAuthority(pki.Pair{Cert: certPEM, Key: keyPEM})
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("%s and %s: %v", cert, key, err),
			Remedy: "put the files of one authority there"}
	}
	return a, nil
}

func authorityError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &fault.Error{Kind: fault.Usage,
			Reason: "the certificate authority is missing (" + err.Error() + ")",
			Remedy: "run this where its key is kept, or name it with --ca-key"}
	}
	return err
}

const usersText = "# Users of the proxy. `masque-proxy invite` adds them, `masque-proxy user remove` takes them out; the running\n" +
	"# proxy notices both.\n"

// config returns the text of proxy.toml.
func (in *installation) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Configuration of masque-proxy. Names of files are relative to this file.
# Check it with: masque-proxy check -c proxy.toml

# What clients dial. The certificate carries it.
name = %q

# UDP.
listen = [%s]

%s
[auth]
methods = ["mtls", "token"]           # any one of them is enough; ["none"] lets everyone in
users = "users.toml"

[tun]
#name = "masque0"                     # the default is the first free one of masque0, masque1, ...
mtu = "auto"
offload = true

# Addresses for clients. The proxy takes the first of each.
[pool]
`, in.name, quoted(in.listen), in.tls())
	if in.pool4 != "" {
		fmt.Fprintf(&b, "ipv4 = %q\n", in.pool4)
	}
	if in.pool6 != "" {
		fmt.Fprintf(&b, "ipv6 = %q\n", in.pool6)
	}
	fmt.Fprintf(&b, `
[routes]
advertise = [%s]
deny = ["169.254.0.0/16"]             # besides the proxy's own addresses and what no proxy forwards
client_to_client = false

# Clients appear under the proxy's own addresses. This also turns forwarding on.
[nat]
masquerade = true

# Besides tunnels, single UDP ports (RFC 9298): masque-client forward-udp.
[connect_udp]
enabled = true

[limits]
sessions = 4096                       # tunnels at the same time
sessions_per_user = 8
udp_flows = 4096                      # besides those, of connect_udp
udp_flows_per_user = 256
`, quoted(in.advertise))
	return b.String()
}

// tls returns the text of the table [tls].
func (in *installation) tls() string {
	const clients = "client_ca = \"ca.crt\"                  # of the clients' certificates; leave it out to turn them off\n"
	if in.acme == "" {
		return "[tls]\ncert = \"proxy.crt\"\nkey = \"proxy.key\"\n" + clients
	}
	directory := "#directory = \"https://acme.example/directory\"   # of another server than Let's Encrypt\n"
	if in.directory != "" {
		directory = fmt.Sprintf("directory = %q\n", in.directory)
	}
	return "[tls]\n" + clients + fmt.Sprintf(`
# The certificate comes from an ACME server, which asks for it at this host on TCP port 443.
[tls.acme]
email = %q
agree_tos = true                      # the server's terms of service
%s#ca = "acme-ca.crt"                   # its authority, if it is no public one
#challenge = "http-01"                # on TCP port 80, instead of "tls-alpn-01"
#listen = ":443"                      # where the challenge is answered, while it is asked
#storage = "/var/lib/masque/acme"
`, in.acme, directory)
}

func quoted(words []string) string {
	list := make([]string, len(words))
	for i, w := range words {
		list[i] = fmt.Sprintf("%q", w)
	}
	return strings.Join(list, ", ")
}
