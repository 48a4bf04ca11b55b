package main

import (
	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/control"
)

func (o *options) captureCommand() *cobra.Command {
	var flags cli.CaptureFlags
	cmd := &cobra.Command{
		Use:   "capture [SESSION] -o FILE",
		Short: "Write the packets of one session or of all into a file",
		Args:  cobra.MaximumNArgs(1),
		Long: "Write the packets of one session, until it ends, or of all sessions into a file; `sessions` shows the IDs. UDP flows\n" +
			"have no IP packets, so they are not in the file.\n\n" + cli.CaptureText,
		Example: "  masque-proxy capture 3 -o - | tcpdump -nr -",
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			session := ""
			if len(args) == 1 {
				session = args[0]
			}
			return o.answerError(flags.Capture(cmd, control.NewClient(o.RunDir, instance), session))
		}),
	}
	flags.Add(cmd)
	return cmd
}
