package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"masquevpn/internal/cli"
	"masquevpn/internal/lab"
)

// user is who the proxy is told to expect, and the name of the client's
// connection.
const user = "alice"

// pair is a proxy and a client that run on hosts of a lab.
type pair struct {
	ctx      context.Context
	lab      *lab.Lab
	dir      string // artifacts
	programs programs
	logs     cli.LogOptions // of all programs
	logger   *slog.Logger
	report   *report
	logFiles []string // of what may explain a failure

	topo   *lab.Topology
	proxy  *lab.Cmd
	before map[*lab.Host]string // snapshots
}

// status is what the lab looks at of `masque-client status --json`.
type status struct {
	State     string   `json:"state"`
	Interface string   `json:"interface"`
	MTU       int      `json:"mtu"`
	Addresses []string `json:"addresses"`
	Packets   struct {
		RX uint64 `json:"rx"`
		TX uint64 `json:"tx"`
	} `json:"packets"`
}

// connectSteps makes the hosts and the tunnel. The changes are made to the
// proxy's configuration before it starts.
func (p *pair) connectSteps(changes ...func(map[string]any)) []step {
	return []step{
		{"make the hosts and connect them", p.makeHosts},
		{"the target is out of reach without the tunnel", p.checkUnreachable},
		{"masque-proxy init: keys and configuration", func(ctx context.Context) (string, error) {
			return p.initProxy(ctx, changes)
		}},
		{"masque-proxy invite " + user + ": one file for the client", p.invite},
		{"masque-proxy run: on the host proxy", p.startProxy},
		{"masque-client up: on the host client", p.connect},
	}
}

// disconnectSteps takes the tunnel down and checks that nothing is left of it.
func (p *pair) disconnectSteps() []step {
	return []step{
		{"masque-client down", p.disconnect},
		{"stop the proxy with SIGTERM", p.stopProxy},
		{"the client's kernel is as it was", func(context.Context) (string, error) { return p.checkRestored(p.topo.Client) }},
		{"the proxy's kernel is as it was", func(context.Context) (string, error) { return p.checkRestored(p.topo.Proxy) }},
	}
}

func (p *pair) configDir() string  { return filepath.Join(p.dir, "proxy") }
func (p *pair) configFile() string { return filepath.Join(p.configDir(), "proxy.toml") }
func (p *pair) inviteFile() string { return filepath.Join(p.dir, user+".toml") }

func (p *pair) makeHosts(context.Context) (string, error) {
	var err error
	if p.topo, err = lab.NewTopology(p.lab, lab.TopologyOptions{}); err != nil {
		return "", err
	}
	p.before = make(map[*lab.Host]string)
	for _, h := range []*lab.Host{p.topo.Client, p.topo.Proxy} {
		if p.before[h], err = h.Snapshot(); err != nil {
			return "", err
		}
	}
	return "client, router, proxy, target", nil
}

// checkUnreachable makes sure that what reaches the target later went through
// the tunnel.
func (p *pair) checkUnreachable(ctx context.Context) (string, error) {
	var result string
	for _, to := range targets {
		a, err := p.topo.Client.Probe(ctx, lab.Probe{To: to})
		if err != nil {
			return "", err
		}
		if a.Echo {
			return "", fmt.Errorf("%s answers the client, although there is no tunnel", to)
		}
		result = fmt.Sprintf("the router has no route to %s", targets[0])
	}
	return result, nil
}

func (p *pair) initProxy(ctx context.Context, changes []func(map[string]any)) (string, error) {
	if _, err := p.run(ctx, p.topo.Proxy, p.programs.proxy, "init", "--name", lab.ProxyName, p.configDir()); err != nil {
		return "", err
	}
	if len(changes) > 0 {
		if err := changeConfig(p.configFile(), changes); err != nil {
			return "", err
		}
	}
	return "proxy.toml", nil
}

