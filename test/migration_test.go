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

// stream is a TCP connection through the tunnel that is used all the time, in
// both directions.
type stream struct {
	p     *pair
	stop  context.CancelFunc
	ended chan error
	bytes chan int64
}

// startStream begins to send from the client to the target, which sends
// everything back.
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

// goesOn returns when more has made it there and back, and how long that took.
func (s *stream) goesOn() time.Duration {
	s.p.t.Helper()
	start := time.Now()
	for range 3 {
		select {
		case <-s.bytes:
		case err := <-s.ended:
			s.ended <- err
			s.p.t.Fatalf("the connection inside broke: %v", err)
		case <-time.After(patience):
			s.p.t.Fatal("the connection inside does not go on")
		}
	}
	return time.Since(start)
}

func (s *stream) end() {
	s.p.t.Helper()
	s.stop()
	if err := <-s.ended; err != nil {
		s.p.t.Errorf("the connection inside broke: %v", err)
	}
}

// secondUplink gives the client another link to the router, without routes.
func (p *pair) secondUplink(name string) {
	p.t.Helper()
	check(p.t, p.Lab.Connect(
		lab.End{Host: p.Client, Name: name,
			Addrs: lab.Prefixes("198.18.250.2/24", "2001:db8:1:250::2/64")},
		lab.End{Host: p.Router, Name: "second",
			Addrs: lab.Prefixes("198.18.250.1/24", "2001:db8:1:250::1/64")}, lab.LinkOptions{}))
}

const (
	byFirst  = "ip route replace default via 198.51.100.1 dev eth0; ip -6 route replace default via 2001:db8:1::1 dev eth0"
	bySecond = "ip route replace default via 198.18.250.1 dev eth1; ip -6 route replace default via 2001:db8:1:250::1 dev eth1"
)

// Nothing leaves beside the tunnel while it moves from one network to another,
// nor while there is no way to the proxy at all.
func TestKillSwitchDuringMigration(t *testing.T) {
	p, behind := killSwitchHosts(t, options{client: killSwitch})
	p.secondUplink("wlan0")
	p.connect(p.Client, "alice")
	talk := chat(t, p.Client, behind)
	links := map[string]*lab.Capture{"eth0": p.capture(), "wlan0": p.captureOn("wlan0")}
	held := func(state string) {
		t.Helper()
		talk.goesOn()
		for name, seen := range links {
			if l := leaks(seen); len(l) > 0 {
				t.Fatalf("%s: this left by %s: %v", state, name, l)
			}
		}
	}
	isBy := func(iface string) {
		t.Helper()
		p.eventually("connected by "+iface, func() bool {
			s := p.status(p.Client, "alice")
			return s.State == client.StateConnected && s.Reason == "" && s.Underlay != nil &&
				s.Underlay.Interface == iface
		})
		p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		if !slices.ContainsFunc(links[iface].Packets(), isTunnel) {
			t.Fatalf("the tunnel is not seen on %s", iface)
		}
	}
	isBy("eth0")
	held("before")
	p.script(p.Client, strings.ReplaceAll(bySecond, "eth1", "wlan0"))
	isBy("wlan0")
	held("moved")
	p.script(p.Client, "ip route del default; ip -6 route del default")
	p.eventually("the client knows that there is no way", func() bool {
		return p.status(p.Client, "alice").Reason != ""
	})
	held("without a way")
	p.script(p.Client, byFirst)
	isBy("eth0")
	held("back")
}

// The host changes its network under a running connection, in every way that
// hosts do: the session moves with it, the addresses inside stay, and the
// connection inside goes on.
func TestMigration(t *testing.T) {
	p := newPair(t, options{})
	p.secondUplink("eth1")
	p.connect(p.Client, "alice")
	before, first := p.session(), p.status(p.Client, "alice")
	inside := p.startStream()
	inside.goesOn()
	for _, step := range []struct {
		name, script, iface, from string
	}{
		{"the default routes lead to another link", bySecond, "eth1", "2001:db8:1:250::2"},
		{"the link goes down", byFirst + "; ip link set eth1 down", "eth0", "2001:db8:1::2"},
		{"the address is another", `
			ip -6 addr add 2001:db8:1::77/64 dev eth0 nodad
			ip -6 addr del 2001:db8:1::2/64 dev eth0
			ip -6 route replace default via 2001:db8:1::1 dev eth0`, "eth0", "2001:db8:1::77"},
		{"a cable is unplugged, and some time later another one plugged in", `
			ip link set eth0 down
			sleep 3
			ip link set eth1 up
			ip -6 addr replace 2001:db8:1:250::2/64 dev eth1 nodad
			` + bySecond, "eth1", "2001:db8:1:250::2"},
	} {
		start := time.Now()
		p.script(p.Client, step.script)
		p.eventually(step.name, func() bool {
			s := p.status(p.Client, "alice")
			return s.State == client.StateConnected && s.Reason == "" && s.Underlay != nil &&
				s.Underlay.Interface == step.iface &&
				s.Underlay.Source == netip.MustParseAddr(step.from)
		})
		inside.goesOn()
		t.Logf("%s: after %v", step.name, time.Since(start).Round(time.Millisecond))
		p.eventually(step.name+": the proxy sends there", func() bool {
			return netip.MustParseAddrPort(p.session().Remote).Addr() == netip.MustParseAddr(step.from)
		})
		if p.session().ID != before.ID && congestion.Selectable {
			t.Errorf("%s: it is another session", step.name)
		}
	}
	s := p.status(p.Client, "alice")
	// A stock quic-go runs out of connection IDs on the way, and then the
	// client connects anew.
	moved := s.Reconnects == 0 && s.Migrations >= 4 || !congestion.Selectable
	if !slices.Equal(s.Addresses, first.Addresses) || !moved {
		t.Errorf("addresses %v, before %v, after %d reconnects and %d migrations", s.Addresses,
			first.Addresses, s.Reconnects, s.Migrations)
	}
	lost := s.Reconnects
	// A restart of the proxy is noticed at once on the new path too, and not by
	// waiting for answers.
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(lost)
	inside.goesOn()
	inside.end()
	if text := p.run(p.Client, "cat", "/run/masque/alice.log"); !strings.Contains(text,
		"the proxy was restarted") {
		t.Errorf("the client found out otherwise:\n%s", text)
	}
}

