package main

import "masquevpn/internal/cli"

// resolveOptions returns the settings of `resolve` in a configuration file.
func resolveOptions(file string) (o cli.ResolveOptions, err error) {
	name, err := tunnelName(file)
	if err != nil {
		return o, err
	}
	l, err := load(file, name)
	if err != nil {
		return o, err
	}
	d := l.config.Discovery
	return cli.ResolveOptions{Proxy: l.config.Proxy, Method: d.Method, DNSSEC: d.DNSSEC,
		Nameservers: d.Nameservers, WebCA: d.CA, TLS: l.config.TLS}, nil
}
