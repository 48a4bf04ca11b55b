// Masque-lab demonstrates and tests the VPN on one machine. It makes hosts in
// network namespaces, runs masque-proxy and masque-client in them, and reports
// for each step whether it succeeded. The machine itself is not changed.
//
// masque-lab demo connects a client to a proxy, uses the tunnel, and checks
// that the hosts are restored. masque-lab list names further scenarios, and
// masque-lab run SCENARIO runs one of them. masque-lab shell connects a client
// and starts a shell on it. If a step fails, the command keeps the logs,
// captures and configurations and names their directory.
//
// The program needs root, or a kernel that lets ordinary users make user
// namespaces, and /dev/net/tun. It runs the masque-client and masque-proxy from
// its own directory or from PATH.
//
// # Structure
//
// scenario.go has the scenarios. A scenario is a list of steps, and report.go
// prints their results as text or JSON. pair.go makes the hosts (package lab)
// and runs the programs. checks.go has the checks of the steps, site.go the
// scenario with two sites, and shell.go the shell.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/lab"
)

const program = "masque-lab"

func main() { os.Exit(cli.Main(newRoot())) }

// options are the flags of the command line.
type options struct {
	logLevel, logFormat string
	logs                cli.LogOptions // parsed from the two flags above
	json                bool
	keep                bool
	artifacts           string
}

func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   program,
		Short: "Try the VPN between hosts that exist only on this machine",
		Long: `Masque-lab makes hosts in network namespaces on this machine, runs masque-proxy
and masque-client in them, and reports for each step whether it succeeded. It needs
root, or a kernel that lets ordinary users make user namespaces, and /dev/net/tun.
It does not change the machine itself.`,
		PersistentPreRunE: cli.Run(func(*cobra.Command, []string) (err error) {
			o.logs, err = cli.ParseLogOptions(o.logLevel, o.logFormat)
			return err
		}),
		Args: cobra.NoArgs,
		RunE: cli.Run(func(*cobra.Command, []string) error { return cli.Missing(program) }),
	}
	flags := root.PersistentFlags()
	flags.StringVar(&o.logLevel, "log-level", "info",
		"level of all programs: debug, info, warn or error")
	flags.StringVar(&o.logFormat, "log-format", cli.FormatAuto,
		"format of all logs: auto, text or json")

	demo := &cobra.Command{
		Use:   "demo",
		Short: "Connect a client, use the tunnel, and restore the hosts",
		Args:  cobra.NoArgs,
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd, demonstration)
		}),
	}
	run := &cobra.Command{
		Use:   "run SCENARIO",
		Short: "Run one of the scenarios of `list`",
		Args:  cobra.ExactArgs(1),
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			s, err := findScenario(args[0])
			if err != nil {
				return err
			}
			return o.run(cmd, s)
		}),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string,
			cobra.ShellCompDirective) {
			var names []string
			for _, s := range scenarios {
				names = append(names, s.name+"\t"+s.about)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the scenarios",
		Args:  cobra.NoArgs,
		RunE:  cli.Run(func(cmd *cobra.Command, _ []string) error { return o.list(cmd) }),
	}
	shell := &cobra.Command{
		Use:   "shell",
		Short: "Connect a client and start a shell on it",
		Args:  cobra.NoArgs,
		RunE:  cli.Run(func(cmd *cobra.Command, _ []string) error { return o.shell(cmd) }),
	}
	for _, c := range []*cobra.Command{demo, run, list} {
		c.Flags().BoolVar(&o.json, "json", false, "print the result as JSON")
	}
	for _, c := range []*cobra.Command{demo, run, shell} {
		c.Flags().BoolVar(&o.keep, "keep", false,
			"keep logs, captures and configurations even if all steps succeed")
		c.Flags().StringVar(&o.artifacts, "artifacts", "",
			"directory for them; implies --keep (default: a new temporary directory)")
	}
	root.AddCommand(demo, run, list, shell, cli.VersionCommand(program))
	return root
}

