package cli

import (
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manCommand is `man DIR`, hidden: the build makes the manual pages of packages with it.
func manCommand(program string) *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages into a folder", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: Run(func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			header := &doc.GenManHeader{Title: strings.ToUpper(program), Section: "1", Source: program + " " + NewVersionInfo(program).Version, Manual: "MASQUE VPN"}
			return doc.GenManTree(root, header, args[0])
		}),
	}
}
