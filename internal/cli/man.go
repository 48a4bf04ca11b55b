package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// A Page is what the manual page of a program says besides its commands and
// flags.
type Page struct {
	Files   []Entry
	SeeAlso []string // such as "masque-proxy(1)"
}

// An Entry is a term with its meaning.
type Entry struct{ Term, Meaning string }

// exitStatus describes the codes.
var exitStatus = []Entry{
	OK: {"0", "Well."}, Failure: {"1", "Failure while running."},
	Usage:        {"2", "Usage or configuration."},
	NotConnected: {"3", "Not running or not connected."},
	Credentials:  {"4", "Credentials refused."},
	Unreachable:  {"5", "Proxy unreachable, or timed out."},
	Identity:     {"6", "The proxy's identity could not be verified."},
	Privileges:   {"7", "Privileges missing."}, Refused: {"8", "Address or route refused."},
}

// manCommand is `man DIR`, hidden: the build makes the manual pages of packages
// with it.
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
				Source: program + " " + NewVersionInfo(program).Version, Manual: "MASQUE VPN"}
			return page.write(root, header, args[0])
		}),
	}
}

// write writes the pages of a command and of those below it.
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

// complete adds to a page what its generator does not know of.
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
		"The last line on standard error says the reason and what to do.\n"
	if !cmd.HasParent() {
		body += section("FILES", p.Files)
		for _, other := range p.SeeAlso {
			seeAlso = strings.TrimSuffix(seeAlso, "\n") + ", \\fB" + other + "\\fP\n"
		}
	}
	return body + ".SH SEE ALSO\n" + seeAlso
}

// noDefault takes away what is not worth a word: that a flag is not set.
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

// roff writes text so that nothing in it is a request or an escape.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`).Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}
