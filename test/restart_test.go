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

// The proxy is killed and started again while a transfer runs: the client comes
// back by itself with the same addresses, and the TCP connection inside goes
// on.
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
		rest := content(size)
		if _, err := io.CopyN(io.Discard, rest, size/2); err != nil {
			sent <- err
			return
		}
		_, err := io.Copy(conn, rest)
		conn.Close()
		sent <- err
	}()
	p.startProxy()
	restarted := time.Now()
	p.awaitReconnected(0)
	t.Logf("connected %v after the proxy was", time.Since(restarted).Round(time.Millisecond))
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

// A client with nothing to send learns of a proxy that was killed and started
// again from the proxy, not by waiting in vain.
func TestIdleClientNoticesRestart(t *testing.T) {
	p := newPair(t, options{})
	file := p.invite("alice")
	running := p.runClient(file)
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(0)
	if text := p.log(running); !strings.Contains(text, "the proxy was restarted") {
		t.Errorf("the client found out otherwise:\n%s", text)
	}
}

// A proxy that stops tells its clients, and restores its host.
func TestProxyStops(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	before := p.snapshot(p.Proxy)
	p.startProxy()
	p.connect(p.Client, "alice")
	p.stopProxy()
	p.wantUnchanged(p.Proxy, before)
	p.eventually("the client knows", func() bool {
		return p.status(p.Client, "alice").State == client.StateReconnecting
	})
	p.startProxy()
	p.eventually("the client is connected again", func() bool {
		return p.status(p.Client, "alice").State == client.StateConnected
	})
	p.ping(p.Client, lab.TargetIPv4)
}

// A client that was killed leaves nothing that the next start does not remove,
// and that has the same addresses.
func TestClientKilled(t *testing.T) {
	p := newPair(t, options{})
	before := p.snapshot(p.Client)
	file := p.invite("alice")
	running := p.runClient(file)
	had := p.status(p.Client, "alice").Addresses
	p.kill(running)
	if d := lab.Diff(before, p.snapshot(p.Client)); d == "" {
		t.Error("nothing was left behind; this test would not notice that it is not removed")
	}
	out, err := p.Client.Command(p.ctx, program("masque-client"), "status",
		"alice").CombinedOutput()
	if err == nil {
		t.Errorf("status of a dead client:\n%s", out)
	}
	p.up(p.Client, file)
	if now := p.status(p.Client, "alice").Addresses; !slices.Equal(now, had) ||
		p.session().User != "alice" {
		t.Errorf("it has %v, and had %v", now, had)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}

// A user who is removed is out: the running session ends, and there is no new
// one.
func TestUserRemoved(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	p.eventually("the client is refused", func() bool {
		c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
		_ = c.Run()
		return c.ExitCode() == 3
	})
}
