package test

import (
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"masquevpn/internal/lab"
)

// A reload changes the routes of the tunnel during a transfer, without
// interrupting the session or the transfer.
func TestReload(t *testing.T) {
	p := newPair(t, options{proxy: "\n[routes]\nadvertise = [\"192.0.2.0/24\"]\n"})
	p.connect(p.Client, "alice")
	before := p.status(p.Client, "alice")
	// An address of the target outside the advertised network.
	other := netip.MustParseAddr("198.18.0.7")
	check(t, p.Target.AddAddr("lo", netip.PrefixFrom(other, 32)))
	check(t, p.Proxy.AddRoute(netip.PrefixFrom(other, 32), lab.TargetIPv4))
	p.wantRoute(other, "eth0")

	const size = 200 << 20
	conn, received := p.flow(p.Client, p.Target, lab.TargetIPv4, 5*patience)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, content(size))
		conn.Close()
		sent <- err
	}()

	reload := func(want string) {
		t.Helper()
		if out := p.must(p.Proxy, "masque-proxy", "reload"); strings.TrimSpace(out) != want {
			t.Errorf("reload printed %q, want %q", out, want)
		}
	}
	p.editProxyConfig(`advertise = ["192.0.2.0/24"]`,
		`advertise = ["192.0.2.0/24", "198.18.0.0/24"]`)
	reload("reloaded")
	p.eventually("the client has the new route", func() bool {
		return len(p.status(p.Client, "alice").Routes) == len(before.Routes)+1
	})
	p.wantRoute(other, "masque0")
	p.ping(p.Client, other)

	p.editProxyConfig(`advertise = ["192.0.2.0/24", "198.18.0.0/24"]`,
		`advertise = ["192.0.2.0/24", "198.18.0.0/24"]`+"\ndeny = [\"198.18.0.0/24\"]")
	reload("reloaded")
	p.wantUnreachable(p.Client, other, 3, 13)

	p.editProxyConfig(`advertise = ["192.0.2.0/24", "198.18.0.0/24"]`,
		`advertise = ["192.0.2.0/24"]`)
	p.editProxyConfig("masquerade = false", "masquerade = true")
	reload("reloaded; restart the proxy for: nat.masquerade")
	p.eventually("the client has removed the route", func() bool {
		return len(p.status(p.Client, "alice").Routes) == len(before.Routes)
	})
	p.wantRoute(other, "eth0")

	if err := <-sent; err != nil {
		t.Errorf("the transfer broke: %v", err)
	}
	if got, want := <-received, digest(content(size)); got != want {
		t.Errorf("received %s, sent %s", got, want)
	}
	p.wantSameSession(before)
}

// The credentials of a removed user are refused after the user is invited
// again.
func TestUserInvitedAgain(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nenabled = false\n"})
	old := p.invite("alice")
	p.up(p.Client, old)
	p.must(p.Proxy, "masque-proxy", "user", "remove", "alice", "-c", p.config())
	renewed := p.invite("alice")
	p.eventually("the client has ended", func() bool {
		c := p.Client.Command(p.ctx, program("masque-client"), "status", "alice")
		_ = c.Run()
		return c.ExitCode() == 3
	})
	// The client ends by itself; `down` waits for it.
	_ = p.Client.Command(p.ctx, program("masque-client"), "down", "alice").Run()
	text, err := os.ReadFile(old)
	check(t, err)
	onlyCertificate := strings.Replace(string(text), "token =", "# token =", 1)
	if onlyCertificate == string(text) {
		t.Fatalf("the client's file has no token:\n%s", text)
	}
	for name, content := range map[string]string{"all": string(text),
		"the certificate alone": onlyCertificate} {
		t.Run(name, func(t *testing.T) {
			check(t, os.WriteFile(old, []byte(content), 0o600))
			c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", old)
			if out, _ := c.CombinedOutput(); c.ExitCode() != 4 {
				t.Errorf("exit code %d, want 4:\n%s", c.ExitCode(), out)
			}
		})
	}
	p.up(p.Client, renewed)
	p.ping(p.Client, lab.TargetIPv4)
}
