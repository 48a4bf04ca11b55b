package test

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/lab"
)

// serveDNS answers queries on a socket, with the addresses that lookup has of a
// name. Of one without it says that there is none, and to one that begins with
// silent. it does not answer.
func serveDNS(t *testing.T, c net.PacketConn, lookup func(name string) []netip.Addr) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := answerDNS(buf[:n], lookup); answer != nil {
				_, _ = c.WriteTo(answer, from)
			}
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

// answerDNS makes the answer to a query, nil for none.
func answerDNS(query []byte, lookup func(name string) []netip.Addr) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil
	}
	q, err := p.Question()
	if err != nil || strings.HasPrefix(q.Name.String(), "silent.") {
		return nil
	}
	addrs := lookup(strings.TrimSuffix(q.Name.String(), "."))
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired,
			RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
	if addrs == nil {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		var body dnsmessage.ResourceBody
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			body = &dnsmessage.AResource{A: a.As4()}
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: body})
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// Names are resolved by the proxy, with the DNS of its host. What it does not
// find, and what it is not told in time, is said so.
func TestNamesAreResolvedByTheProxy(t *testing.T) {
	p := newPair(t, options{client: "\n[reconnect]\nenabled = false\n"})
	server, err := p.Target.ListenPacket("udp", netip.AddrPortFrom(lab.TargetIPv4, 53).String())
	check(t, err)
	serveDNS(t, server, func(name string) []netip.Addr {
		if name != targetName {
			return nil
		}
		return []netip.Addr{lab.TargetIPv4, netip.MustParseAddr("127.0.0.1"), lab.TargetIPv6}
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
	for name, want := range map[string]struct {
		exit int
		says string
	}{
		"unknown.example": {8, "the proxy finds no address of the target's name"},
		"silent.example":  {1, "the proxy cannot resolve the target's name now"},
	} {
		scope(name)
		c := p.Client.Command(p.ctx, program("masque-client"), "run", "-c", file)
		out, _ := c.CombinedOutput()
		if line := lastLine(out); c.ExitCode() != want.exit || !strings.Contains(line, want.says) {
			t.Errorf("%s: exit code %d, want %d and %q:\n%s", name, c.ExitCode(), want.exit,
				want.says, out)
		}
	}
	scope(targetName)
	p.up(p.Client, file)
	if s := p.status(p.Client, "alice"); len(s.Routes) != 2 ||
		s.Routes[0].Start != lab.TargetIPv4 || s.Routes[1].Start != lab.TargetIPv6 {
		// its third one is denied
		t.Errorf("routes %v, want those of the target's two addresses", s.Routes)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
}
