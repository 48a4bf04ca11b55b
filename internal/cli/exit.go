// Package cli is the command line of the programs: root commands with their
// common flags, exit codes and last lines, the manual pages, and the options of
// the log.
//
// A command ends with an error of package fault or with any other error, and
// [Main] turns it into the exit code and the last line on standard error.
package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"masquevpn/internal/fault"
	"masquevpn/internal/text"
)

// Main executes a command line and returns the exit code of the process. It
// reports an error on the standard error of the command.
func Main(root *cobra.Command) int {
	root.SilenceErrors, root.SilenceUsage = true, true
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	e := asError(cmd, err)
	fmt.Fprintf(root.ErrOrStderr(), "%s: %s\n", root.Name(), text.OneLine(e.Error()))
	return int(e.Kind)
}

// Run makes a cobra RunE of f. Errors of f become a *fault.Error by
// [FromError]; errors of cobra itself are usage errors.
func Run(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		if err == nil {
			return nil
		}
		return FromError(cmd.ErrOrStderr(), err)
	}
}

// FromError returns any error as a *fault.Error. It writes the errors of a
// fault.List with more than one to w, one per line, and returns a summary.
func FromError(w io.Writer, err error) *fault.Error {
	list, ok := errors.AsType[fault.List](err)
	switch {
	case !ok:
		return fault.From(err)
	case len(list) == 1:
		return list[0]
	}
	for _, e := range list {
		fmt.Fprintln(w, text.OneLine(e.Error()))
	}
	return fault.Errorf(fault.Usage, "%s has %d problems: correct the lines above", list[0].File,
		len(list))
}

// asError returns an error of cobra as a *fault.Error. An error that Run did
// not make is about the command line.
func asError(cmd *cobra.Command, err error) *fault.Error {
	if e, ok := errors.AsType[*fault.Error](err); ok {
		return e
	}
	return &fault.Error{Kind: fault.Usage, Reason: err.Error(),
		Remedy: fmt.Sprintf("see '%s --help'", cmd.CommandPath())}
}
