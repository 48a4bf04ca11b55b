// Package config parses the configuration files of masque-proxy and
// masque-client: proxy.toml, NAME.toml and users.toml.
//
// It turns bytes into validated structs and touches nothing else: reading the
// files, and the certificates and secrets that they name, is the business of
// the commands. All problems of a file are reported together, each with the
// file, the line, the key, the value and what to do about it.
package config

import (
	"fmt"
	"strings"
)

// A Problem is one thing wrong with a configuration file.
type Problem struct {
	File   string // as it was given to the parser
	Line   int    // 1-based; 0 when the problem has no place in the file
	Key    string // dotted, as in "tls.cert"; empty for syntax errors
	Value  string // as a TOML value; empty when absent or secret
	Reason string // what is wrong
	Remedy string // what to do about it; may be empty
}

// String is one line: FILE:LINE: KEY = VALUE: REASON; REMEDY.
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

// Error is the error of a configuration file that cannot be used. It holds at
// least one problem, in the order of the file's lines.
type Error struct {
	Problems []Problem
}

// Error has one line per problem.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}
