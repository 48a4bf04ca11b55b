package cli

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"masquevpn/internal/buildinfo"
)

// VersionCommand returns the command `version [--json]`.
func VersionCommand(program string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: Run(func(cmd *cobra.Command, _ []string) error {
			v := buildinfo.Of(program)
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s %s %s %s/%s\n", v.Program, v.Version, v.Go,
				v.OS, v.Arch)
			return err
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
