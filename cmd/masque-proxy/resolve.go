package main

import "masquevpn/internal/cli"

// resolveOptions returns the settings of `resolve` in a configuration file.
func resolveOptions(file string) (o cli.ResolveOptions, err error) {
	f, err := parseFile(file)
	if err != nil {
		return o, err
	}
	return cli.ResolveOptions{DNSSEC: f.Federation.DNSSEC, Nameservers: f.Nameservers,
		Private: f.Federation.Private}, nil
}
