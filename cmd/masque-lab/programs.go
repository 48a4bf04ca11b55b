package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"masquevpn/internal/fault"
	"masquevpn/internal/lab"
)

// programs are the paths of masque-proxy and masque-client.
type programs struct{ client, proxy string }

// findPrograms searches the directory of this program, and then PATH.
func findPrograms() (programs, error) {
	var p programs
	exe, err := os.Executable()
	if err != nil {
		return p, err
	}
	for name, path := range map[string]*string{"masque-client": &p.client,
		"masque-proxy": &p.proxy} {
		beside := filepath.Join(filepath.Dir(exe), name)
		if *path, err = exec.LookPath(beside); err == nil {
			continue
		}
		if *path, err = exec.LookPath(name); err != nil {
			return p, fault.Errorf(fault.Failure,
				"%s is neither %s nor in PATH: build it with `make build`", name, beside)
		}
	}
	return p, nil
}

// command describes one of the programs on a host. Its log is among those that
// explain failures.
func (p *pair) command(ctx context.Context, h *lab.Host, path string, args ...string) *lab.Cmd {
	args = append(args, p.logs.Args()...)
	p.logger.Debug("run", "host", h.Name(), "command", path+" "+strings.Join(args, " "))
	return h.Command(ctx, path, args...)
}

// run runs one of the programs on a host and returns its standard output. The
// error is the program's last line, which contains the reason and the remedy.
func (p *pair) run(ctx context.Context, h *lab.Host, path string, args ...string) (string, error) {
	c := p.command(ctx, h, path, args...)
	out, err := c.Output()
	if err != nil {
		if len(tail(c.LogFile(), 2)) > 1 { // explain quotes one line only
			p.logFiles = slices.Insert(p.logFiles, 0, c.LogFile())
		}
		return string(out), explain(c, err)
	}
	return string(out), nil
}

// explain turns the failure of a program into an error for users.
func explain(c *lab.Cmd, err error) error {
	name := filepath.Base(c.Args[0])
	var exit *exec.ExitError
	if !errors.As(err, &exit) || c.ExitCode() < 0 {
		return err
	}
	last := "it wrote no reason"
	if lines := tail(c.LogFile(), 1); len(lines) > 0 {
		last = strings.TrimPrefix(lines[0], name+": ")
	}
	return fmt.Errorf("%s (%s, exit code %d)", last, name, c.ExitCode())
}
