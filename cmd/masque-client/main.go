// Masque-client connects this host to a CONNECT-IP proxy (RFC 9484): it is a
// VPN client.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/privilege"
)

const (
	program = "masque-client"
	// configDir is where `up NAME` finds NAME.toml.
	configDir = "/etc/masque"
	// capabilities are what setcap(8) has to give for running without sudo.
	capabilities = "cap_net_admin"
	// proxyName is the name of the proxy's socket in the run directory.
	proxyName = "proxy"
)

func main() {
	privilege.KeepSecrets()
	os.Exit(cli.Main(newRoot()))
}

// options are the flags that all commands have.
type options struct {
	*cli.Globals
	configDir string
	stateDir  string
}

// manual is what the manual page says besides.
var manual = cli.Page{
	Files: []cli.Entry{
		{Term: "/etc/masque/NAME.toml",
			Meaning: "The configuration of the tunnel NAME. With secrets in it, nobody but its owner, and the group masque if that is root, may read it."},
		{Term: "/run/masque/NAME.sock",
			Meaning: "The control socket of a tunnel that runs, for its owner and root."},
		{Term: "/run/masque/NAME.log",
			Meaning: "The log of a tunnel that was started by up, the newest 2 to 4 MiB of it."},
		{Term: "/run/masque/NAME.lock, /run/masque/NAME.journal",
			Meaning: "What shows that a tunnel runs, and what it changed on the host."},
		{Term: "/usr/share/doc/masquevpn",
			Meaning: "How to set up, run and mend a tunnel, in docs/client.md, and a configuration with all keys, in docs/reference/client.toml."},
	},
	SeeAlso: []string{"masque-proxy(1)", "systemctl(1)", "journalctl(1)"},
}

func newRoot() *cobra.Command {
	root, globals := cli.NewRoot(program,
		"VPN over MASQUE: IP through HTTP/3 (RFC 9484), the client", manual)
	o := &options{Globals: globals}
	root.PersistentFlags().StringVar(&o.configDir, "config-dir", configDir,
		"`folder` of NAME.toml files")
	root.PersistentFlags().StringVar(&o.stateDir, "state-dir", stateDir,
		"`folder` of what lasts longer than a tunnel")
	root.AddCommand(o.runCommand(), o.upCommand(), o.downCommand(), o.statusCommand(),
		o.waitCommand(), o.checkCommand(), o.captureCommand(), o.forwardUDPCommand())
	return root
}

// resolve finds the file of NAME or FILE, and the name of its tunnel. What has
// a slash or ends with .toml is a file.
func (o *options) resolve(arg string) (name, file string, err error) {
	file = arg
	if !isFile(arg) {
		file = filepath.Join(o.configDir, arg+".toml")
	}
	name, err = tunnelName(arg)
	return name, file, err
}

func isFile(arg string) bool {
	return strings.ContainsRune(arg, '/') || strings.HasSuffix(arg, ".toml")
}

// tunnelName is the name of the tunnel that NAME or FILE stands for.
func tunnelName(arg string) (string, error) {
	name := strings.TrimSuffix(filepath.Base(arg), ".toml")
	if name == proxyName {
		return "", &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("a tunnel cannot be named %q: its socket would be that of the proxy", name), Remedy: "rename " + arg}
	}
	if !config.IsName(name) {
		return "", &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("%q cannot name a tunnel", name),
			Remedy: `name it with letters, digits and any of ".-_@", at most 64`}
	}
	return name, nil
}

// complete offers the names of running tunnels.
func (o *options) completeRunning(*cobra.Command, []string, string) ([]string,
	cobra.ShellCompDirective) {
	names, err := tunnels(o.RunDir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeConfigured offers the names of files in the configuration folder.
func (o *options) completeConfigured(*cobra.Command, []string, string) ([]string,
	cobra.ShellCompDirective) {
	files, err := filepath.Glob(filepath.Join(o.configDir, "*.toml"))
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, f := range files {
		if name, err := tunnelName(f); err == nil {
			names = append(names, name)
		}
	}
	return names, cobra.ShellCompDirectiveDefault
}

// tunnels lists the running tunnels.
func tunnels(runDir string) ([]string, error) {
	names, err := control.List(runDir)
	for i, name := range names {
		if name == proxyName {
			return append(names[:i:i], names[i+1:]...), err
		}
	}
	return names, err
}
