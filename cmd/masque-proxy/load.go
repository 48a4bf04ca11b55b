package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"strings"

	"masquevpn/internal/acme"
	"masquevpn/internal/certs"
	"masquevpn/internal/config"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/proxy"
)

// loaded is a configuration file with the contents of the files that it names.
type loaded struct {
	file      *config.Proxy
	pair      *certs.KeyPair      // tls.cert and tls.key; nil: ACME
	acme      *acme.Config        // nil: the certificate is in files
	clientCAs []*x509.Certificate // certificates of tls.client_ca, may be empty
	users     *userStore          // nil if no method needs users
}

// parseFile reads a configuration without the files that it names.
func parseFile(path string) (*config.Proxy, error) {
	data, _, err := files.Read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &fault.Error{Kind: fault.Usage, Reason: path + " does not exist",
			Remedy: "make a new installation with: " + program + " init --name HOST DIR"}
	}
	if err != nil {
		return nil, err
	}
	return config.ParseProxy(path, data)
}

// load reads a configuration and the files that it names. It changes nothing.
func load(path string, logger *slog.Logger) (*loaded, error) {
	f, err := parseFile(path)
	if err != nil {
		return nil, err
	}
	l := &loaded{file: f}
	if err := l.readFiles(logger); err != nil {
		return nil, f.Locate(err)
	}
	return l, nil
}

// readFiles reads the files that the configuration names.
func (l *loaded) readFiles(logger *slog.Logger) (err error) {
	f := l.file
	if f.ACME != nil {
		if l.acme, err = acmeConfig(f, logger); err != nil {
			return err
		}
	} else if l.pair, err = certs.ReadKeyPair(f, f.Cert, f.Key); err != nil {
		return err
	}
	if f.ClientCA != "" {
		data, err := files.ReadNamed("tls.client_ca", f.ClientCA, false)
		if err != nil {
			return err
		}
		if l.clientCAs, err = certs.Parse("tls.client_ca", data); err != nil {
			return err
		}
	}
	if err := l.loadFederation(logger); err != nil {
		return err
	}
	if f.UsersFile != "" {
		l.users, err = openUsers(f.UsersFile, logger)
	}
	return err
}

// config returns the configuration of the proxy. It calls certificate for each
// handshake.
func (l *loaded) config(certificate func() *tls.Certificate) proxy.Config {
	c := l.file.Config
	c.TLS = &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return certificate(), nil
		},
	}
	if len(l.clientCAs) > 0 {
		c.TLS.ClientCAs = certs.Pool(l.clientCAs)
	}
	if l.users != nil {
		c.Users = l.users
	}
	return c
}

// describe returns a logger whose lines summarise the configuration.
func (l *loaded) describe(logger *slog.Logger) *slog.Logger {
	users := 0
	if l.users != nil {
		users = len(l.users.last().All())
	}
	return logger.With("name", l.file.Name, "methods", strings.Join(l.file.Methods, ","), "users",
		users, "certificate", l.certificateSource(), "congestion",
		l.file.Congestion.Describe())
}

// traces returns the logs of connections that the file turns on.
func (l *loaded) traces() daemon.Traces {
	return daemon.Traces{KeyLog: l.file.KeyLog, QlogDir: l.file.QlogDir}
}

// newServer creates the proxy. Errors about a key have its place in the file.
func (l *loaded) newServer(c proxy.Config) (*proxy.Server, error) {
	s, err := proxy.New(c)
	return s, l.file.Locate(fault.Flatten(err))
}
