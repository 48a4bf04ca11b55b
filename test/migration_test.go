package test

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/congestion"
	"masquevpn/internal/lab"
)

// stream is a TCP connection through the tunnel that carries data all the time,
// in both directions.
type stream struct {
	p     *pair
	stop  context.CancelFunc
	ended chan error // receives the result once
	bytes chan int64 // receives the number of each line that came back
}

// startStream sends from the client to the target, which sends everything back,
// until the test ends.
func (p *pair) startStream() *stream {
	p.t.Helper()
	ln, err := p.Target.Listen("tcp", netip.AddrPortFrom(lab.TargetIPv4, 0).String())
	check(p.t, err)
	go func() {
		defer ln.Close()
		if c, err := ln.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	conn, err := p.Client.DialContext(p.ctx, "tcp", ln.Addr().String())
	check(p.t, err)
	ctx, stop := context.WithCancel(p.ctx)
	s := &stream{p: p, stop: stop, ended: make(chan error, 1), bytes: make(chan int64)}
	go func() {
		defer conn.Close()
		for i := int64(1); ; i++ {
			line, back := fmt.Sprintf("%8d\n", i), make([]byte, 9)
			_ = conn.SetDeadline(time.Now().Add(patience))
			if _, err := io.WriteString(conn, line); err != nil {
				s.ended <- err
				return
			}
			if _, err := io.ReadFull(conn, back); err != nil || string(back) != line {
				s.ended <- fmt.Errorf("sent %q, got %q back: %w", line, back, err)
				return
			}
			select {
			case s.bytes <- i:
			case <-ctx.Done():
				s.ended <- nil
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	p.t.Cleanup(stop)
	return s
}

// awaitProgress waits until more lines have come back, and returns the time
// that it waited.
func (s *stream) awaitProgress() time.Duration {
	s.p.t.Helper()
	start := time.Now()
	for range 3 {
		select {
		case <-s.bytes:
		case err := <-s.ended:
			s.ended <- err
			s.p.t.Fatalf("the inner connection broke: %v", err)
		case <-time.After(patience):
			s.p.t.Fatal("the inner connection is stuck")
		}
	}
	return time.Since(start)
}

// end closes the connection, which must not have broken before.
func (s *stream) end() {
	s.p.t.Helper()
	s.stop()
	if err := <-s.ended; err != nil {
		s.p.t.Errorf("the inner connection broke: %v", err)
	}
}

// secondLink gives the client another link to the router, without routes.
func (p *pair) secondLink(name string) {
	p.t.Helper()
	check(p.t, p.Lab.Connect(
		lab.End{Host: p.Client, Name: name,
			Addrs: lab.Prefixes("198.18.250.2/24", "2001:db8:1:250::2/64")},
		lab.End{Host: p.Router, Name: "second",
			Addrs: lab.Prefixes("198.18.250.1/24", "2001:db8:1:250::1/64")}, lab.LinkOptions{}))
}

// Commands that make a link carry the default routes of the client.
const (
	routeFirst  = "ip route replace default via 198.51.100.1 dev eth0; ip -6 route replace default via 2001:db8:1::1 dev eth0"
	routeSecond = "ip route replace default via 198.18.250.1 dev eth1; ip -6 route replace default via 2001:db8:1:250::1 dev eth1"
)

// No packets leave outside the tunnel while the client migrates between
// networks, or while no route leads to the proxy.
func TestKillSwitchDuringMigration(t *testing.T) {
	p, behind := killSwitchHosts(t, options{client: killSwitch})
	p.secondLink("wlan0")
	p.connect(p.Client, "alice")
	talk := startChatter(t, p.Client, behind)
	links := map[string]*lab.Capture{"eth0": p.capture(), "wlan0": p.captureOn("wlan0")}
	wantNoLeaks := func(state string) {
		t.Helper()
		talk.awaitRounds()
		for name, seen := range links {
			if l := leaks(seen); len(l) > 0 {
				t.Fatalf("%s: packets left through %s: %v", state, name, l)
			}
		}
	}
	awaitUnderlay := func(iface string) {
		t.Helper()
		p.eventually("connected through "+iface, func() bool {
			s := p.status(p.Client, "alice")
			return s.State == client.StateConnected && s.Reason == "" && s.Underlay != nil &&
				s.Underlay.Interface == iface
		})
		p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		if !slices.ContainsFunc(links[iface].Packets(), isTunnel) {
			t.Fatalf("no packet of the tunnel was captured on %s", iface)
		}
	}
	awaitUnderlay("eth0")
	wantNoLeaks("before")
	p.script(p.Client, strings.ReplaceAll(routeSecond, "eth1", "wlan0"))
	awaitUnderlay("wlan0")
	wantNoLeaks("migrated")
	p.script(p.Client, "ip route del default; ip -6 route del default")
	p.eventually("the status has a reason", func() bool {
		return p.status(p.Client, "alice").Reason != ""
	})
	wantNoLeaks("without a route")
	p.script(p.Client, routeFirst)
	awaitUnderlay("eth0")
	wantNoLeaks("migrated back")
}

// The network of the host changes under a running connection in the ways that
// occur on hosts. The session migrates, the inner addresses stay, and the inner
// connection continues.
func TestMigration(t *testing.T) {
	p := newPair(t, options{})
	p.secondLink("eth1")
	p.connect(p.Client, "alice")
	before, first := p.session(), p.status(p.Client, "alice")
	inside := p.startStream()
	inside.awaitProgress()
	for _, step := range []struct {
		name, script string
		iface, from  string // interface and source address of the new path
	}{
		{"other default route", routeSecond, "eth1", "2001:db8:1:250::2"},
		{"link down", routeFirst + "; ip link set eth1 down", "eth0", "2001:db8:1::2"},
		{"other address", `
			ip -6 addr add 2001:db8:1::77/64 dev eth0 nodad
			ip -6 addr del 2001:db8:1::2/64 dev eth0
			ip -6 route replace default via 2001:db8:1::1 dev eth0`, "eth0", "2001:db8:1::77"},
		{"no network for a while", `
			ip link set eth0 down
			sleep 3
			ip link set eth1 up
			ip -6 addr replace 2001:db8:1:250::2/64 dev eth1 nodad
			` + routeSecond, "eth1", "2001:db8:1:250::2"},
	} {
		start := time.Now()
		p.script(p.Client, step.script)
		p.eventually(step.name, func() bool {
			s := p.status(p.Client, "alice")
			return s.State == client.StateConnected && s.Reason == "" && s.Underlay != nil &&
				s.Underlay.Interface == step.iface &&
				s.Underlay.Source == netip.MustParseAddr(step.from)
		})
		inside.awaitProgress()
		t.Logf("%s: after %v", step.name, time.Since(start).Round(time.Millisecond))
		p.eventually(step.name+": the proxy sends to the new address", func() bool {
			return netip.MustParseAddrPort(p.session().Remote).Addr() == netip.MustParseAddr(step.from)
		})
		if p.session().ID != before.ID && congestion.Selectable {
			t.Errorf("%s: another session", step.name)
		}
	}
	s := p.status(p.Client, "alice")
	// Stock quic-go runs out of connection IDs, and then the client reconnects.
	migrated := s.Reconnects == 0 && s.Migrations >= 4 || !congestion.Selectable
	if !slices.Equal(s.Addresses, first.Addresses) || !migrated {
		t.Errorf("addresses %v, before %v, after %d reconnects and %d migrations", s.Addresses,
			first.Addresses, s.Reconnects, s.Migrations)
	}
	reconnects := s.Reconnects
	// The client notices a restart of the proxy on the new path by a stateless
	// reset too, and not by a timeout.
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(reconnects)
	inside.awaitProgress()
	inside.end()
	if text := p.run(p.Client, "cat", "/run/masque/alice.log"); !strings.Contains(text,
		"the proxy was restarted") {
		t.Errorf("the log has another reason:\n%s", text)
	}
}

// If the host loses the address family of the path, the client reconnects over
// the other family, with the same inner addresses.
func TestHostLosesFamily(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	first := p.status(p.Client, "alice")
	if a := netip.MustParseAddrPort(first.Proxy.Endpoint).Addr(); a != lab.ProxyIPv6 {
		t.Fatalf("connected to %v", a)
	}
	inside := p.startStream()
	inside.awaitProgress()
	p.script(p.Client, "ip -6 route del default")
	p.eventually("connected over IPv4", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateConnected &&
			strings.HasPrefix(s.Proxy.Endpoint, lab.ProxyIPv4.String())
	})
	inside.awaitProgress()
	inside.end()
	if s := p.status(p.Client, "alice"); !slices.Equal(s.Addresses, first.Addresses) {
		t.Errorf("addresses %v, before %v", s.Addresses, first.Addresses)
	}
}

// A router changes the outer port of the connection several times. The proxy
// follows, and the client notices nothing.
func TestNATRebinding(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	before := p.session()
	port := netip.MustParseAddrPort(before.Remote).Port()
	inside := p.startStream()
	rounds := 6
	if !congestion.Selectable { // stock quic-go has connection IDs for two changes
		rounds = 2
	}
	for outside := 40000; outside < 40000+rounds; outside++ {
		p.script(p.Router, fmt.Sprintf(`nft -f - <<-END
			table inet nat
			delete table inet nat
			table inet nat {
				chain ports {
					type filter hook prerouting priority raw;
					iifname client1 udp dport 443 udp sport set %d
					iifname proxy udp sport 443 udp dport %d udp dport set %d
				}
			}
			END`, outside, outside, port))
		p.eventually("the proxy sends to the new port", func() bool {
			return int(netip.MustParseAddrPort(p.session().Remote).Port()) == outside
		})
		inside.awaitProgress()
	}
	inside.end()
	if now := p.session(); now.ID != before.ID {
		t.Error("another session")
	}
	if s := p.status(p.Client, "alice"); s.Reconnects != 0 || s.Migrations != 0 {
		t.Errorf("%d reconnects and %d migrations", s.Reconnects, s.Migrations)
	}
}

// The path drops UDP. Within seconds the status reports it, and the kill switch
// stays closed. Packets flow again soon after the path recovers, in the same
// inner connection.
func TestUDPBlackhole(t *testing.T) {
	p := newPair(t, options{client: killSwitch + "\n[reconnect]\nmax_delay = \"3s\"\n"})
	p.connect(p.Client, "alice")
	closed := p.run(p.Client, "nft", "list", "table", "inet", "masquevpn-kill-alice")
	first := p.status(p.Client, "alice")
	inside := p.startStream()
	inside.awaitProgress()
	p.script(p.Router, `nft -f - <<-END
		table inet hole {
			chain forward {
				type filter hook forward priority 0;
				meta l4proto udp drop
			}
		}
		END`)
	start := time.Now()
	p.eventually("the status has the reason", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateReconnecting &&
			strings.Contains(s.Reason, "nothing has come from the proxy for")
	})
	t.Logf("noticed after %v", time.Since(start).Round(time.Millisecond))
	p.eventually("the status has a failed attempt", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateReconnecting &&
			strings.Contains(s.Reason, "does not answer on UDP port 443")
	})
	if now := p.run(p.Client, "nft", "list", "table", "inet",
		"masquevpn-kill-alice"); now != closed {
		t.Errorf("the kill switch is\n%s\nbefore\n%s", now, closed)
	}
	p.run(p.Router, "nft", "delete", "table", "inet", "hole")
	start = time.Now()
	p.eventually("the client has reconnected", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	t.Logf("back after %v", time.Since(start).Round(time.Millisecond))
	inside.awaitProgress()
	inside.end()
	if s := p.status(p.Client, "alice"); !slices.Equal(s.Addresses, first.Addresses) {
		t.Errorf("addresses %v, before %v", s.Addresses, first.Addresses)
	}
}

// A firewall of the client's own host drops the packets of the tunnel. For a
// moment, it does not end the session. For longer, the status names it.
func TestHostFirewall(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nmax_delay = \"3s\"\n"})
	p.connect(p.Client, "alice")
	before := p.session()
	const wall = `nft -f - <<-END
		table inet wall {
			chain output {
				type filter hook output priority 100;
				udp dport 443 drop
			}
		}
		END`
	inside := p.startStream()
	inside.awaitProgress()
	p.script(p.Client, wall+"\nsleep 1\nnft delete table inet wall")
	inside.awaitProgress()
	if now := p.session(); now.ID != before.ID {
		t.Error("another session")
	}
	p.script(p.Client, wall)
	p.eventually("the status has the reason", func() bool {
		return strings.Contains(p.status(p.Client, "alice").Reason,
			"packets to the proxy do not leave this host (")
	})
	p.run(p.Client, "nft", "delete", "table", "inet", "wall")
	p.eventually("the client has reconnected", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	inside.awaitProgress()
	inside.end()
}

// If the first address of the proxy does not answer, the client connects to the
// next one.
func TestFirstProxyAddressDead(t *testing.T) {
	p := newPair(t, options{})
	p.script(p.Router, `nft -f - <<-END
		table ip6 hole {
			chain forward {
				type filter hook forward priority 0;
				udp dport 443 drop
			}
		}
		END`)
	p.connect(p.Client, "alice")
	if s := p.status(p.Client, "alice"); !strings.HasPrefix(s.Proxy.Endpoint,
		lab.ProxyIPv4.String()) || s.Reconnects != 0 {
		t.Errorf("connected to %s after %d reconnects", s.Proxy.Endpoint, s.Reconnects)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
}

// Two hosts of one user stop and start again in another order. Each gets its
// former addresses.
func TestAddressesAfterClientRestart(t *testing.T) {
	p := newPair(t, options{clients: 2})
	file := p.invite("alice")
	had := make(map[*lab.Host][]netip.Prefix)
	for _, h := range p.Clients {
		p.up(h, file)
		had[h] = p.status(h, "alice").Addresses
	}
	for _, h := range p.Clients {
		p.down(h, "alice")
	}
	for _, h := range slices.Backward(p.Clients) {
		p.up(h, file)
		if now := p.status(h, "alice").Addresses; !slices.Equal(now, had[h]) {
			t.Errorf("%s has %v, before %v", h.Name(), now, had[h])
		}
		if mode := p.run(h, "stat", "-c", "%a",
			"/var/lib/masque/installation"); strings.TrimSpace(mode) != "600" {
			t.Errorf("the installation file has mode %s", mode)
		}
	}
}
