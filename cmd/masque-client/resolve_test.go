package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"masquevpn/internal/discovery/discoverytest"
)

// Each reason for which a domain leads to no proxy has its message and its exit
// code.
func TestResolveMessages(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("203.0.113.1")}
	servfail := discoverytest.Node{Fail: map[string]string{"*": "SERVFAIL"}}
	srv := func(s string) discoverytest.Node { return discoverytest.Node{SRV: []string{s}} }
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{
		"p.example":                   {A: addrs},
		"www.example":                 {CNAME: "p.example."},
		"lo.example":                  {A: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		"_masque._udp.srv.example":    srv("10 60 443 p.example."),
		"_masque._udp.none.example":   srv("0 0 0 ."),
		"_masque._tcp.h2.example":     srv("0 0 443 p.example."),
		"_masque._udp.alias.example":  srv("0 0 443 www.example."),
		"_masque._udp.inside.example": srv("0 0 443 lo.example."),
		"web.example":                 {HTTPS: []string{"0 lo.example."}},
		"loop.example":                {CNAME: "loop2.example."},
		"loop2.example":               {CNAME: "loop.example."},
		"fail.example":                servfail,
		"_masque._udp.fail.example":   servfail,
	}}
	server := w.ServeDNS(t).String()
	for _, tt := range []struct {
		input string
		exit  int
		want  string // in the last line on standard error
	}{
		{"srv.example", 0, ""},
		{"p.example:443", 0, ""},
		{"2001:db8::1", 0, ""},
		{"missing.example", 5, "the name missing.example has no address: check its spelling " +
			"in the configuration, and this host's DNS"},
		{"fail.example", 5, "DNS does not answer about fail.example (SERVFAIL): check this " +
			"host's DNS"},
		{"loop.example", 5, "the aliases of loop.example lead in circles: tell its operator"},
		{"none.example", 5, "none.example says in its DNS that it has no MASQUE proxy: check " +
			"the name, or ask its operator"},
		{"h2.example", 5, "h2.example offers its proxy by HTTP/2 (_masque._tcp) alone, which " +
			"this program does not speak: ask its operator for _masque._udp"},
		{"alias.example", 5, "no SRV record of alias.example can be used (www.example port " +
			"443: an alias): tell its operator, or write the proxy with its port"},
		{"inside.example", 5, "(lo.example port 443: forbidden address)"},
		{"web.example", 5, "leads to 127.0.0.1, where no proxy of another host can be: tell " +
			"its operator"},
		{"b\u00fccher.example", 2, `not ASCII: write "xn--bcher-kva.example"`},
		{"fe80::1%eth0", 2, "has a zone, which no certificate can have: write the address " +
			"without it"},
		{"::ffff:192.0.2.1", 2, `an IPv4 address in IPv6 form: write "192.0.2.1"`},
		{"vpn.invalid", 2, `"vpn.invalid": a name below .invalid is not in DNS`},
		{"a b", 2, `"a b": not a name, host:port or URI template: write for example "vpn.example.org"`},
	} {
		t.Run(tt.input, func(t *testing.T) {
			if _, last := do(t, tt.exit, "resolve", tt.input, "--nameserver",
				server); !strings.Contains(last, tt.want) {
				t.Errorf("got %s, want %q", last, tt.want)
			}
		})
	}
}

// A DNS server elsewhere is not trusted to validate signatures without a
// warning.
func TestUnprotectedServers(t *testing.T) {
	for _, tt := range []struct{ dnssec, servers, want string }{
		{"off", `["192.0.2.53"]`, "[]"},
		{"use", `["127.0.0.1", "[::1]:5353"]`, "[]"},
		{"require", `["127.0.0.1", "192.0.2.53"]`, "[192.0.2.53:53]"},
	} {
		t.Run(tt.dnssec+" "+tt.servers, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "home.toml")
			text := fmt.Sprintf(
				"proxy = \"example.org\"\n[discovery]\ndnssec = %q\nnameservers = %s\n", tt.dnssec,
				tt.servers)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := load(file, "home")
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(l.unprotected()); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
