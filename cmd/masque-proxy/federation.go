package main

import (
	"crypto/x509"
	"fmt"
	"log/slog"

	"masquevpn/internal/certs"
	"masquevpn/internal/discovery"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/resolver"
)

// loadFederation reads the authorities of peers, makes the resolver for their
// domains, and checks that somebody is trusted to validate signatures if they
// are wanted.
func (l *loaded) loadFederation(logger *slog.Logger) (err error) {
	f := &l.file.Federation
	if f.CA, err = authorities("federation.ca", l.file.FederationCA); err != nil {
		return err
	}
	for i := range l.file.Peers {
		p := &l.file.Peers[i]
		if p.CA, err = authorities(fmt.Sprintf("peer[%d].ca", i), l.file.PeerCAs[i]); err != nil {
			return err
		}
	}
	if f.DNSSEC != discovery.DNSSECOff && len(l.file.Nameservers) == 0 && !resolver.TrustsHost() {
		return &fault.Error{Kind: fault.Usage, Key: "federation.dnssec",
			Reason: "no DNS server is trusted to validate signatures",
			Remedy: `name a validating one in federation.nameservers, or write "options trust-ad" into /etc/resolv.conf if its servers validate`}
	}
	c := resolver.Config{UserAgent: program, Logger: logger}
	if len(l.file.Nameservers) > 0 {
		c.Servers = resolver.Trusted(l.file.Nameservers)
	}
	f.Resolver = resolver.New(c)
	return nil
}

// authorities reads the file of a key. It returns nil, the system's
// authorities, if there is no file.
func authorities(key, path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	data, err := files.ReadNamed(key, path, false)
	if err != nil {
		return nil, err
	}
	list, err := certs.Parse(key, data)
	if err != nil {
		return nil, err
	}
	return certs.Pool(list), nil
}