// list is `masque-lab list`.
func (o *options) list(cmd *cobra.Command) error {
	if o.json {
		type entry struct {
			Name  string `json:"name"`
			About string `json:"about"`
		}
		entries := make([]entry, len(scenarios))
		for i, s := range scenarios {
			entries[i] = entry{s.name, s.about}
		}
		return json.NewEncoder(cmd.OutOrStdout()).Encode(entries)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	for _, s := range scenarios {
		fmt.Fprintf(w, "%s\t%s\n", s.name, s.about)
	}
	return w.Flush()
}

// run runs a scenario in namespaces of its own.
func (o *options) run(cmd *cobra.Command, s scenario) error {
	lab.Enter()
	p, done, err := o.prepare(cmd)
	if err != nil {
		return err
	}
	defer done()
	report := newReport(cmd.OutOrStdout(), o.json, s)
	p.report = report
	report.begin()
	runErr := report.steps(p.ctx, s.steps(p))
	return o.finish(p, report, runErr)
}

// shell is `masque-lab shell`.
func (o *options) shell(cmd *cobra.Command) error {
	lab.Enter()
	p, done, err := o.prepare(cmd)
	if err != nil {
		return err
	}
	defer done()
	report := newReport(cmd.OutOrStdout(), false, shellScenario)
	p.report = report
	report.begin()
	runErr := report.steps(p.ctx, p.connectSteps())
	if runErr == nil {
		if runErr = p.runShell(cmd.OutOrStdout()); runErr == nil {
			runErr = report.steps(p.ctx, p.endShellSteps())
		}
	}
	return o.finish(p, report, runErr)
}

// prepare makes the lab and finds the programs. The caller must call done.
func (o *options) prepare(cmd *cobra.Command) (p *pair, done func(), err error) {
	if err := lab.CheckTUN(); err != nil {
		return nil, nil, fault.Errorf(fault.Privileges, "%v", err)
	}
	programs, err := findPrograms()
	if err != nil {
		return nil, nil, err
	}
	dir, err := o.artifactsDir()
	if err != nil {
		return nil, nil, err
	}
	ctx, stop := daemon.SignalContext(cmd.Context(), slog.New(slog.DiscardHandler))
	l, err := lab.New(ctx, lab.WithArtifacts(dir))
	if err != nil {
		stop()
		return nil, nil, err
	}
	p = &pair{ctx: ctx, lab: l, dir: dir, programs: programs, logs: o.logs,
		logger: o.logs.Logger(cmd.ErrOrStderr())}
	return p, func() {
		l.Close()
		stop()
	}, nil
}

// artifactsDir makes the directory for the programs' files. It must be empty,
// so that files of different runs are not mixed.
func (o *options) artifactsDir() (string, error) {
	if o.artifacts == "" {
		return os.MkdirTemp("", program+"-")
	}
	if err := os.MkdirAll(o.artifacts, 0o700); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(o.artifacts)
	if err == nil && len(entries) > 0 {
		err = fault.Errorf(fault.Usage, "%s is not empty: empty it, or name another directory",
			o.artifacts)
	}
	return o.artifacts, err
}

// finish closes the lab, prints the verdict and removes unwanted artifacts.
func (o *options) finish(p *pair, r *report, err error) error {
	for _, f := range []func() error{p.keepClientLogs, p.lab.Close} {
		if ferr := f(); err == nil {
			err = ferr
		}
	}
	keep := o.keep || o.artifacts != ""
	failed := err != nil && !errors.Is(err, errInterrupted)
	dir, logs := "", []string(nil)
	if keep || failed {
		dir = p.dir
	}
	if failed {
		logs = p.logFiles
	}
	if perr := r.end(dir, logs, err); perr != nil {
		return perr
	}
	if dir == "" {
		if rerr := os.RemoveAll(p.dir); err == nil {
			err = rerr
		}
	}
	switch {
	case failed:
		return fault.Errorf(fault.Failure, "%s: %s: look into %s", r.scenario.name,
			r.failure(err), p.dir)
	case err != nil:
		return fault.Errorf(fault.Failure, "%s: %s", r.scenario.name, r.failure(err))
	}
	return nil
}
