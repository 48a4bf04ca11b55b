// Package config parses the configuration files of masque-proxy and
// masque-client: proxy.toml, NAME.toml and users.toml.
//
// [ParseProxy], [ParseClient] and [ParseUsers] turn bytes into validated
// structs. They read no other files: commands read the certificates and secrets
// that a configuration names. All problems of a file are reported together in a
// fault.List, each with the file, the line, the key, the value and a remedy.
// Problems that are found later get their place in the file from Locate.
package config