// When the path of one family is gone and the host has none but the other, the
// client connects anew by that, with the same addresses inside.
func TestHostLosesFamily(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	first := p.status(p.Client, "alice")
	if a := netip.MustParseAddrPort(first.Proxy.Endpoint).Addr(); a != lab.ProxyIPv6 {
		t.Fatalf("connected to %v", a)
	}
	inside := p.startStream()
	inside.goesOn()
	p.script(p.Client, "ip -6 route del default")
	p.eventually("connected by IPv4", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateConnected &&
			strings.HasPrefix(s.Proxy.Endpoint, lab.ProxyIPv4.String())
	})
	inside.goesOn()
	inside.end()
	if s := p.status(p.Client, "alice"); !slices.Equal(s.Addresses, first.Addresses) {
		t.Errorf("addresses %v, before %v", s.Addresses, first.Addresses)
	}
}

// A router gives the connection other ports outside, time and again: the proxy
// follows, and the client does not notice.
func TestNATRebinding(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	before := p.session()
	port := netip.MustParseAddrPort(before.Remote).Port()
	inside := p.startStream()
	rounds := 6
	if !congestion.Selectable { // a stock quic-go has as many connection IDs to spare
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
		p.eventually("the proxy knows the new port", func() bool {
			return int(netip.MustParseAddrPort(p.session().Remote).Port()) == outside
		})
		inside.goesOn()
	}
	inside.end()
	if now := p.session(); now.ID != before.ID {
		t.Error("it is another session")
	}
	if s := p.status(p.Client, "alice"); s.Reconnects != 0 || s.Migrations != 0 {
		t.Errorf("%d reconnects and %d migrations", s.Reconnects, s.Migrations)
	}
}

// UDP disappears on the way: the status says so within seconds, the kill switch
// stays as it is, and packets flow again soon after UDP does, in the same
// connection inside.
func TestUDPBlackhole(t *testing.T) {
	p := newPair(t, options{client: killSwitch + "\n[reconnect]\nmax_delay = \"3s\"\n"})
	p.connect(p.Client, "alice")
	closed := p.run(p.Client, "nft", "list", "table", "inet", "masquevpn-kill-alice")
	first := p.status(p.Client, "alice")
	inside := p.startStream()
	inside.goesOn()
	p.script(p.Router, `nft -f - <<-END
		table inet hole {
			chain forward {
				type filter hook forward priority 0;
				meta l4proto udp drop
			}
		}
		END`)
	start := time.Now()
	p.eventually("the status says why", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateReconnecting &&
			strings.Contains(s.Reason, "nothing has come from the proxy for")
	})
	t.Logf("noticed after %v", time.Since(start).Round(time.Millisecond))
	p.eventually("attempts fail", func() bool {
		s := p.status(p.Client, "alice")
		return s.State == client.StateReconnecting &&
			strings.Contains(s.Reason, "does not answer on UDP port 443")
	})
	if now := p.run(p.Client, "nft", "list", "table", "inet",
		"masquevpn-kill-alice"); now != closed {
		t.Errorf("the kill switch is\n%s\nand was\n%s", now, closed)
	}
	p.run(p.Router, "nft", "delete", "table", "inet", "hole")
	start = time.Now()
	p.eventually("the client is back", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	t.Logf("back after %v", time.Since(start).Round(time.Millisecond))
	inside.goesOn()
	inside.end()
	if s := p.status(p.Client, "alice"); !slices.Equal(s.Addresses, first.Addresses) {
		t.Errorf("addresses %v, before %v", s.Addresses, first.Addresses)
	}
}

// A firewall of the host itself that stops the tunnel's packets for a moment
// ends nothing, and the status names it if it stays.
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
	inside.goesOn()
	p.script(p.Client, wall+"\nsleep 1\nnft delete table inet wall")
	inside.goesOn()
	if now := p.session(); now.ID != before.ID {
		t.Error("it is another session")
	}
	p.script(p.Client, wall)
	p.eventually("the status says why", func() bool {
		return strings.Contains(p.status(p.Client, "alice").Reason,
			"packets to the proxy do not leave this host (")
	})
	p.run(p.Client, "nft", "delete", "table", "inet", "wall")
	p.eventually("the client is back", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	inside.goesOn()
	inside.end()
}

// The first address of the proxy does not answer: the next one is tried a
// moment later.
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

// Two hosts of one user stop, and start again in another order: each has the
// addresses that it had.
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
			t.Errorf("%s has %v, and had %v", h.Name(), now, had[h])
		}
		if mode := p.run(h, "stat", "-c", "%a",
			"/var/lib/masque/installation"); strings.TrimSpace(mode) != "600" {
			t.Errorf("the installation's file has mode %s", mode)
		}
	}
}
