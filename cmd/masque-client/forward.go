package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
	"masquevpn/internal/text"
)

func (o *options) forwardUDPCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "forward-udp LISTEN TARGET -c FILE",
		Short: "Forward a local UDP port through the proxy, without a tunnel",
		Args:  cobra.ExactArgs(2),
		Long: "Forward a local UDP port to TARGET, host:port, until SIGINT or SIGTERM. The proxy resolves the name of the target and\n" +
			"sends the packets (RFC 9298). LISTEN is an address and a port, or a port alone for 127.0.0.1. There is no tunnel: the\n" +
			"command needs no privileges and changes nothing on this host. It uses the proxy, [tls], [auth] and [reconnect] of FILE.\n\n" +
			"A line on standard error tells when it is ready.",
		Example: "  masque-client forward-udp 5353 192.0.2.53:53 -c alice.toml",
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			return o.forwardUDP(cmd.Context(), cmd.ErrOrStderr(), file, args[0], args[1])
		}),
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `FILE`")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
	return cmd
}

func (o *options) forwardUDP(ctx context.Context, w io.Writer, file, listen, target string) error {
	l, err := load(file, "")
	if err != nil {
		return err
	}
	logger := o.Log.Logger(os.Stderr)
	daemon.StandardLog(logger)
	l.follow(logger)
	tracer, closeTraces, err := l.traces().Open(l.config.TLS, logger)
	if err != nil {
		return l.file.Locate(err)
	}
	defer closeTraces()
	if !strings.Contains(listen, ":") {
		listen = net.JoinHostPort("127.0.0.1", listen)
	}
	f, err := client.NewUDPForwarder(client.UDPConfig{
		Proxy: l.config.Proxy, TLS: l.config.TLS, Token: l.config.Token, Listen: listen,
		Target:    target,
		Reconnect: l.config.Reconnect, MaxDelay: l.config.MaxDelay, Mark: l.config.Mark,
		Logger: logger, Tracer: tracer,
	})
	if err != nil {
		return l.usageError(err)
	}

	ctx, stop := daemon.SignalContext(ctx, logger)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	select {
	case err = <-ended:
	case <-f.Ready():
		fmt.Fprintf(w, "%s: ready: UDP %v leads to %s through %s\n", program, f.LocalAddr(),
			target, l.config.Proxy)
		err = <-ended
	}
	sent, received := &f.Stats().Send, &f.Stats().Receive
	logger.Info("stopped", "tx_packets", sent.Packets.Load(), "rx_packets", received.Packets.Load(),
		"tx_dropped", text.Counts(sent.Drops()), "rx_dropped", text.Counts(received.Drops()))
	return fault.Flatten(err)
}

// usageError adds the place to an error of NewUDPForwarder: the argument of the
// command line, or the line of the file.
func (l *loaded) usageError(err error) error {
	e, ok := errors.AsType[*client.Error](err)
	if ok && (e.Key == "listen" || e.Key == "target") {
		argument := *e
		argument.Key = strings.ToUpper(e.Key)
		return &argument
	}
	return l.file.Locate(err)
}
