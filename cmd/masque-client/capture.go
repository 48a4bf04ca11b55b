package main

import (
	"errors"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/control"
)

func (o *options) captureCommand() *cobra.Command {
	var flags cli.CaptureFlags
	cmd := &cobra.Command{
		Use: "capture NAME -o FILE", Short: "Write the packets inside a tunnel into a file",
		Args: cobra.ExactArgs(1),
		Long: "Write the packets inside a running tunnel into a file.\n\n" +
			cli.CaptureText,
		Example:           "  masque-client capture alice -o - | tcpdump -nr -",
		ValidArgsFunction: o.completeRunning,
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			name, err := tunnelName(args[0])
			if err != nil {
				return err
			}
			err = flags.Capture(cmd, control.NewClient(o.RunDir, name), "")
			if errors.Is(err, control.ErrNotRunning) {
				return notRunning(name)
			}
			return err
		}),
	}
	flags.Add(cmd)
	return cmd
}
