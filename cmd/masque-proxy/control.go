package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/pki"
	"masquevpn/internal/text"
	"masquevpn/proxy"
)

// The paths of the control socket.
const (
	statusPath   = "/v1/status"
	sessionsPath = "/v1/sessions"
	reloadPath   = "/v1/reload"
)

func kickPath(id string) string { return sessionsPath + "/" + id + "/kick" }

// reloaded is the response to a reload.
type reloaded struct {
	Restart []string `json:"restart"` // keys that have changed and need a restart
}

// status is the output of `status --json`.
type status struct {
	proxy.Status
	Certificate certificateStatus `json:"certificate"`
}

// kicked is the response to a kick.
type kicked struct {
	ID string `json:"id"`
}

var errNoSession = errors.New("there is no such session")

func (p *process) handler() http.Handler {
	mux := http.NewServeMux()
	control.HandleCaptures(mux, p.tap, func(id string) (<-chan struct{}, error) {
		if ends, ok := p.server.SessionEnds(id); ok {
			return ends, nil
		}
		return nil, fmt.Errorf("%q: %w", id, errNoSession)
	}, p.ended, p.logger)
	mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-p.server.Ready():
			control.Reply(w, status{p.server.Status(), p.certificateStatus()})
		default:
			control.Fail(w, http.StatusServiceUnavailable, errors.New(p.starting()))
		}
	})
	mux.HandleFunc("GET "+sessionsPath, func(w http.ResponseWriter, _ *http.Request) {
		list := p.server.Sessions()
		if list == nil {
			list = []proxy.SessionStatus{}
		}
		control.Reply(w, list)
	})
	mux.HandleFunc("POST "+kickPath("{id}"), func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		if !p.server.Kick(id) {
			control.Fail(w, http.StatusNotFound, fmt.Errorf("%q: %w", id, errNoSession))
			return
		}
		p.logger.Info("session ended by the operator", "session", id)
		control.Reply(w, kicked{ID: id})
	})
	mux.HandleFunc("POST "+reloadPath, func(w http.ResponseWriter, _ *http.Request) {
		restart, err := p.reload()
		if err != nil {
			control.Fail(w, http.StatusUnprocessableEntity, err)
			return
		}
		control.Reply(w, reloaded{Restart: append([]string{}, restart...)})
	})
	p.handlePeers(mux)
	return mux
}

// answerTimeout limits a request to the running proxy.
const answerTimeout = 10 * time.Second

// ask completes a command that queries the running proxy. call sends the
// request, and show prints the response for people.
func ask[T any](o *options, cmd *cobra.Command,
	call func(ctx context.Context, c *control.Client, args []string, v any) error,
	show func(io.Writer, T) error) *cobra.Command {
	var asJSON bool
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.RunE = cli.Run(func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
		defer cancel()
		var raw json.RawMessage
		err := call(ctx, control.NewClient(o.RunDir, instance), args, &raw)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return &fault.Error{Kind: fault.Unreachable, Reason: "the proxy does not answer",
				Remedy: "look into its log"}
		case err != nil:
			return o.answerError(err)
		}
		if asJSON {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), string(raw))
			return err
		}
		var answer T
		if err := json.Unmarshal(raw, &answer); err != nil {
			return fmt.Errorf("reading the response of the proxy: %w", err)
		}
		return show(cmd.OutOrStdout(), answer)
	})
	return cmd
}

// answerError returns an error of a request to the running proxy as a
// *fault.Error.
func (o *options) answerError(err error) error {
	if errors.Is(err, control.ErrNotRunning) {
		return &fault.Error{Kind: fault.NotConnected,
			Reason: "no proxy is running with the run directory " + o.RunDir,
			Remedy: "start it with: " + program + " run -c FILE"}
	}
	e, ok := errors.AsType[*control.StatusError](err)
	if !ok {
		return err
	}
	switch e.Status {
	case http.StatusUnprocessableEntity:
		return &fault.Error{Kind: fault.Usage, Reason: e.Reason}
	case http.StatusNotFound:
		return &fault.Error{Kind: fault.NotConnected, Reason: e.Reason,
			Remedy: "list them with: " + program + " sessions"}
	case http.StatusServiceUnavailable:
		return &fault.Error{Kind: fault.NotConnected, Reason: e.Reason, Remedy: "try again"}
	}
	return err
}

// get returns a call that gets a path.
func get(path string) func(context.Context, *control.Client, []string, any) error {
	return func(ctx context.Context, c *control.Client, _ []string, v any) error {
		return c.Get(ctx, path, v)
	}
}

func (o *options) statusCommand() *cobra.Command {
	return ask(o, &cobra.Command{Use: "status", Short: "Show the running proxy",
		Args: cobra.NoArgs}, get(statusPath), showStatus)
}

