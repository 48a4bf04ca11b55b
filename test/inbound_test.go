package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// sshPort is the port of a server on the client's host.
const sshPort = 22

// inbound are TCP connections to a server on the client, from a distant host
// and from a neighbour, in both families. The key describes the connection.
type inbound map[string]net.Conn

// dialInbound opens them. when completes the description.
func (p *pair) dialInbound(when string) inbound {
	p.t.Helper()
	v := make(inbound)
	for _, from := range []*lab.Host{p.Clients[1], p.Router} {
		for _, to := range []netip.Addr{lab.ClientIPv4, lab.ClientIPv6} {
			name := fmt.Sprintf("from %s to %v, %s", from.Name(), to, when)
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			conn, err := from.DialContext(ctx, "tcp", netip.AddrPortFrom(to, sshPort).String())
			cancel()
			if err != nil {
				p.t.Errorf("a connection %s: %v", name, err)
				continue
			}
			p.t.Cleanup(func() { conn.Close() })
			v[name] = conn
		}
	}
	return v
}

// echo checks that each connection carries data in both directions, in more
// than one packet.
func (v inbound) echo(t *testing.T, when string) {
	t.Helper()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 2000)
	got := make([]byte, len(sent))
	deadline := time.Now().Add(patience) // for all connections together
	for name, conn := range v {
		check(t, conn.SetDeadline(deadline))
		_, err := conn.Write(sent)
		if err == nil {
			_, err = io.ReadFull(conn, got)
		}
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%s: a connection %s: %v", when, name, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// serveEcho runs a TCP server on a host that sends back the received data.
func serveEcho(t *testing.T, host *lab.Host, port uint16) {
	t.Helper()
	ln, err := host.Listen("tcp", fmt.Sprintf("[::]:%d", port)) // both families
	check(t, err)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
}

// A full tunnel does not cut off connections from outside to a server on the
// host. Connections continue while it comes up and goes down, new ones are
// accepted, and none of their packets enters the tunnel.
func TestInboundConnections(t *testing.T) {
	p := newPair(t, options{clients: 2})
	serveEcho(t, p.Client, sshPort)
	before := p.snapshot(p.Client)
	for i, tc := range []struct{ name, routes, client, firewall string }{
		{name: "full tunnel"},
		{name: "LAN through the tunnel", routes: "lan = false"},
		{name: "kill switch", client: killSwitch +
			`allow = ["198.51.100.0/24", "198.18.2.0/24", "2001:db8:1::/48"]`},
		{
			name: "a firewall that tracks connections", routes: "lan = false",
			firewall: "table inet fw { chain in { type filter hook input priority 0; ct state established accept; }; }",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.firewall != "" {
				nft := p.Client.Command(p.ctx, "nft", "-f", "-")
				nft.Stdin = strings.NewReader(tc.firewall)
				check(t, nft.Run())
				before = p.snapshot(p.Client)
			}
			p.opts.routes, p.opts.client = tc.routes, tc.client
			user := fmt.Sprintf("alice%d", i)
			file := p.invite(user)
			old := p.dialInbound("from before")
			old.echo(t, "before")

			p.up(p.Client, file)
			var outside, inside *lab.Capture
			for iface, c := range map[string]**lab.Capture{"eth0": &outside, "masque0": &inside} {
				var err error
				*c, err = p.Client.Capture(iface, func(p lab.Packet) bool {
					tcp, _ := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
					return p.Outgoing && tcp != nil && tcp.SrcPort == sshPort
				})
				check(t, err)
			}
			old.echo(t, "up")
			fresh := p.dialInbound("while it is up")
			fresh.echo(t, "up")
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6) // it is a full tunnel
			p.wantRoute(netip.MustParseAddr("198.18.2.2"), "masque0")
			p.wantRoute(netip.MustParseAddr("2001:db8:1:2::2"), "masque0")
			check(t, outside.Close())
			check(t, inside.Close())
			if n := len(inside.Packets()); n > 0 {
				t.Errorf("%d answers went into the tunnel, such as %v", n, inside.Packets()[0])
			}
			flows := make(map[string]bool)
			for _, pkt := range outside.Packets() {
				flows[pkt.NetworkLayer().NetworkFlow().String()] = true
			}
			if len(flows) != 4 {
				t.Errorf("answers left by the underlay to %v, want two hosts in two families", flows)
			}

			p.down(p.Client, user)
			old.echo(t, "down")
			fresh.echo(t, "down")
			p.dialInbound("afterwards").echo(t, "down")
			p.wantUnchanged(p.Client, before)
		})
	}
}
