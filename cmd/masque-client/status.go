package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/text"
)

func (o *options) statusCommand() *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use: "status [NAME]", Short: "Show tunnels", Args: cobra.MaximumNArgs(1),
		Long: "Show one tunnel, or all that run. The exit code is 0 if all that are shown are connected, and 3 otherwise.\n" +
			"As JSON, each tunnel is one object on one line; with --watch, so is each change.",
		ValidArgsFunction: o.completeRunning,
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			names, err := tunnels(o.RunDir)
			if len(args) == 1 {
				name, nameErr := tunnelName(args[0])
				names, err = []string{name}, nameErr
			}
			if err != nil {
				return err
			}
			if len(names) == 0 {
				return &fault.Error{Kind: fault.NotConnected, Reason: "no tunnel is running",
					Remedy: "start one with: " + program + " up NAME"}
			}
			show := showText
			if asJSON {
				show = showJSON
			}
			if watch {
				ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
				defer stop()
				if !asJSON {
					show = showLine
				}
				return o.watch(ctx, cmd.OutOrStdout(), names, show)
			}
			return o.status(cmd.Context(), cmd.OutOrStdout(), names, len(args) == 0 &&
				!asJSON, show)
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&watch, "watch", false,
		"show every change until interrupted or until the tunnels end")
	return cmd
}

// answerTimeout limits a request to a running process.
const answerTimeout = 5 * time.Second

// status shows tunnels once, as a table if table is set.
func (o *options) status(ctx context.Context, w io.Writer, names []string, table bool,
	show func(io.Writer, json.RawMessage) error) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var all []client.Status
	var last error
	for _, name := range names {
		var raw json.RawMessage
		err := control.NewClient(o.RunDir, name).Get(ctx, statusPath, &raw)
		if errors.Is(err, control.ErrNotRunning) {
			err = notRunning(name)
			if len(names) > 1 { // it has ended since it was listed
				last = err
				continue
			}
		}
		if err != nil {
			return err
		}
		s, err := decode(raw)
		if err != nil {
			return err
		}
		all = append(all, s)
		if s.State != client.StateConnected {
			last = notConnected(s)
		}
		if !table {
			if err := show(w, raw); err != nil {
				return err
			}
		}
	}
	if table {
		if err := showTable(w, all); err != nil {
			return err
		}
	}
	return last
}

func decode(raw json.RawMessage) (client.Status, error) {
	var s client.Status
	if err := json.Unmarshal(raw, &s); err != nil {
		return s, fmt.Errorf("reading a status: %w", err)
	}
	s.Reason = text.OneLine(s.Reason) // parts may come from the proxy
	return s, nil
}

func notConnected(s client.Status) error {
	reason := fmt.Sprintf("%s: %s", s.Name, s.State)
	if s.Reason != "" {
		reason += " (" + s.Reason + ")"
	}
	return &fault.Error{Kind: fault.NotConnected, Reason: reason,
		Remedy: fmt.Sprintf("wait for it with: %s wait %s --for connected", program, s.Name)}
}

// watch shows every change of the tunnels. It returns nil when ctx is done, and
// an error when all tunnels have ended.
func (o *options) watch(ctx context.Context, w io.Writer, names []string,
	show func(io.Writer, json.RawMessage) error) error {
	var mu sync.Mutex
	var failed error
	var wg sync.WaitGroup
	for _, name := range names {
		wg.Go(func() {
			err := control.NewClient(o.RunDir, name).Watch(ctx, watchPath,
				func(raw json.RawMessage) bool {
					mu.Lock()
					defer mu.Unlock()
					return show(w, raw) == nil
				})
			if err == io.EOF || errors.Is(err, control.ErrNotRunning) {
				err = notRunning(name)
			}
			mu.Lock()
			failed = errors.Join(failed, err)
			mu.Unlock()
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return failed
}

func showJSON(w io.Writer, raw json.RawMessage) error {
	var line bytes.Buffer
	if err := json.Compact(&line, raw); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, line.String())
	return err
}

// showLine prints one change, for --watch.
func showLine(w io.Writer, raw json.RawMessage) error {
	s, err := decode(raw)
	if err != nil {
		return err
	}
	line := fmt.Sprintf("%s  %s  %s", time.Now().Format(time.TimeOnly), s.Name, s.State)
	if client.HasSession(s) {
		line += "  " + addresses(s)
	}
	if s.Reason != "" {
		line += "  " + s.Reason
	}
	_, err = fmt.Fprintln(w, line)
	return err
}

func showText(w io.Writer, raw json.RawMessage) error {
	s, err := decode(raw)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", what, value)
		}
	}
	row("name", s.Name)
	row("state", fmt.Sprintf("%s for %s", s.State, time.Since(s.Since).Round(time.Second)))
	row("reason", s.Reason)
	for _, w := range s.Warnings {
		row("warning", text.OneLine(w))
	}
	row("proxy", strings.TrimSpace(s.Proxy.Name+" "+s.Proxy.Endpoint))
	if s.Underlay != nil {
		row("uplink", fmt.Sprintf("%v on %s", s.Underlay.Source, s.Underlay.Interface))
	}
	if client.HasSession(s) {
		row("interface", fmt.Sprintf("%s, MTU %d", s.Interface, s.MTU))
		row("addresses", addresses(s))
		row("routes", routes(s))
		row("DNS", dns(s))
		row("round trip", (time.Duration(s.RTT) * time.Microsecond).String())
	}
	if s.KillSwitch != client.KillSwitchOff {
		row("kill switch", s.KillSwitch)
	}
	if until := s.CertificateUntil; until != nil {
		row("certificate", "until "+until.Format(time.DateTime))
	}
	row("received", traffic(s.Packets.RX, s.Bytes.RX))
	row("sent", traffic(s.Packets.TX, s.Bytes.TX))
	row("dropped", text.Counts(s.Drops))
	row("repaired", text.Counts(s.KernelRepairs))
	row("reconnects", fmt.Sprint(s.Reconnects))
	return t.Flush()
}

