// Masque-proxy is a CONNECT-IP proxy (RFC 9484): the server of a VPN.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/privilege"
)

const (
	program = "masque-proxy"
	// instance is the name of the control socket, the lock and the journal.
	instance = "proxy"
	// capabilities lets the program run without sudo (setcap(8)).
	capabilities = "cap_net_admin,cap_net_bind_service"
)

func main() {
	privilege.KeepSecrets()
	os.Exit(cli.Main(newRoot()))
}

// options are the flags that all commands have.
type options struct {
	*cli.Globals
}

// manual completes the manual page.
var manual = cli.Page{
	Files: []cli.Entry{
		{Term: "/etc/masque/proxy.toml",
			Meaning: "The configuration. Certificates, keys and the users file are beside it."},
		{Term: "/etc/masque/ca.key",
			Meaning: "The key of the certificate authority. Only init and invite need it."},
		{Term: "/run/masque/proxy.sock",
			Meaning: "The control socket of a running proxy, for its owner and root."},
		{Term: "/run/masque/proxy.lock, /run/masque/proxy.journal",
			Meaning: "The lock of a running proxy, and a list of its changes to the host."},
		{Term: "/var/lib/masque", Meaning: "Files that the service writes, such as certificates from ACME and a key log."},
		{Term: "/usr/share/doc/masquevpn",
			Meaning: "The manual of the proxy, docs/proxy.md, and a configuration with all keys, docs/reference/proxy.toml."},
	},
	SeeAlso: []string{"masque-client(1)", "systemctl(1)", "journalctl(1)"},
}

func newRoot() *cobra.Command {
	root, globals := cli.NewRoot(program,
		"VPN over MASQUE: IP through HTTP/3 (RFC 9484), the proxy", manual)
	o := &options{Globals: globals}
	root.AddCommand(o.runCommand(), initCommand(), inviteCommand(), o.userCommand(),
		o.checkCommand(),
		o.statusCommand(), o.sessionsCommand(), o.peersCommand(), o.kickCommand(),
		o.reloadCommand(),
		o.captureCommand(), publishCommand(), cli.ResolveCommand(program, resolveOptions))
	return root
}

// configFlag adds the flag -c, which is required.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "",
		"configuration `FILE`, such as /etc/masque/proxy.toml")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
}
