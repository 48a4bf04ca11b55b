package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"masquevpn/internal/buildinfo"
	"masquevpn/internal/fault"
)

// Page holds the parts of a program's manual page that do not follow from its
// commands and flags.
type Page struct {
	Files   []Entry
	SeeAlso []string // such as "masque-proxy(1)"
}

// Entry is a term with its meaning.
type Entry struct{ Term, Meaning string }

// exitStatus describes the exit codes.
var exitStatus = []Entry{
	0:                  {"0", "Well."},
	fault.Failure:      {"1", "Failure while running."},
	fault.Usage:        {"2", "Usage or configuration."},
	fault.NotConnected: {"3", "Not running or not connected."},
	fault.Credentials:  {"4", "Credentials refused."},
	fault.Unreachable:  {"5", "Proxy unreachable, or timed out."},
	fault.Identity:     {"6", "The proxy's identity could not be verified."},
	fault.Privileges:   {"7", "Privileges missing."},
	fault.Refused:      {"8", "Address or route refused."},
}

// manCommand returns the hidden command `man DIR`, with which `make packages`
// writes the manual pages.
func manCommand(program string, page Page) *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages into a folder", Args: cobra.ExactArgs(1),
		Hidden: true,
		RunE: Run(func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			header := doc.GenManHeader{Section: "1",
				Source: program + " " + buildinfo.Of(program).Version, Manual: "MASQUE VPN"}
			return page.write(root, header, args[0])
		}),
	}
}

// write writes the pages of a command and of its subcommands.
func (p Page) write(cmd *cobra.Command, header doc.GenManHeader, dir string) error {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && !c.IsAdditionalHelpTopicCommand() {
			if err := p.write(c, header, dir); err != nil {
				return err
			}
		}
	}
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	header.Title = strings.ToUpper(name)
	var page bytes.Buffer
	if err := doc.GenMan(cmd, &header, &page); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".1"),
		[]byte(p.complete(cmd, page.String())), 0o644)
}

// complete adds the parts that the generator of cobra lacks to a page.
func (p Page) complete(cmd *cobra.Command, page string) string {
	page = noDefault.Replace(page)
	if cmd.HasSubCommands() {
		page = strings.Replace(page, cmd.CommandPath()+" [flags]",
			cmd.CommandPath()+" COMMAND [flags]", 1)
	}
	body, seeAlso, _ := strings.Cut(page, ".SH SEE ALSO\n")
	var commands []Entry
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			commands = append(commands, Entry{c.Name(), c.Short + "."})
		}
	}
	body += section("COMMANDS", commands)
	body += section("EXIT STATUS", exitStatus) +
		"The last line on standard error names the reason and what to do.\n"
	if !cmd.HasParent() {
		body += section("FILES", p.Files)
		for _, other := range p.SeeAlso {
			seeAlso = strings.TrimSuffix(seeAlso, "\n") + ", \\fB" + other + "\\fP\n"
		}
	}
	return body + ".SH SEE ALSO\n" + seeAlso
}

// noDefault removes the defaults of flags that are not set.
var noDefault = strings.NewReplacer("\\fP[=false]", `\fP`, "\\fP=\"\"", `\fP`, "\\fP=[]", `\fP`)

func section(title string, entries []Entry) string {
	if len(entries) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, ".SH %s\n", title)
	for _, e := range entries {
		fmt.Fprintf(&b, ".TP\n\\fB%s\\fP\n%s\n", roff(e.Term), roff(e.Meaning))
	}
	return b.String() + ".PP\n"
}

// roff escapes text so that nothing in it is a request or an escape sequence.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`).Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}
