// Package config parses the configuration files of masque-proxy and
// masque-client: proxy.toml, NAME.toml and users.toml.
//
// [ParseProxy], [ParseClient] and [ParseUsers] turn bytes into validated
// structs. They read no other files: commands read the certificates and secrets
// that a configuration names. All problems of a file are reported together in
// an [Error], each with the file, the line, the key, the value and a remedy.
package config

import (
	"fmt"
	"strings"
)

// Problem is one mistake in a configuration file.
type Problem struct {
	File string // name given to the parser
	// Line is the 1-based line number; 0 without a position in the file.
	Line int
	// Key is a dotted path, as in "tls.cert". Empty for syntax errors.
	Key string
	// Value is formatted as TOML. Empty when absent or secret.
	Value  string
	Reason string // description of the mistake
	Remedy string // instruction for the user; may be empty
}

// String returns one line: FILE:LINE: KEY = VALUE: REASON; REMEDY.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key)
		if p.Value != "" {
			b.WriteString(" = " + p.Value)
		}
		b.WriteString(": ")
	}
	b.WriteString(p.Reason)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return b.String()
}

// Error is returned for a configuration file that cannot be used. It holds at
// least one problem, in the order of the file's lines.
type Error struct {
	Problems []Problem
}

// Error returns one line per problem.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}
