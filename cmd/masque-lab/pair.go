package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"masquevpn/internal/cli"
	"masquevpn/internal/lab"
)

// user is the name of the only user and of its client's connection, in
// scenarios with one client.
const user = "alice"

// pair is a proxy and its clients that run on hosts of a lab.
type pair struct {
	ctx      context.Context
	lab      *lab.Lab
	dir      string // directory of the artifacts
	programs programs
	logs     cli.LogOptions // log options of all programs
	logger   *slog.Logger
	report   *report
	logFiles []string // logs that may explain a failure

	topo *lab.Topology
	// users are the names of the users, in the order of topo.Clients.
	users  []string
	proxy  *lab.Cmd
	before map[*lab.Host]string // snapshots before the tunnel
}

// status contains the used fields of `masque-client status --json`.
type status struct {
	State     string   `json:"state"`
	Interface string   `json:"interface"`
	MTU       int      `json:"mtu"`
	Addresses []string `json:"addresses"`
	Routes    []route  `json:"routes"`
	Packets   struct {
		RX uint64 `json:"rx"`
		TX uint64 `json:"tx"`
	} `json:"packets"`
}

// route is a range that the proxy advertised.
type route struct {
	Start netip.Addr `json:"start"`
	End   netip.Addr `json:"end"`
}

// connectSteps makes the hosts and the tunnel. It applies the changes to the
// proxy's configuration before the proxy starts.
func (p *pair) connectSteps(changes ...func(map[string]any)) []step {
	return []step{
		{"make the hosts and connect them", p.makeHosts},
		{"the target is out of reach without the tunnel", p.checkUnreachable},
		{"masque-proxy init: keys and configuration", func(ctx context.Context) (string, error) {
			return p.initProxy(ctx, changes)
		}},
		{"masque-proxy invite " + user + ": one file for the client", p.forUser(user, p.invite)},
		{"masque-proxy run: on the host proxy", p.startProxy},
		{"masque-client up: on the host client", p.forUser(user, p.connect)},
	}
}

// disconnectSteps ends the tunnel and checks that the hosts are restored.
func (p *pair) disconnectSteps() []step {
	return []step{
		{"masque-client down", p.forUser(user, p.disconnect)},
		{"stop the proxy with SIGTERM", p.stopProxy},
		{"the client's kernel is as it was", func(context.Context) (string, error) {
			return p.checkRestored(p.topo.Client)
		}},
		{"the proxy's kernel is as it was", func(context.Context) (string, error) {
			return p.checkRestored(p.topo.Proxy)
		}},
	}
}

// forUser returns the action of a step for one user.
func (p *pair) forUser(user string, do func(context.Context, string) (string,
	error)) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) { return do(ctx, user) }
}

// client returns the host of a user's client.
func (p *pair) client(user string) *lab.Host { return p.topo.Clients[slices.Index(p.users, user)] }

func (p *pair) configDir() string             { return filepath.Join(p.dir, "proxy") }
func (p *pair) configFile() string            { return filepath.Join(p.configDir(), "proxy.toml") }
func (p *pair) inviteFile(user string) string { return filepath.Join(p.dir, user+".toml") }

func (p *pair) makeHosts(context.Context) (string, error) {
	if err := p.makeTopology(lab.TopologyOptions{}, user); err != nil {
		return "", err
	}
	return "client, router, proxy, target", p.snapshot()
}

// makeTopology makes the standard hosts, with a client for each user.
func (p *pair) makeTopology(o lab.TopologyOptions, users ...string) (err error) {
	o.Clients = len(users)
	p.topo, err = lab.NewTopology(p.lab, o)
	p.users = users
	return err
}

// snapshot saves the kernel's state of the hosts that the VPN changes.
func (p *pair) snapshot() (err error) {
	p.before = make(map[*lab.Host]string)
	for _, h := range append([]*lab.Host{p.topo.Proxy}, p.topo.Clients...) {
		if p.before[h], err = h.Snapshot(); err != nil {
			return err
		}
	}
	return nil
}

// checkUnreachable checks that the target cannot be reached without the tunnel.
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
	if _, err := p.run(ctx, p.topo.Proxy, p.programs.proxy, "init", "--name", lab.ProxyName,
		p.configDir()); err != nil {
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

func (p *pair) invite(ctx context.Context, user string) (string, error) {
	_, err := p.run(ctx, p.topo.Proxy, p.programs.proxy, "invite", user, "-c", p.configFile(), "-o",
		p.inviteFile(user))
	return filepath.Base(p.inviteFile(user)), err
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

func (p *pair) connect(ctx context.Context, user string) (string, error) {
	if _, err := p.run(ctx, p.client(user), p.programs.client, "up", p.inviteFile(user), "--wait",
		"--timeout", "30s"); err != nil {
		return "", err
	}
	s, err := p.readStatus(ctx, user)
	if err != nil {
		return "", err
	}
	if s.State != "connected" {
		return "", fmt.Errorf("`masque-client up --wait` returned, and the state is %q", s.State)
	}
	return fmt.Sprintf("%s, %s, MTU %d", s.Interface, strings.Join(s.Addresses, ", "), s.MTU), nil
}

func (p *pair) readStatus(ctx context.Context, user string) (status, error) {
	var s status
	out, err := p.run(ctx, p.client(user), p.programs.client, "status", user, "--json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("the output of `masque-client status --json`: %w", err)
	}
	return s, nil
}

func (p *pair) disconnect(ctx context.Context, user string) (string, error) {
	_, err := p.run(ctx, p.client(user), p.programs.client, "down", user)
	return "", err
}

func (p *pair) stopProxy(ctx context.Context) (string, error) {
	if err := p.proxy.Stop(ctx); err != nil {
		return "", explain(p.proxy, err)
	}
	return "", nil
}

// clientLog is the path of a background client's log, on its host.
func clientLog(user string) string { return "/run/masque/" + user + ".log" }

// keepClientLogs moves the logs of background clients to the artifacts.
func (p *pair) keepClientLogs() error {
	var errs []error
	for _, user := range p.users {
		if p.topo != nil {
			errs = append(errs, p.keepClientLog(user))
		}
	}
	return errors.Join(errs...)
}

func (p *pair) keepClientLog(user string) error {
	var content []byte
	err := p.client(user).Do(func() (err error) {
		content, err = os.ReadFile(clientLog(user))
		return err
	})
	if errors.Is(err, fs.ErrNotExist) { // the client never started
		return nil
	}
	name := filepath.Join(p.dir, p.client(user).Name()+"-"+filepath.Base(clientLog(user)))
	p.logFiles = append(p.logFiles, name)
	return errors.Join(err, os.WriteFile(name, content, 0o600))
}

// checkRestored compares the kernel's state with the snapshot before the
// tunnel.
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