func showStatus(w io.Writer, s status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "name\t%s\n", s.Name)
	fmt.Fprintf(t, "running for\t%s\n", time.Since(s.Since).Round(time.Second))
	fmt.Fprintf(t, "state\t%s\n", s.State)
	for _, w := range s.Warnings {
		fmt.Fprintf(t, "warning\t%s\n", text.OneLine(w))
	}
	fmt.Fprintf(t, "listening on\t%s\n", strings.Join(s.Listen, ", "))
	fmt.Fprintf(t, "template\t%s\n", s.Template)
	fmt.Fprintf(t, "certificate\tuntil %s, from %s\n", s.Certificate.Until.Format(time.DateTime),
		s.Certificate.From)
	if s.Certificate.Problem != "" {
		fmt.Fprintf(t, "\tnot renewed, tried again at %s: %s\n",
			s.Certificate.Next.Format(time.DateTime), text.OneLine(s.Certificate.Problem))
	}
	fmt.Fprintf(t, "interface\t%s\n", s.Interface)
	fmt.Fprintf(t, "sessions\t%d\n", s.Sessions)
	if s.UDPFlows > 0 {
		fmt.Fprintf(t, "UDP flows\t%d\n", s.UDPFlows)
	}
	fmt.Fprintf(t, "leased addresses\t%d IPv4, %d IPv6\n", s.Leased["ipv4"], s.Leased["ipv6"])
	fmt.Fprintf(t, "received\t%d packets, %s\n", s.Packets.RX, text.Size(s.Bytes.RX))
	fmt.Fprintf(t, "sent\t%d packets, %s\n", s.Packets.TX, text.Size(s.Bytes.TX))
	if list := text.Counts(s.Drops); list != "" {
		fmt.Fprintf(t, "dropped\t%s\n", list)
	}
	if list := text.Counts(s.Requests); list != "" {
		fmt.Fprintf(t, "requests\t%s\n", list)
	}
	if list := text.Counts(s.KernelRepairs); list != "" {
		fmt.Fprintf(t, "repaired\t%s\n", list)
	}
	return t.Flush()
}

func (o *options) sessionsCommand() *cobra.Command {
	return ask(o, &cobra.Command{Use: "sessions", Short: "List the sessions", Args: cobra.NoArgs},
		get(sessionsPath), showSessions)
}

func showSessions(w io.Writer, sessions []proxy.SessionStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tUSER\tREMOTE\tFOR\tADDRESSES\tNETWORKS\tRECEIVED\tSENT")
	for _, s := range sessions {
		addresses := list(s.Addresses)
		if s.Kind == proxy.KindUDP {
			addresses = "UDP to " + s.Target
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, text.OneLine(s.User), s.Remote,
			time.Since(s.Since).Round(time.Second),
			addresses, list(s.Networks), text.Size(s.Bytes.RX), text.Size(s.Bytes.TX))
	}
	return t.Flush()
}

func list(prefixes []netip.Prefix) string {
	words := make([]string, len(prefixes))
	for i, p := range prefixes {
		words[i] = p.String()
	}
	return strings.Join(words, ", ")
}

func (o *options) kickCommand() *cobra.Command {
	return ask(o, &cobra.Command{
		Use: "kick SESSION", Short: "End a session", Args: cobra.ExactArgs(1),
		Long: "End a session; `sessions` shows the IDs. The client may connect again: to keep it away, remove its user.",
	}, func(ctx context.Context, c *control.Client, args []string, v any) error {
		return c.Post(ctx, kickPath(url.PathEscape(args[0])), v)
	}, func(w io.Writer, k kicked) error {
		_, err := fmt.Fprintf(w, "session %s ended\n", k.ID)
		return err
	})
}

func (o *options) reloadCommand() *cobra.Command {
	return ask(o, &cobra.Command{
		Use: "reload", Short: "Read the configuration again", Args: cobra.NoArgs,
		Long: "Read the configuration again. Sessions continue, and get changed routes, denied destinations and DNS. Limits apply to\n" +
			"new sessions, the certificate and its key to new connections. The command lists changed keys that need a restart;\n" +
			"they do not take effect before. The users file needs no reload.",
	}, func(ctx context.Context, c *control.Client, _ []string, v any) error {
		return c.Post(ctx, reloadPath, v)
	}, func(w io.Writer, r reloaded) error {
		if len(r.Restart) == 0 {
			_, err := fmt.Fprintln(w, "reloaded")
			return err
		}
		_, err := fmt.Fprintf(w, "reloaded; restart the proxy for: %s\n",
			strings.Join(r.Restart, ", "))
		return err
	})
}

// fingerprints returns the fingerprints of certificates, for comparison.
func fingerprints(certs []*x509.Certificate) [][32]byte {
	var list [][32]byte
	for _, c := range certs {
		list = append(list, pki.Fingerprint(c))
	}
	return list
}
