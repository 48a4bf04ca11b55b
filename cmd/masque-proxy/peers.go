package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/control"
	"masquevpn/internal/text"
	"masquevpn/proxy"
)

// peersPath is the path of the peers on the control socket.
const peersPath = "/v1/peers"

func disconnectPath(domain string) string { return peersPath + "/" + domain + "/disconnect" }

// disconnected is the response to a request that ends the pairs of a peer.
type disconnected struct {
	Domain string `json:"domain"`
	Ended  int    `json:"ended"` // pairs that were connected
}

// handlePeers serves the peers on the control socket.
func (p *process) handlePeers(mux *http.ServeMux) {
	mux.HandleFunc("GET "+peersPath, func(w http.ResponseWriter, _ *http.Request) {
		control.Reply(w, p.server.Peers())
	})
	mux.HandleFunc("POST "+disconnectPath("{domain}"),
		func(w http.ResponseWriter, r *http.Request) {
			domain := r.PathValue("domain")
			ended, ok := p.server.DisconnectPeer(domain)
			if !ok {
				control.Fail(w, http.StatusNotFound,
					fmt.Errorf("%q: there is no such peer", domain))
				return
			}
			p.logger.Info("peer disconnected by the operator", "domain", domain)
			control.Reply(w, disconnected{Domain: domain, Ended: ended})
		})
}

func (o *options) peersCommand() *cobra.Command {
	cmd := ask(o, &cobra.Command{
		Use: "peers", Short: "List the peers", Args: cobra.NoArgs,
		Long: "List the peers of the configuration, and the state of each: connected, connecting, waiting for another attempt,\n" +
			"refused by the peer, expired, or idle, which is a peer that has to connect and has not.",
	}, get(peersPath), showPeers)
	cmd.AddCommand(ask(o, &cobra.Command{
		Use: "disconnect DOMAIN", Short: "End the links with a peer", Args: cobra.ExactArgs(1),
		Long: "End the links with a peer, which may come back: to keep it away, remove its [[peer]].",
	}, func(ctx context.Context, c *control.Client, args []string, v any) error {
		return c.Post(ctx, disconnectPath(url.PathEscape(args[0])), v)
	}, func(w io.Writer, d disconnected) error {
		_, err := fmt.Fprintf(w, "%d links with %s ended\n", d.Ended, text.OneLine(d.Domain))
		return err
	}))
	return cmd
}

func showPeers(w io.Writer, peers []proxy.PeerStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DOMAIN\tLOCAL\tSTATE\tIDENTITY\tSERVER\tCONNECTION\tDIALED BY\tFOR\tNETWORKS\tREASON")
	for _, p := range peers {
		since := ""
		if p.Since != nil {
			since = time.Since(*p.Since).Round(time.Second).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Domain, p.Local, p.State,
			p.Identity,
			p.Server, p.Connection, p.DialedBy, since, list(p.Networks), text.OneLine(p.Reason))
	}
	return t.Flush()
}