func showTable(w io.Writer, all []client.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tSTATE\tFOR\tPROXY\tINTERFACE\tADDRESSES\tRECEIVED\tSENT")
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, s.State,
			time.Since(s.Since).Round(time.Second),
			s.Proxy.Name, s.Interface, addresses(s), text.Size(s.Bytes.RX), text.Size(s.Bytes.TX))
	}
	return t.Flush()
}

func addresses(s client.Status) string {
	words := make([]string, len(s.Addresses))
	for i, a := range s.Addresses {
		words[i] = a.String()
	}
	return strings.Join(words, ", ")
}

// routes lists the first ranges and the number of the others.
func routes(s client.Status) string {
	const limit = 8
	words := make([]string, 0, limit)
	for i, r := range s.Routes {
		if i == limit {
			words = append(words, fmt.Sprintf("and %d more", len(s.Routes)-limit))
			break
		}
		word := fmt.Sprintf("%s-%s", r.Start, r.End)
		if r.Protocol != 0 {
			word += fmt.Sprintf(" protocol %d", r.Protocol)
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// dns describes the configuration of the host's resolver for the tunnel.
func dns(s client.Status) string {
	if len(s.DNS.Servers) == 0 {
		return ""
	}
	text := strings.Join(s.DNS.Servers, ", ")
	if len(s.DNS.Search) > 0 {
		text += ", search " + strings.Join(s.DNS.Search, " ")
	}
	switch {
	case s.DNS.Applied && !slices.Contains(s.DNS.Domains, "."):
		text += ", for " + strings.Join(s.DNS.Domains, " ") + " (" + s.DNS.Via + ")"
	case s.DNS.Applied:
		text += " (" + s.DNS.Via + ")"
	case s.DNS.Reason != "":
		text += " (not applied: " + s.DNS.Reason + ")"
	default:
		text += " (not applied)"
	}
	return text
}

func traffic(packets, bytes uint64) string {
	return fmt.Sprintf("%d packets, %s", packets, text.Size(bytes))
}

// The values of `wait --for`.
const (
	forConnected    = "connected"
	forDisconnected = "disconnected"
)

func (o *options) waitCommand() *cobra.Command {
	var what string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "wait NAME --for connected|disconnected", Short: "Wait for a state of a tunnel",
		Args: cobra.ExactArgs(1),
		Long: "Wait until a tunnel is connected, or until it is not. The tunnel need not run yet.\n" +
			"After the timeout, the exit code is 5, or 3 for a tunnel that does not run.",
		ValidArgsFunction: o.completeRunning,
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			if what != forConnected && what != forDisconnected {
				return fault.Errorf(fault.Usage,
					"--for %q is not known: write connected or disconnected", what)
			}
			name, err := tunnelName(args[0])
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return o.wait(ctx, name, what)
		}),
	}
	cmd.Flags().StringVar(&what, "for", forConnected, "connected or disconnected")
	timeoutFlag(cmd, &timeout, 30*time.Second)
	return cmd
}

// wait waits for a state of a tunnel that may not run yet.
func (o *options) wait(ctx context.Context, name, what string) error {
	const interval = 50 * time.Millisecond
	c := control.NewClient(o.RunDir, name)
	var last *client.Status
	for {
		var badAnswer error
		done := false
		err := c.Watch(ctx, watchPath, func(raw json.RawMessage) bool {
			s, err := decode(raw)
			if badAnswer = err; err != nil {
				return false
			}
			last = &s
			if done = s.State == client.StateConnected; what == forDisconnected {
				done = !client.HasSession(s)
			}
			return !done
		})
		switch {
		case done:
			return nil
		case badAnswer != nil:
			return badAnswer
		case ctx.Err() != nil:
			return o.waited(ctx, name, what, last)
		case err == io.EOF, errors.Is(err, control.ErrNotRunning):
			if last = nil; what == forDisconnected {
				return nil
			}
		default:
			return err
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return o.waited(ctx, name, what, last)
		}
	}
}

// waited returns the error for a state that did not come in time.
func (o *options) waited(ctx context.Context, name, what string, last *client.Status) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return fault.Errorf(fault.Failure, "interrupted")
	case last == nil:
		return notRunning(name)
	}
	reason := fmt.Sprintf("%s is not %s in time: %s", name, what, last.State)
	if last.Reason != "" {
		reason += " (" + last.Reason + ")"
	}
	return &fault.Error{Kind: fault.Unreachable, Reason: reason,
		Remedy: "check the proxy, or give it more time with --timeout"}
}
