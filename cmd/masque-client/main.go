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
	// configDir is the default folder of NAME.toml for `up NAME`.
	configDir = "/etc/masque"
	// capabilities lets the program run without sudo (setcap(8)).
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

// manual completes the manual page.
var manual = cli.Page{
	Files: []cli.Entry{
		{Term: "/etc/masque/NAME.toml",
			Meaning: "The configuration of the tunnel NAME. If it contains secrets, only its owner may read it, and the group masque if the owner is root."},
		{Term: "/run/masque/NAME.sock",
			Meaning: "The control socket of a running tunnel, for its owner and root."},
		{Term: "/run/masque/NAME.log",
			Meaning: "The log of a tunnel started by up, its newest 2 to 4 MiB."},
		{Term: "/run/masque/NAME.lock, /run/masque/NAME.journal",
			Meaning: "The lock of a running tunnel, and a list of its changes to the host."},
		{Term: "/etc/hosts, /etc/resolv.conf",
			Meaning: "Names of hosts, which precede DNS, and the DNS servers that are asked about the proxy. Their answers count as validated with options trust-ad."},
		{Term: "/usr/share/doc/masquevpn",
			Meaning: "The manual of the client, docs/client.md, and a configuration with all keys, docs/reference/client.toml."},
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
		"`folder` of files that outlast a tunnel")
	root.AddCommand(o.runCommand(), o.upCommand(), o.downCommand(), o.statusCommand(),
		o.waitCommand(), o.checkCommand(),
		cli.ResolveCommand(program, resolveOptions), o.captureCommand(), o.forwardUDPCommand())
	return root
}

// resolve returns the file for NAME or FILE, and the name of its tunnel. An
// argument with a slash or the suffix .toml is a file.
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

// tunnelName returns the name of the tunnel of NAME or FILE.
func tunnelName(arg string) (string, error) {
	name := strings.TrimSuffix(filepath.Base(arg), ".toml")
	if name == proxyName {
		return "", &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("a tunnel cannot be named %q: its socket would have the name of the proxy's", name), Remedy: "rename " + arg}
	}
	if !config.IsName(name) {
		return "", &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("%q cannot name a tunnel", name),
			Remedy: `name it with letters, digits and any of ".-_@", at most 64`}
	}
	return name, nil
}

// completeRunning completes the names of running tunnels.
func (o *options) completeRunning(*cobra.Command, []string, string) ([]string,
	cobra.ShellCompDirective) {
	names, err := tunnels(o.RunDir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeConfigured completes the names of files in the configuration folder.
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

// tunnels returns the names of the running tunnels.
func tunnels(runDir string) ([]string, error) {
	names, err := control.List(runDir)
	for i, name := range names {
		if name == proxyName {
			return append(names[:i:i], names[i+1:]...), err
		}
	}
	return names, err
}
