package cli

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Version is set with -ldflags "-X masquevpn/internal/cli.Version=v1.2.3".
var Version string

// VersionInfo describes the program.
type VersionInfo struct {
	Program string `json:"program"`
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// NewVersionInfo takes the version from the build, and from the module when
// the build set none.
func NewVersionInfo(program string) VersionInfo {
	v := VersionInfo{Program: program, Version: Version, Go: runtime.Version(), OS: runtime.GOOS,
		Arch: runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				v.Commit = s.Value
			case s.Key == "vcs.modified" && s.Value == "true":
				v.Commit += "+changes"
			}
		}
	}
	if v.Version == "" {
		v.Version = "(devel)"
	}
	return v
}

// VersionCommand is `version [--json]`.
func VersionCommand(program string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: Run(func(cmd *cobra.Command, _ []string) error {
			v := NewVersionInfo(program)
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
