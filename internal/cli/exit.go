// Package cli is what masque-client and masque-proxy have in common: exit
// codes and last lines, logs, signals, versions, secret files and the checks
// of a host.
package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/internal/config"
)

// Code is an exit code. All commands use the same ones.
type Code int

// The exit codes.
const (
	OK           Code = 0
	Failure      Code = 1 // failed while running
	Usage        Code = 2 // wrong command line or configuration
	NotConnected Code = 3 // not running, or not connected
	Credentials  Code = 4 // the proxy refused the credentials
	Unreachable  Code = 5 // the proxy does not answer, or a time limit passed
	Identity     Code = 6 // the proxy could not prove who it is
	Privileges   Code = 7 // a privilege is missing
	Refused      Code = 8 // an address or a route was refused
)

// Error ends a command: its last line on standard error says the reason and
// what to do.
type Error struct {
	Code   Code
	Reason string
	Remedy string // may be empty
}

func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Reason
	}
	return e.Reason + ": " + e.Remedy
}

// Errorf makes an Error whose remedy is part of the text, or not known.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Reason: fmt.Sprintf(format, args...)}
}

// Main executes a command line and returns the process's exit code. What goes
// wrong is reported on the command's standard error.
func Main(root *cobra.Command) int {
	root.SilenceErrors, root.SilenceUsage = true, true
	cmd, err := root.ExecuteC()
	if err == nil {
		return int(OK)
	}
	return int(Report(root.ErrOrStderr(), root.Name(), asError(cmd, err)))
}

// Report writes an error's last line, with further lines of it before, and
// returns its code.
func Report(w io.Writer, program string, e *Error) Code {
	fmt.Fprintf(w, "%s: %s\n", program, OneLine(e.Error()))
	return e.Code
}

// Run makes a cobra RunE: errors of the function that are not an *Error or a
// *config.Error are failures, while those of cobra itself are usage errors.
func Run(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		if err == nil {
			return nil
		}
		return FromError(cmd.ErrOrStderr(), err)
	}
}

// FromError makes an *Error of any error. If it is about several problems of
// a configuration, they are written to w, one per line, and the *Error sums up.
func FromError(w io.Writer, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if e, ok := errors.AsType[*config.Error](err); ok {
		if len(e.Problems) == 1 {
			return Errorf(Usage, "%s", e.Problems[0])
		}
		for _, p := range e.Problems {
			fmt.Fprintln(w, OneLine(p.String()))
		}
		return Errorf(Usage, "%s has %d problems: correct the lines above", e.Problems[0].File,
			len(e.Problems))
	}
	if errors.Is(err, os.ErrPermission) {
		return Errorf(Privileges, "%v: run as root or as the owner, or let the group of a service read it", err)
	}
	if isWrongPath(err) {
		return Errorf(Usage, "%v: name another one", err)
	}
	return &Error{Code: Failure, Reason: err.Error(), Remedy: FileRemedy(err)}
}

// FileRemedy is what to do about an error of a file system, empty if that is
// not known.
func FileRemedy(err error) string {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "make room there (df -h), and try again"
	case errors.Is(err, unix.EROFS):
		return "choose another folder, or have it mounted for writing"
	}
	return ""
}

// isWrongPath tells whether an error says that a path of the command line or a
// configuration leads to nothing of use, such as to a folder in place of a
// file.
func isWrongPath(err error) bool {
	e, ok := errors.AsType[*fs.PathError](err)
	if !ok || e.Op == "write" { // there EFBIG is a limit of the process
		return false
	}
	return slices.ContainsFunc([]error{unix.EISDIR, unix.ENOTDIR, unix.EFBIG, unix.ELOOP,
		unix.ENAMETOOLONG}, func(target error) bool {
		return errors.Is(e, target)
	})
}

// asError makes an *Error of what cobra gave. What is not ours is about the
// command line.
func asError(cmd *cobra.Command, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Code: Usage, Reason: err.Error(),
		Remedy: fmt.Sprintf("see '%s --help'", cmd.CommandPath())}
}

// OneLine keeps text on one line and free of control characters: it may come
// from a peer or a file and go to a terminal.
func OneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || '\u0080' <= r && r < '\u00a0' {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
}