// changeConfig edits a configuration file.
func changeConfig(name string, changes []func(map[string]any)) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	config := make(map[string]any)
	if err := toml.Unmarshal(b, &config); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, change := range changes {
		change(config)
	}
	if b, err = toml.Marshal(config); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return os.WriteFile(name, b, 0o600)
}

func (p *pair) invite(ctx context.Context) (string, error) {
	_, err := p.run(ctx, p.topo.Proxy, p.programs.proxy, "invite", user, "-c", p.configFile(), "-o", p.inviteFile())
	return filepath.Base(p.inviteFile()), err
}

// startProxy starts the proxy and waits until it answers on its socket.
func (p *pair) startProxy(ctx context.Context) (string, error) {
	p.proxy = p.command(p.ctx, p.topo.Proxy, p.programs.proxy, "run", "-c", p.configFile())
	if err := p.proxy.Start(); err != nil {
		return "", err
	}
	p.logFiles = append(p.logFiles, p.proxy.LogFile())
	for {
		out, err := p.topo.Proxy.Command(ctx, p.programs.proxy, "status").CombinedOutput()
		if err == nil {
			return fmt.Sprintf("%s is %s and %s", lab.ProxyName, lab.ProxyIPv4, lab.ProxyIPv6), nil
		}
		select {
		case <-p.proxy.Done():
			if err := p.proxy.Wait(); err != nil {
				return "", explain(p.proxy, err)
			}
			return "", errors.New("the proxy ended at once")
		case <-ctx.Done():
			return "", fmt.Errorf("the proxy runs, but does not answer: %s", out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *pair) connect(ctx context.Context) (string, error) {
	if _, err := p.run(ctx, p.topo.Client, p.programs.client, "up", p.inviteFile(), "--wait", "--timeout", "30s"); err != nil {
		return "", err
	}
	s, err := p.readStatus(ctx)
	if err != nil {
		return "", err
	}
	if s.State != "connected" {
		return "", fmt.Errorf("`masque-client up --wait` returned, and the state is %q", s.State)
	}
	return fmt.Sprintf("%s, %s, MTU %d", s.Interface, strings.Join(s.Addresses, ", "), s.MTU), nil
}

func (p *pair) readStatus(ctx context.Context) (status, error) {
	var s status
	out, err := p.run(ctx, p.topo.Client, p.programs.client, "status", user, "--json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("the output of `masque-client status --json`: %w", err)
	}
	return s, nil
}

func (p *pair) disconnect(ctx context.Context) (string, error) {
	_, err := p.run(ctx, p.topo.Client, p.programs.client, "down", user)
	return "", err
}

func (p *pair) stopProxy(ctx context.Context) (string, error) {
	if err := p.proxy.Stop(ctx); err != nil {
		return "", explain(p.proxy, err)
	}
	return "", nil
}

// clientLog is where the client logs in the background, on its host.
const clientLog = "/run/masque/" + user + ".log"

// keepClientLog moves the log of the client in the background to the artifacts.
func (p *pair) keepClientLog() error {
	if p.topo == nil {
		return nil
	}
	var content []byte
	err := p.topo.Client.Do(func() (err error) {
		content, err = os.ReadFile(clientLog)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) { // it was never started
		return nil
	}
	name := filepath.Join(p.dir, "client-"+filepath.Base(clientLog))
	p.logFiles = append(p.logFiles, name)
	return errors.Join(err, os.WriteFile(name, content, 0o600))
}

// checkRestored compares the kernel's state with that before the tunnel.
func (p *pair) checkRestored(h *lab.Host) (string, error) {
	after, err := h.Snapshot()
	if err != nil {
		return "", err
	}
	if diff := lab.Diff(p.before[h], after); diff != "" {
		return "", fmt.Errorf("it is not; before (-) and now (+):\n%s", diff)
	}
	return "links, addresses, routes, rules, nftables, sysctls", nil
}
