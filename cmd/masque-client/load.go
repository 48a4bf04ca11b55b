package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"

	"masquevpn/client"
	"masquevpn/internal/certs"
	"masquevpn/internal/config"
	"masquevpn/internal/daemon"
	"masquevpn/internal/discovery"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/resolver"
)

// loaded is a configuration file with the contents of the files that it names.
type loaded struct {
	file   *config.Client
	config client.Config
	roots  []*x509.Certificate // certificates of tls.ca; empty: the system's
	chain  []*x509.Certificate // certificates of tls.cert, leaf first; may be empty

	// pair has tls.cert and tls.key if both are files. reloader reads them
	// again once follow was called. Both may be nil.
	pair     *certs.KeyPair
	reloader *certs.Reloader
}

// load reads the file of a tunnel and the files that it names. It changes
// nothing.
func load(path, name string) (*loaded, error) {
	data, shared, err := files.Read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &fault.Error{Kind: fault.Usage, Reason: path + " does not exist",
			Remedy: "copy the file that `masque-proxy invite` made there, or name another one"}
	}
	if err != nil {
		return nil, err
	}
	f, err := config.ParseClient(path, data)
	if err != nil {
		return nil, err
	}
	if shared && f.Secret() {
		return nil, files.Exposed(path)
	}
	l := &loaded{file: f}
	if err := l.loadDiscovery(); err != nil {
		return nil, f.Locate(err)
	}
	tlsConfig, err := l.tls()
	if err != nil {
		return nil, f.Locate(err)
	}
	token, err := l.token()
	if err != nil {
		return nil, f.Locate(err)
	}
	l.config = f.Config
	l.config.Name, l.config.TLS, l.config.Token = name, tlsConfig, token
	return l, nil
}

// loadDiscovery reads discovery.ca, and checks that somebody is trusted to
// validate signatures if they are wanted.
func (l *loaded) loadDiscovery() error {
	d := &l.file.Discovery
	if l.file.WebCA != "" {
		data, err := files.ReadNamed("discovery.ca", l.file.WebCA, false)
		if err != nil {
			return err
		}
		roots, err := certs.Parse("discovery.ca", data)
		if err != nil {
			return err
		}
		d.CA = certs.Pool(roots)
	}
	if d.DNSSEC != discovery.DNSSECOff && len(d.Nameservers) == 0 && !resolver.TrustsHost() {
		return &fault.Error{Kind: fault.Usage, Key: "discovery.dnssec",
			Reason: "no DNS server is trusted to validate signatures",
			Remedy: `name a validating one in discovery.nameservers, or write "options trust-ad" into /etc/resolv.conf if its servers validate`}
	}
	return nil
}

// unprotected returns the DNS servers that are trusted to validate signatures
// although answers of theirs can be forged.
func (l *loaded) unprotected() []netip.AddrPort {
	if l.file.Discovery.DNSSEC == discovery.DNSSECOff {
		return nil
	}
	return resolver.Unprotected(l.file.Discovery.Nameservers)
}

// pem returns the value inline of the key NAME_pem if it is not empty, and
// otherwise the contents of the file path, the value of the key NAME. key is
// the one of the two keys that has the data. Without either, data is nil.
func (l *loaded) pem(name, path, inline string, secret bool) (key string, data []byte, err error) {
	if inline != "" {
		return name + "_pem", []byte(inline), nil
	}
	if path == "" {
		return name, nil, nil
	}
	data, err = files.ReadNamed(name, path, secret)
	return name, data, err
}

func (l *loaded) tls() (*tls.Config, error) {
	f := l.file
	c := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: f.ServerName}
	key, data, err := l.pem("tls.ca", f.CA, f.CAPEM, false)
	if err != nil {
		return nil, err
	}
	if data != nil {
		if l.roots, err = certs.Parse(key, data); err != nil {
			return nil, err
		}
		c.RootCAs = certs.Pool(l.roots)
	}
	if f.Cert != "" && f.Key != "" {
		if l.pair, err = certs.ReadKeyPair(f, f.Cert, f.Key); err != nil {
			return nil, err
		}
		l.chain, c.Certificates = l.pair.Chain, []tls.Certificate{l.pair.Certificate}
		return c, nil
	}
	key, data, err = l.pem("tls.cert", f.Cert, f.CertPEM, false)
	if err != nil || data == nil {
		return c, err
	}
	if l.chain, err = certs.Parse(key, data); err != nil {
		return nil, err
	}
	if key, data, err = l.pem("tls.key", f.Key, f.KeyPEM, true); err != nil {
		return nil, err
	}
	pair, err := certs.ParseKey(key, data, l.chain)
	if err != nil {
		return nil, err
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

func (l *loaded) token() (string, error) {
	key, token := "auth.token", l.file.Token
	if l.file.TokenFile != "" {
		key = "auth.token_file"
		data, err := files.ReadNamed(key, l.file.TokenFile, true)
		if err != nil {
			return "", err
		}
		if token = string(bytes.TrimSpace(data)); token == "" {
			return "", &fault.Error{Kind: fault.Usage, Key: key, Reason: "the file is empty",
				Remedy: "write the token into it"}
		}
	}
	for _, r := range token {
		if r <= ' ' || r >= 0x7f {
			return "", &fault.Error{Kind: fault.Usage, Key: key,
				Reason: "a token has no spaces, line breaks or characters beyond ASCII",
				Remedy: "write it as it was given to you"}
		}
	}
	return token, nil
}

// newClient creates the client. Errors about a key have its place in the file.
func (l *loaded) newClient() (*client.Client, error) {
	c, err := client.New(l.config)
	return c, l.file.Locate(fault.Flatten(err))
}

// traces returns the logs of connections that the file turns on.
func (l *loaded) traces() daemon.Traces {
	return daemon.Traces{KeyLog: l.file.KeyLog, QlogDir: l.file.QlogDir}
}

// describe returns a logger whose lines summarise the configuration.
func (l *loaded) describe(logger *slog.Logger) *slog.Logger {
	var credentials []string
	if len(l.chain) > 0 {
		credentials = append(credentials,
			fmt.Sprintf("certificate of %s", l.chain[0].Subject.CommonName))
	}
	if l.config.Token != "" {
		credentials = append(credentials, "token")
	}
	trust := "system"
	if len(l.roots) > 0 {
		trust = "tls.ca"
	}
	return logger.With("proxy", l.config.Proxy, "trust", trust, "credentials",
		strings.Join(credentials, ", "),
		"congestion", l.config.Congestion.Describe())
}
