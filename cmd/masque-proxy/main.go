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
	// capabilities are what setcap(8) has to give for running without sudo.
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

// manual is what the manual page says besides.
var manual = cli.Page{
	Files: []cli.Entry{
		{Term: "/etc/masque/proxy.toml",
			Meaning: "The configuration, which names certificates, keys and the users file beside it."},
		{Term: "/etc/masque/ca.key",
			Meaning: "The key that certificates are made with. Only init and invite need it."},
		{Term: "/run/masque/proxy.sock",
			Meaning: "The control socket of a proxy that runs, for its owner and root."},
		{Term: "/run/masque/proxy.lock, /run/masque/proxy.journal",
			Meaning: "What shows that a proxy runs, and what it changed on the host."},
		{Term: "/var/lib/masque", Meaning: "What the service may write, such as the certificates of ACME and a key log."},
		{Term: "/usr/share/doc/masquevpn",
			Meaning: "How to set up, run and mend a proxy, in docs/proxy.md, and a configuration with all keys, in docs/reference/proxy.toml."},
	},
	SeeAlso: []string{"masque-client(1)", "systemctl(1)", "journalctl(1)"},
}

func newRoot() *cobra.Command {
	root, globals := cli.NewRoot(program,
		"VPN over MASQUE: IP through HTTP/3 (RFC 9484), the proxy", manual)
	o := &options{Globals: globals}
	root.AddCommand(o.runCommand(), initCommand(), inviteCommand(), o.userCommand(),
		o.checkCommand(),
		o.statusCommand(), o.sessionsCommand(), o.kickCommand(), o.reloadCommand(),
		o.captureCommand())
	return root
}

// configFlag adds the flag -c, which is required.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "",
		"configuration `FILE`, such as /etc/masque/proxy.toml")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
}
