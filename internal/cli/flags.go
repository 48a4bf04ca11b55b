package cli

import (
	"github.com/spf13/cobra"

	"masquevpn/internal/control"
	"masquevpn/internal/fault"
)

// Globals are the flags of all commands of a program.
type Globals struct {
	RunDir string
	Log    LogOptions

	level, format string
}

// NewRoot returns the root command of a program with the flags of Globals and
// the commands version, completion and man. page completes its manual page.
func NewRoot(program, short string, page Page) (*cobra.Command, *Globals) {
	g := new(Globals)
	root := &cobra.Command{
		Use: program, Short: short, Args: cobra.NoArgs,
		PersistentPreRunE: Run(func(*cobra.Command, []string) (err error) {
			g.Log, err = ParseLogOptions(g.level, g.format)
			return err
		}),
		RunE: Run(func(cmd *cobra.Command, _ []string) error {
			return Missing(program)
		}),
	}
	flags := root.PersistentFlags()
	flags.StringVar(&g.RunDir, "run-dir", control.DefaultDir,
		"`folder` for sockets, locks and logs")
	flags.StringVar(&g.level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&g.format, "log-format", FormatAuto,
		"auto, text or json; auto is text, and json in systemd's journal")
	root.AddCommand(VersionCommand(program), manCommand(program, page))
	return root, g
}

// Missing returns the error for a command line without a command.
func Missing(program string) error {
	return &fault.Error{Kind: fault.Usage, Reason: "a command is missing",
		Remedy: "see '" + program + " --help'"}
}
