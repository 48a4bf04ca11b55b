// Masque-proxy is a CONNECT-IP proxy (RFC 9484): the server of a VPN.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
)

const (
	program = "masque-proxy"
	// instance is the name of the control socket, the lock and the journal.
	instance = "proxy"
	// capabilities are what setcap(8) has to give for running without sudo.
	capabilities = "cap_net_admin,cap_net_bind_service"
)

func main() {
	cli.KeepSecrets()
	os.Exit(cli.Main(newRoot()))
}

// options are the flags that all commands have.
type options struct {
	*cli.Globals
}

func newRoot() *cobra.Command {
	root, globals := cli.NewRoot(program, "VPN over MASQUE: IP through HTTP/3 (RFC 9484), the proxy")
	o := &options{Globals: globals}
	root.AddCommand(o.runCommand(), initCommand(), inviteCommand(), o.userCommand(), o.checkCommand(),
		o.statusCommand(), o.sessionsCommand(), o.kickCommand(), o.reloadCommand())
	return root
}

// configFlag adds the flag -c, which is required.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "", "configuration `FILE`, such as /etc/masque/proxy.toml")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
}
