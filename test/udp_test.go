package test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// nobody is the user ID of unprivileged programs.
const nobody = 65534

// unprivileged returns a command that runs a program without privileges, and as
// another user if the user namespace has several users.
func unprivileged(t *testing.T) []string {
	t.Helper()
	wrap := []string{"setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"}
	if severalUsers(t) {
		wrap = append(wrap, fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody),
			"--clear-groups")
	}
	return wrap
}

// severalUsers reports whether the user namespace has more than one user.
func severalUsers(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	check(t, err)
	fields := strings.Fields(string(b))
	return len(fields) > 3 || fields[2] != "1"
}

// forNobody copies a file for unprivileged programs. Only they can read the
// copy.
func forNobody(t *testing.T, file string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "masquevpn-nobody-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	text, err := os.ReadFile(file)
	check(t, err)
	file = filepath.Join(dir, filepath.Base(file))
	check(t, os.WriteFile(file, text, 0o600))
	if severalUsers(t) {
		check(t, os.Chown(file, nobody, nobody))
	}
	return file
}

// serveUDP runs a UDP server at an address of the target, which answers each
// packet with "answer to " and the payload. It returns the address of the
// server.
func (p *pair) serveUDP(address netip.Addr) netip.AddrPort {
	p.t.Helper()
	c, err := p.Target.ListenPacket("udp", netip.AddrPortFrom(address, 0).String())
	check(p.t, err)
	p.t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(append([]byte("answer to "), buf[:n]...), from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// forward starts masque-client forward-udp, through the command wrap, and waits
// until it is ready.
func (p *pair) forward(wrap []string, listen, target, file string) *lab.Cmd {
	p.t.Helper()
	args := append(append([]string{}, wrap...), program("masque-client"), "forward-udp", listen,
		target, "-c", file)
	c := p.Client.Command(p.ctx, args[0], args[1:]...)
	check(p.t, c.Start())
	p.eventually("forward-udp is ready", func() bool {
		select {
		case <-c.Done():
			p.t.Fatalf("forward-udp ended:\n%s\n%s", p.log(c), p.log(p.server))
		default:
		}
		return strings.Contains(p.log(c), "masque-client: ready: ")
	})
	return c
}

// asker is a local program that sends UDP requests, like a stub resolver.
type asker struct{ net.Conn }

// asker returns an asker that sends to a local port.
func (p *pair) asker(port string) asker {
	p.t.Helper()
	c, err := p.Client.DialContext(p.ctx, "udp", "127.0.0.1:"+port)
	check(p.t, err)
	p.t.Cleanup(func() { c.Close() })
	return asker{c}
}

// ask sends a question until an answer arrives, and checks the answer. It may
// be called in any goroutine.
func (a asker) ask(question string) error {
	buf := make([]byte, 1<<16)
	var last error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		// Ignore errors: nothing listens while the forwarder restarts.
		_, _ = a.Write([]byte(question))
		_ = a.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := a.Read(buf)
		if err != nil {
			last = err
			continue
		}
		if got, want := string(buf[:n]), "answer to "+question; got != want {
			if strings.HasPrefix(got, "answer to ") && question != "" &&
				got[len("answer to ")] == question[0] {
				continue // answer to an earlier question
			}
			return fmt.Errorf("asked %q, got %q", question, got)
		}
		return nil
	}
	return fmt.Errorf("asked %.20q: %w", question, last)
}

// A program without privileges forwards a UDP port to a host behind the proxy,
// for several local programs at once.
func TestForwardUDP(t *testing.T) {
	p := newPair(t, options{})
	check(t, p.Proxy.Resolve("service.example", lab.TargetIPv4))
	before := p.snapshot(p.Client)
	file := forNobody(t, p.invite("alice"))
	v4, v6 := p.serveUDP(lab.TargetIPv4), p.serveUDP(lab.TargetIPv6)
	seen, err := p.Target.Capture("eth0", func(pkt lab.Packet) bool {
		return !pkt.Outgoing && pkt.Layer(layers.LayerTypeUDP) != nil
	})
	check(t, err)
	for target, at := range map[string]netip.AddrPort{
		v4.String(): v4, v6.String(): v6, fmt.Sprintf("service.example:%d", v4.Port()): v4,
	} {
		t.Run(target, func(t *testing.T) {
			c := p.forward(unprivileged(t), "5300", target, file)
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.PID()))
			check(t, err)
			if !strings.Contains(string(status), "CapEff:\t0000000000000000") ||
				severalUsers(t) && !strings.Contains(string(status),
					fmt.Sprintf("Uid:\t%d", nobody)) {
				t.Errorf("forward-udp is not without privileges:\n%s", status)
			}
			p.wantUnchanged(p.Client, before) // a snapshot has no sockets
			var wg sync.WaitGroup
			for i := range 6 {
				a := p.asker("5300")
				wg.Go(func() {
					for j := range 20 {
						if err := a.ask(fmt.Sprintf("%c, question %d", 'a'+i, j)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			list := p.sessions()
			if len(list) != 6 {
				t.Errorf("the proxy has %d sessions, want 6: %+v", len(list), list)
			}
			for _, s := range list {
				if s.Kind != "connect-udp" || s.Target != target || s.User != "alice" ||
					s.Packets.RX < 20 {
					t.Errorf("session %+v", s)
				}
			}
			if text := p.must(p.Proxy, "masque-proxy", "sessions"); strings.Count(text,
				"UDP to "+target) != 6 {
				t.Errorf("sessions:\n%s", text)
			}
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			if err := c.Stop(ctx); err != nil {
				t.Errorf("forward-udp ended with %v:\n%s", err, p.log(c))
			}
			cancel()
			p.eventually("the proxy has no session", func() bool { return len(p.sessions()) == 0 })
			// The packets come from the proxy's address with DF set.
			ctx, cancel = context.WithTimeout(p.ctx, patience)
			if _, err := seen.Wait(ctx, func(pkt lab.Packet) bool {
				if ip, ok := pkt.NetworkLayer().(*layers.IPv4); ok {
					return at.Addr().Is4() && ip.SrcIP.String() == "192.0.2.1" &&
						ip.Flags&layers.IPv4DontFragment != 0
				}
				return at.Addr().Is6() &&
					pkt.NetworkLayer().NetworkFlow().Src().String() == "2001:db8:3::1"
			}); err != nil {
				t.Errorf("no such packet arrived: %v", err)
			}
			cancel()
		})
	}
	check(t, seen.Close())
}

// A packet that is too large for the path to the target is dropped and not
// fragmented, and its flow continues.
func TestForwardUDPNarrowTarget(t *testing.T) {
	p := newPair(t, options{})
	check(t, p.Proxy.SetMTU("eth1", 1280))
	target := p.serveUDP(lab.TargetIPv4)
	seen, err := p.Target.Capture("eth0", func(pkt lab.Packet) bool {
		return !pkt.Outgoing && pkt.Layer(layers.LayerTypeIPv4) != nil
	})
	check(t, err)
	p.forward(nil, "5300", target.String(), p.invite("alice"))
	a := p.asker("5300")
	check(t, a.ask("small"))
	if _, err := a.Write([]byte("large" + strings.Repeat("x", 1295))); err != nil {
		// The QUIC path can carry it.
		t.Fatal(err)
	}
	p.eventually("the packet is dropped", func() bool {
		return p.sessions()[0].Drops["too_big"] == 1
	})
	check(t, a.ask("small again"))
	check(t, seen.Close())
	for _, pkt := range seen.Packets() {
		if ip := pkt.NetworkLayer().(*layers.IPv4); ip.Flags&layers.IPv4MoreFragments != 0 ||
			ip.FragOffset != 0 || ip.Length > 1280 {
			t.Errorf("a fragment arrived, or a packet of %d bytes", ip.Length)
		}
	}
}

// Each reason against forwarding has its own message and exit code.
func TestForwardUDPRefused(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nenabled = false\n"})
	good := p.invite("alice")
	text, err := os.ReadFile(good)
	check(t, err)
	// edited returns the file after replacements: pairs of a pattern and a
	// text.
	edited := func(name string, replace ...string) string {
		out := text
		for i := 0; i < len(replace); i += 2 {
			re := regexp.MustCompile(replace[i])
			if !re.Match(out) {
				t.Fatalf("the client's file has no %q", replace[i])
			}
			out = re.ReplaceAll(out, []byte(replace[i+1]))
		}
		file := filepath.Join(t.TempDir(), name+".toml")
		check(t, os.WriteFile(file, out, 0o600))
		return file
	}
	const certificate, token = `(?s)(?:cert|key)_pem = '''.*?'''`, `(?m)^token = .*$`
	service := p.serveUDP(lab.TargetIPv4).String()
	for _, tc := range []struct {
		name, listen, target, file string
		exit                       int
		want                       string // in the last line of the output
	}{
		{"the proxy's loopback", "5300", "127.0.0.1:53", good, 8, "destination_ip_prohibited"},
		{"the proxy", "5300", "192.0.2.1:443", good, 8, "destination_ip_prohibited"},
		{"the proxy in the tunnel", "5300", "10.77.0.1:53", good, 8, "destination_ip_prohibited"},
		{"a client", "5300", "10.77.0.9:53", good, 8, "destination_ip_prohibited"},
		{"metadata", "5300", "169.254.169.254:80", good, 8, "choose another target"},
		{"broadcast", "5300", "192.0.2.255:9", good, 8, "destination_ip_prohibited"},
		{"no TARGET port", "5300", "192.0.2.2", good, 2, "TARGET"},
		{"bad LISTEN", "dns", service, good, 2, "LISTEN"},
		{"wrong token", "5300", service, edited("bob", certificate, "", token, `token = "guess"`),
			4, "credentials"},
		{"no credentials", "5300", service, edited("eve", certificate, "", token, ""), 4,
			"credentials"},
		{"unknown CA", "5300", service, edited("carol", `(?s)ca_pem = '''.*?'''`, ""), 6,
			"unknown authority"},
		{"closed port", "5300", service,
			edited("dave", `(?m)^proxy = .*$`, `proxy = "`+lab.ProxyName+`:9"`), 5, "UDP port 9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := p.Client.Command(p.ctx, program("masque-client"), "forward-udp", tc.listen,
				tc.target, "-c", tc.file)
			out, _ := c.CombinedOutput()
			if line := lastLine(out); c.ExitCode() != tc.exit || !strings.Contains(line, tc.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s", c.ExitCode(), tc.exit,
					tc.want, out)
			}
		})
	}
	p.stopProxy()
	p.editProxyConfig("[nat]", "[connect_udp]\nenabled = false\n[nat]")
	p.startProxy()
	c := p.Client.Command(p.ctx, program("masque-client"), "forward-udp", "5300", service,
		"-c", good)
	if out, _ := c.CombinedOutput(); c.ExitCode() != 2 ||
		!strings.Contains(lastLine(out), "does not forward UDP") {
		t.Errorf("turned off: exit code %d:\n%s", c.ExitCode(), out)
	}
}

// The proxy is killed and restarted. Forwarding continues by itself, also for
// local programs from before.
func TestForwardUDPProxyRestart(t *testing.T) {
	p := newPair(t, options{})
	target := p.serveUDP(lab.TargetIPv4)
	c := p.forward(unprivileged(t), "5300", target.String(), forNobody(t, p.invite("alice")))
	old := p.asker("5300")
	check(t, old.ask("before"))
	p.killProxy()
	p.startProxy()
	check(t, old.ask("after"))
	check(t, p.asker("5300").ask("new"))
	// The forwarder learned of the restart from the new proxy, and not by a
	// timeout.
	if text := p.log(c); !strings.Contains(text, "the proxy was restarted") {
		t.Errorf("the log has another reason:\n%s", text)
	}
}

// With privileges, forwarding works beside a full tunnel to the same proxy.
func TestForwardUDPBesideTunnel(t *testing.T) {
	p := newPair(t, options{})
	file := p.invite("alice")
	p.up(p.Client, file)
	target := p.serveUDP(lab.TargetIPv4)
	p.forward(nil, "5300", target.String(), file)
	check(t, p.asker("5300").ask("hello"))
	p.ping(p.Client, lab.TargetIPv4)
}
