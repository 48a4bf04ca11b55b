// Package fault has the errors that end a command or keep a program from
// running. Each has a reason and a remedy for the user.
//
// An [Error] carries data instead of text that others take apart: the kind,
// from which the exit code follows, and the configuration key, from which
// package config finds the line of the file. A [List] holds the errors of one
// file.
package fault

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind classifies an Error. Its values are the exit codes of the programs. The
// zero Kind stands for success.
type Kind int

// The kinds of errors.
const (
	Failure      Kind = 1 // it failed while running
	Usage        Kind = 2 // the command line or the configuration is wrong
	NotConnected Kind = 3 // not running, or not connected
	Credentials  Kind = 4 // the proxy refused the credentials
	Unreachable  Kind = 5 // the proxy does not answer, or a time limit passed
	Identity     Kind = 6 // the proxy could not prove its identity
	Privileges   Kind = 7 // a privilege is missing
	Refused      Kind = 8 // an address or a route was refused
)

// Error is an error with a reason and a remedy for the user.
type Error struct {
	Kind Kind

	// Key is the configuration key that is wrong, as in "tls.cert". Empty if
	// the error is not about one.
	Key string

	// Reason describes the failure. It does not repeat Key.
	Reason string

	// Remedy is an instruction in the imperative. Empty if none is known.
	Remedy string

	// Err is the cause. It may be nil.
	Err error `json:"-"`

	// File is the configuration file with Key. Empty if the error has no place
	// in a file; then Line and Value are empty too.
	File string

	// Line is the 1-based line of Key. 0 if the file does not have it.
	Line int

	// Value is the value of Key as the file has it. Empty if there is none or
	// if it is secret.
	Value string
}

// Errorf returns an Error whose remedy is part of the text, or not known.
func Errorf(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: fmt.Sprintf(format, args...)}
}

// Summary returns the error without its remedy, as FILE:LINE: KEY = VALUE:
// REASON.
func (e *Error) Summary() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d", e.Line)
		}
		b.WriteString(": ")
	}
	if e.Key != "" {
		b.WriteString(e.Key)
		if e.Value != "" {
			b.WriteString(" = " + e.Value)
		}
		b.WriteString(": ")
	}
	b.WriteString(e.Reason)
	return b.String()
}

// Error returns the summary and the remedy.
func (e *Error) Error() string {
	switch {
	case e.Remedy == "":
		return e.Summary()
	case e.File != "":
		return e.Summary() + "; " + e.Remedy
	}
	return e.Summary() + ": " + e.Remedy
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// List holds the errors of a configuration file in the order of its lines. It
// has at least one.
type List []*Error

// Error returns one line for each error.
func (l List) Error() string {
	lines := make([]string, len(l))
	for i, e := range l {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Flatten returns err as an *Error with the whole text of err, if err is or
// wraps an *Error. Other errors are returned as they are.
func Flatten(err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err
	}
	if err != error(e) { // err has more, such as a failure to restore the host
		return &Error{Kind: e.Kind, Reason: err.Error()}
	}
	if e.Remedy == "" {
		if remedy := FileRemedy(err); remedy != "" {
			flat := *e
			flat.Remedy = remedy
			return &flat
		}
	}
	return e
}

// FileRemedy returns the remedy for an error of a file system, "" if none is
// known.
func FileRemedy(err error) string {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "make room there (df -h), and try again"
	case errors.Is(err, unix.EROFS):
		return "choose another folder, or have it mounted for writing"
	}
	return ""
}

// From returns any error as an *Error: the *Error that err is or wraps, or a
// new one with the text of err.
func From(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if errors.Is(err, os.ErrPermission) {
		return Errorf(Privileges,
			"%v: run as root or as the owner, or let the group of a service read it", err)
	}
	if isWrongPath(err) {
		return Errorf(Usage, "%v: name another one", err)
	}
	return &Error{Kind: Failure, Reason: err.Error(), Remedy: FileRemedy(err)}
}

// isWrongPath reports whether a path of the command line or of a configuration
// leads to the wrong kind of file, such as a folder.
func isWrongPath(err error) bool {
	e, ok := errors.AsType[*fs.PathError](err)
	if !ok || e.Op == "write" { // then EFBIG is a limit of the process
		return false
	}
	return slices.ContainsFunc([]error{unix.EISDIR, unix.ENOTDIR, unix.EFBIG, unix.ELOOP,
		unix.ENAMETOOLONG}, func(target error) bool {
		return errors.Is(e, target)
	})
}
