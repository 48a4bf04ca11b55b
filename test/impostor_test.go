package test

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// startImpostor runs a proxy of the same name with certificates of another
// authority on a host. It returns a function that kills the impostor.
func (p *pair) startImpostor(host *lab.Host) (end func()) {
	p.t.Helper()
	dir := p.t.TempDir()
	config, runDir := filepath.Join(dir, "proxy", "proxy.toml"), filepath.Join(dir, "run")
	p.must(host, "masque-proxy", "init", "--name", lab.ProxyName, filepath.Dir(config))
	c := host.Command(p.ctx, program("masque-proxy"), "--run-dir", runDir, "run", "-c", config)
	check(p.t, c.Start())
	p.eventually("the impostor answers", func() bool {
		select {
		case <-c.Done():
			p.t.Fatalf("the impostor ended:\n%s", p.log(c))
		default:
		}
		return host.Command(p.ctx, program("masque-proxy"), "--run-dir", runDir,
			"status").Run() == nil
	})
	return func() {
		p.t.Helper()
		p.kill(c)
	}
}

// awaitImpostorReported waits until the status and a warning report that
// another server answers.
func (p *pair) awaitImpostorReported() {
	p.t.Helper()
	p.eventually("the status reports the impostor", func() bool {
		s := p.status(p.Client, "alice")
		return strings.HasPrefix(s.Reason, impostor) && warnsOfImpostor(s)
	})
}

// impostor begins the reason and the warning about an impostor.
const impostor = "somebody other than the proxy answers at "

// warnsOfImpostor reports whether the status has a warning about an impostor.
func warnsOfImpostor(s client.Status) bool {
	return slices.ContainsFunc(s.Warnings, func(w string) bool {
		return strings.HasPrefix(w, impostor)
	})
}

// An impostor answers a reconnect, on the path or through a forged DNS answer.
// No packets leave in the clear, and the client reconnects when the proxy is
// back.
func TestImpostorOnReconnect(t *testing.T) {
	for name, tc := range map[string]struct {
		at func(*pair) *lab.Host // host of the impostor

		// forge points the proxy's name to the impostor, and mend back to the
		// proxy; nil: nothing to do.
		forge, mend func(*testing.T, *pair)
	}{
		"on the path": {at: func(p *pair) *lab.Host { return p.Proxy }},
		"DNS": {
			at: func(p *pair) *lab.Host { return p.Router },
			forge: func(t *testing.T, p *pair) {
				check(t, p.Client.Resolve(lab.ProxyName, netip.MustParseAddr("203.0.113.1")))
			},
			mend: func(t *testing.T, p *pair) {
				check(t, p.Client.Resolve(lab.ProxyName, lab.ProxyIPv4, lab.ProxyIPv6))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, options{})
			p.connect(p.Client, "alice")
			talk := startChatter(t, p.Client)
			seen := p.capture()
			if tc.forge != nil {
				tc.forge(t, p)
			}
			p.killProxy()
			end := p.startImpostor(tc.at(p))
			p.awaitImpostorReported()
			talk.awaitRounds()
			end()
			if tc.mend != nil {
				tc.mend(t, p)
			}
			p.startProxy()
			p.eventually("the client is connected again", func() bool {
				s := p.status(p.Client, "alice")
				return s.State == client.StateConnected && s.Reconnects > 0 && !warnsOfImpostor(s)
			})
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
			// Except for handshakes with the impostor and packets to the LAN.
			for _, packet := range seen.Packets() {
				if l := leak(packet,
					lab.Prefixes("198.51.100.0/24", "2001:db8:1::/64")...); l != "" &&
					udpTo(packet) != 443 {
					t.Fatalf("this left the host:\n%s", l)
				}
			}
		})
	}
}

// A service that meets an impostor at its start keeps its kill switch closed
// and tries again until the proxy answers. A client that a user starts by hand
// fails at once.
func TestImpostorAtStart(t *testing.T) {
	p := newPair(t, options{client: killSwitch})
	file := p.invite("alice")
	p.killProxy()
	end := p.startImpostor(p.Proxy)

	byHand := p.Client.Command(p.ctx, program("masque-client"), "up", file, "--wait")
	if out, err := byHand.CombinedOutput(); err == nil || byHand.ExitCode() != 6 {
		t.Errorf("by hand: exit code %d, want 6\n%s", byHand.ExitCode(), out)
	}

	running := p.Client.Command(p.ctx, program("masque-client"), "run", "--service", "-c", file)
	check(t, running.Start())
	p.eventually("the service runs", func() bool {
		out, _ := p.Client.Command(p.ctx, program("masque-client"), "status", "alice",
			"--json").Output()
		return strings.HasPrefix(string(out), "{")
	})
	p.awaitImpostorReported()
	if s := p.status(p.Client, "alice"); s.KillSwitch != client.KillSwitchClosed {
		t.Errorf("the kill switch is %q", s.KillSwitch)
	}
	end()
	p.startProxy()
	p.must(p.Client, "masque-client", "wait", "alice", "--for", "connected", "--timeout", "60s")
	p.down(p.Client, "alice")
}

// The client refuses an address in its own LAN before it changes the host.
func TestPoolOverlapsLAN(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	p.editProxyConfig(`ipv4 = "10.77.0.0/24"`, `ipv4 = "198.51.100.0/24"`)
	p.startProxy()
	before := p.snapshot(p.Client)
	c := p.Client.Command(p.ctx, program("masque-client"), "up", p.invite("alice"), "--wait")
	out, err := c.CombinedOutput()
	if err == nil || c.ExitCode() != 8 ||
		!strings.Contains(lastLine(out), "the proxy assigned 198.51.100.") ||
		!strings.Contains(lastLine(out), "eth0: it is not taken") {
		t.Errorf("exit code %d, want 8\n%s", c.ExitCode(), out)
	}
	p.wantUnchanged(p.Client, before)
	p.ping(p.Client, netip.MustParseAddr("198.51.100.1"))
}
