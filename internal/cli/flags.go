package cli

import (
	"github.com/spf13/cobra"

	"masquevpn/internal/control"
)

// Globals are the flags that every command of a program has.
type Globals struct {
	RunDir string
	Log    LogOptions

	level, format string
}

// NewRoot makes the root command of a program, with the flags of Globals and
// the commands version and completion. The page is what its manual says
// besides.
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
		"`folder` of sockets, locks and logs of what runs")
	flags.StringVar(&g.level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&g.format, "log-format", FormatAuto,
		"auto, text or json; auto is text, and json in systemd's journal")
	root.AddCommand(VersionCommand(program), manCommand(program, page))
	return root, g
}

// Missing is the error of a command line without a command.
func Missing(program string) error {
	return &Error{Code: Usage, Reason: "a command is missing",
		Remedy: "see '" + program + " --help'"}
}
