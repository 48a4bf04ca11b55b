package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"masquevpn/internal/fault"
)

// shellText suggests commands to try.
const shellText = `
You are root on the host "client" now; nothing here touches your machine. Try:

  ping 192.0.2.2, ping 2001:db8:3::2       the target, through the tunnel
  ip route get 192.0.2.2, ip rule          routes of the kernel
  masque-client status %[1]s --watch        the tunnel's state
  nsenter -t %[2]d -n -m masque-proxy sessions
                                           sessions of the proxy
  ip netns exec router tcpdump -ni client1   packets on the path to the proxy
  ip netns exec target bash                a shell on another host

Logs are in %[3]s. "exit" ends the tunnel.

`

// endShellSteps ends the tunnel, if the user has not.
func (p *pair) endShellSteps() []step {
	return []step{
		{"masque-client down", func(ctx context.Context) (string, error) {
			c := p.command(ctx, p.topo.Client, p.programs.client, "down", user)
			err := c.Run()
			if c.ExitCode() == int(fault.NotConnected) {
				return "it was down", nil
			}
			return "", explain(c, err)
		}},
		{"stop the proxy with SIGTERM", p.stopProxy},
	}
}

// runShell runs the user's shell on the client until it ends.
func (p *pair) runShell(out io.Writer) error {
	if err := p.topo.Client.NameNamespaces(); err != nil {
		return err
	}
	fmt.Fprintf(out, shellText, user, p.proxy.PID(), p.dir)
	shell := os.Getenv("SHELL")
	if shell == "" {
		shell = "/bin/sh"
	}
	c := p.topo.Client.Command(p.ctx, shell)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Foreground = true
	path := filepath.Dir(p.programs.client) + ":" + os.Getenv("PATH")
	c.Env = append(os.Environ(), "PATH="+path)
	err := c.Run()
	// The status of the shell's last command is no failure of the lab.
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}
