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

// sshPort is where the client's host serves.
const sshPort = 22

// visits are TCP connections to a server of the client's host, from a host
// elsewhere and from its neighbour, in both families.
type visits map[string]net.Conn

// visit opens them.
func (p *pair) visit(when string) visits {
	p.t.Helper()
	v := make(visits)
	for _, from := range []*lab.Host{p.Clients[1], p.Router} {
		for _, to := range []netip.Addr{lab.ClientIPv4, lab.ClientIPv6} {
			what := fmt.Sprintf("from %s to %v, %s", from.Name(), to, when)
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			conn, err := from.DialContext(ctx, "tcp", netip.AddrPortFrom(to, sshPort).String())
			cancel()
			if err != nil {
				p.t.Errorf("a connection %s: %v", what, err)
				continue
			}
			p.t.Cleanup(func() { conn.Close() })
			v[what] = conn
		}
	}
	return v
}

// goOn checks that each of them carries data there and back, more than one
// packet takes.
func (v visits) goOn(t *testing.T, when string) {
	t.Helper()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 2000)
	got := make([]byte, len(sent))
	deadline := time.Now().Add(patience) // deadline of all of them
	for what, conn := range v {
		check(t, conn.SetDeadline(deadline))
		_, err := conn.Write(sent)
		if err == nil {
			_, err = io.ReadFull(conn, got)
		}
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%s: a connection %s: %v", when, what, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// echoes serves TCP in a host: what comes goes back.
func echoes(t *testing.T, host *lab.Host, port uint16) {
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

// Whoever administers a server from outside is not cut off when a tunnel for
// everything comes up there, nor when it goes down: connections from before go
// on, new ones come about, and none of them touches the tunnel.
func TestInboundConnections(t *testing.T) {
	p := newPair(t, options{clients: 2})
	echoes(t, p.Client, sshPort)
	before := p.snapshot(p.Client)
	for i, tc := range []struct{ name, routes, client, firewall string }{
		{name: "full tunnel"},
		{name: "not even the LAN outside", routes: "lan = false"},
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
			old := p.visit("from before")
			old.goOn(t, "before")

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
			old.goOn(t, "up")
			fresh := p.visit("while it is up")
			fresh.goOn(t, "up")
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6) // and the tunnel is one for everything
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
			old.goOn(t, "down")
			fresh.goOn(t, "down")
			p.visit("afterwards").goOn(t, "down")
			p.wantUnchanged(p.Client, before)
		})
	}
}
