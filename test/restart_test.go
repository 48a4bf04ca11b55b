package test

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// The proxy is killed and restarted during a transfer. The client reconnects by
// itself with the same addresses, and the TCP connection through the tunnel
// continues.
func TestProxyKilledAndRestarted(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	before := p.status(p.Client, "alice")

	const size = 100 << 20
	conn, received := p.flow(p.Client, p.Target, lab.TargetIPv4, 3*patience)
	half := io.LimitReader(content(size), size/2)
	if _, err := io.Copy(conn, half); err != nil {
		t.Fatal(err)
	}

	p.killProxy()
	sent := make(chan error, 1)
	go func() {
		second := content(size)
		if _, err := io.CopyN(io.Discard, second, size/2); err != nil {
			sent <- err
			return
		}
		_, err := io.Copy(conn, second)
		conn.Close()
		sent <- err
	}()
	p.startProxy()
	restarted := time.Now()
	p.awaitReconnected(0)
	t.Logf("connected %v after the proxy", time.Since(restarted).Round(time.Millisecond))
	if after := p.status(p.Client, "alice"); !slices.Equal(after.Addresses, before.Addresses) {
		t.Errorf("addresses %v, before %v", after.Addresses, before.Addresses)
	}
	if err := <-sent; err != nil {
		t.Errorf("the transfer broke: %v", err)
	}
	if got, want := <-received, digest(content(size)); got != want {
		t.Errorf("received %s, sent %s", got, want)
	}
}

// A client that sends nothing learns of a killed and restarted proxy from the
// proxy, and not by a timeout.
func TestIdleClientNoticesRestart(t *testing.T) {
	p := newPair(t, options{})
	file := p.invite("alice")
	running := p.runClient(file)
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(0)
	if text := p.log(running); !strings.Contains(text, "the proxy was restarted") {
		t.Errorf("the log has another reason:\n%s", text)
	}
}

// A proxy that stops closes its sessions and restores its host.
func TestProxyStops(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	before := p.snapshot(p.Proxy)
	p.startProxy()
	p.connect(p.Client, "alice")
	p.stopProxy()
	p.wantUnchanged(p.Proxy, before)
	p.eventually("the client is reconnecting", func() bool {
		return p.status(p.Client, "alice").State == client.StateReconnecting
	})
	p.startProxy()
	p.eventually("the client has reconnected", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	p.ping(p.Client, lab.TargetIPv4)
}

// After a client was killed, the next start removes its leftovers and gets the
// same addresses.
func TestClientKilled(t *testing.T) {
	p := newPair(t, options{})
	before := p.snapshot(p.Client)
	file := p.invite("alice")
	running := p.runClient(file)
	had := p.status(p.Client, "alice").Addresses
	p.kill(running)
	if d := lab.Diff(before, p.snapshot(p.Client)); d == "" {
		t.Error("the killed client left nothing behind: this test would not notice a failed cleanup")
	}
	out, err := p.Client.Command(p.ctx, program("masque-client"), "status",
		"alice").CombinedOutput()
	if err == nil {
		t.Errorf("status of a dead client:\n%s", out)
	}
	p.up(p.Client, file)
	if now := p.status(p.Client, "alice").Addresses; !slices.Equal(now, had) ||
		p.session().User != "alice" {
		t.Errorf("addresses %v, before %v", now, had)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}

// The session of a removed user ends, and the client does not reconnect.
func TestUserRemoved(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	p.eventually("the client has ended", func() bool {
		c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
		_ = c.Run()
		return c.ExitCode() == 3
	})
}
