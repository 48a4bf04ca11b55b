package test

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"masquevpn/internal/dnstest"
	"masquevpn/internal/lab"
)

// The proxy resolves the target of a scope with the DNS of its host. The client
// reports an unknown name and a name server that does not answer.
func TestProxyResolvesNames(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nenabled = false\n"})
	server, err := p.Target.ListenPacket("udp", netip.AddrPortFrom(lab.TargetIPv4, 53).String())
	check(t, err)
	dnstest.Serve(t, server, func(name string) ([]netip.Addr, error) {
		switch name {
		case targetName:
			return []netip.Addr{lab.TargetIPv4, netip.MustParseAddr("127.0.0.1"), lab.TargetIPv6},
				nil
		case "silent.example":
			return nil, dnstest.ErrSilent
		}
		return nil, dnstest.ErrNotFound
	})
	check(t, p.Proxy.Do(func() error {
		return os.WriteFile("/etc/resolv.conf",
			[]byte("nameserver "+lab.TargetIPv4.String()+"\n"), 0o644)
	}))
	file := p.invite("alice")
	good, err := os.ReadFile(file)
	check(t, err)
	scope := func(name string) {
		t.Helper()
		check(t, os.WriteFile(file,
			append(good[:len(good):len(good)], "\n[scope]\ntarget = \""+name+"\"\n"...), 0o600))
	}
	for name, tc := range map[string]struct {
		exit int
		want string // in the last line of the output
	}{
		"unknown.example": {8, "the proxy finds no address of the target's name"},
		"silent.example":  {1, "the proxy cannot resolve the target's name now"},
	} {
		t.Run(name, func(t *testing.T) {
			scope(name)
			c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", file)
			out, _ := c.CombinedOutput()
			if line := lastLine(out); c.ExitCode() != tc.exit || !strings.Contains(line, tc.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s", c.ExitCode(), tc.exit, tc.want, out)
			}
		})
	}
	scope(targetName)
	p.up(p.Client, file)
	if s := p.status(p.Client, "alice"); len(s.Routes) != 2 ||
		s.Routes[0].Start != lab.TargetIPv4 || s.Routes[1].Start != lab.TargetIPv6 {
		// The target's third address is denied.
		t.Errorf("routes %v, want routes to the target's two addresses", s.Routes)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
}
