package main

import "masquevpn/internal/cli"

// resolveOptions returns the settings of `resolve` in a configuration file.
func resolveOptions(file string) (o cli.ResolveOptions, err error) {
	_, err = parseFile(file)
	return o, err
}
