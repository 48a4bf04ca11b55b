package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"strings"

	"masquevpn/internal/acme"
	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/congestion"
	"masquevpn/proxy"
	"masquevpn/tun"
)

// loaded is a configuration file with all that it refers to.
type loaded struct {
	file      *config.Proxy
	pair      *cli.Pair           // tls.cert and tls.key; nil: ACME
	acme      *acme.Config        // nil: the certificate is in files
	clientCAs []*x509.Certificate // certificates in tls.client_ca, may be empty
	users     *userStore          // nil if no method needs users
}

// parseFile reads the configuration alone.
func parseFile(path string) (*config.Proxy, error) {
	data, _, err := cli.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &cli.Error{Code: cli.Usage, Reason: path + " does not exist",
			Remedy: "make a new installation with: " + program + " init --name HOST DIR"}
	}
	if err != nil {
		return nil, err
	}
	return config.ParseProxy(path, data)
}

// load reads a configuration and the files that it names. Nothing else is
// touched.
func load(path string, logger *slog.Logger) (*loaded, error) {
	f, err := parseFile(path)
	if err != nil {
		return nil, err
	}
	l := &loaded{file: f}
	if f.ACME != nil {
		if l.acme, err = acmeConfig(f, logger); err != nil {
			return nil, err
		}
	} else if l.pair, err = cli.ReadPair(f, f.Cert, f.Key); err != nil {
		return nil, err
	}
	if f.ClientCA != "" {
		data, err := cli.ReadNamed(f, "tls.client_ca", f.ClientCA, false)
		if err != nil {
			return nil, err
		}
		if l.clientCAs, err = cli.ParseCertificates(f, "tls.client_ca", data); err != nil {
			return nil, err
		}
	}
	if f.Users != "" {
		if l.users, err = openUsers(f.Users, logger); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// config is what the proxy is made of. The certificate is asked for with each
// handshake.
func (l *loaded) config(certificate func() *tls.Certificate) proxy.Config {
	f := l.file
	c := proxy.Config{
		Name: f.Name, Listen: f.Listen, Template: f.Template, Methods: f.Methods,
		TLS: &tls.Config{
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return certificate(), nil
			},
		},
		TUN:   tun.Config{Name: f.Device, MTU: f.MTU, Offload: f.Offload},
		Pool4: f.Pool4, Pool6: f.Pool6, Delegate4: f.Delegate4, Delegate6: f.Delegate6,
		Hold:      f.Hold,
		Advertise: f.Advertise, Deny: f.Deny, ClientToClient: f.ClientToClient,
		ConnectUDP: f.ConnectUDP,
		Masquerade: f.Masquerade, KernelHopLimit: f.KernelHopLimit,
		Congestion: congestion.Mode(f.Congestion),
		DNS: proxy.DNS{Servers: f.DNSServers, Domains: f.DNSDomains, Search: f.DNSSearch,
			NAT64: f.NAT64},
		MaxSessions: f.Sessions, MaxSessionsPerUser: f.SessionsPerUser,
		MaxAddressesPerUser: f.AddressesPerUser,
		MaxUDPFlows:         f.UDPFlows, MaxUDPFlowsPerUser: f.UDPFlowsPerUser,
		MaxPending: f.Pending, MaxPendingPerAddress: f.PendingPerAddress,
	}
	for _, site := range f.Sites {
		c.Sites = append(c.Sites, proxy.Site(site))
	}
	if len(l.clientCAs) > 0 {
		c.TLS.ClientCAs = cli.Pool(l.clientCAs)
	}
	if l.users != nil {
		c.Users = l.users
	}
	return c
}

// newServer makes the proxy. A key that it refuses gets its place in the file.
func (l *loaded) newServer(c proxy.Config) (*proxy.Server, error) {
	s, err := proxy.New(c)
	if e, ok := errors.AsType[*proxy.Error](err); ok && e.Kind == proxy.KindUsage {
		if key, reason, ok := strings.Cut(e.Reason, ": "); ok {
			return nil, l.file.Problem(key, reason, e.Remedy)
		}
	}
	return s, exitError(err)
}

// exitError gives an error of the proxy its exit code.
func exitError(err error) error {
	e, ok := errors.AsType[*proxy.Error](err)
	if !ok {
		return err
	}
	reason := e.Reason
	if err != error(e) { // err says more, as when the host could not be restored
		reason = err.Error()
	}
	return &cli.Error{Code: cli.Code(e.Kind), Reason: reason,
		Remedy: cmp.Or(e.Remedy, cli.FileRemedy(err))}
}
