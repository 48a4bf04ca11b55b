package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"masquevpn/client"
	"masquevpn/internal/fault"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/tun"
)

func lines(s ...string) []byte { return []byte(strings.Join(s, "\n") + "\n") }

func prefixes(s ...string) (list []netip.Prefix) {
	for _, p := range s {
		list = append(list, netip.MustParsePrefix(p))
	}
	return list
}

var compare = cmp.Options{
	cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}),
	cmpopts.IgnoreUnexported(Client{}, Proxy{}, User{}),
	cmpopts.EquateEmpty(),
}

func TestClientDefaults(t *testing.T) {
	got, err := ParseClient("/etc/masque/home.toml", lines(`proxy = "vpn.example.org"`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Client{
		Config: client.Config{
			Proxy: "vpn.example.org", Target: "*", IPProto: "*",
			TUN:     tun.Config{Name: "masque%d", Offload: true},
			Request: prefixes("0.0.0.0/32", "::/128"), InstallRoutes: true,
			Accept: prefixes("0.0.0.0/0", "::/0"), Mark: 0xa0000000, Congestion: "inner",
			Reconnect: true, MaxDelay: 30 * time.Second,
		},
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Error(diff)
	}
	if got.Secret() {
		t.Error("Secret() = true without a token or a key")
	}
}

// TestClientFull sets every key.
func TestClientFull(t *testing.T) {
	data, err := os.ReadFile("testdata/client.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseClient("/etc/masque/home.toml", data)
	if err != nil {
		t.Fatal(err)
	}
	want := &Client{
		Config: client.Config{
			Proxy:  "https://vpn.example.org:4433/ip{?target,ipproto}",
			Target: "*", IPProto: "*", TUN: tun.Config{Name: "masque0", MTU: 1300},
			Static: prefixes("10.77.0.9/32", "fd77::9/64"), Accept: prefixes("10.0.0.0/8"),
			Exclude: prefixes("10.9.0.0/16", "fd00::/8"), Mark: 0x30000000,
			AdvertiseRoutes: prefixes("192.0.2.0/24", "2001:db8:a::/64"),
			AssignPeer:      prefixes("192.0.2.200/32"), HostRoutes: routing.HostAll,
			DNS: client.DNS{Off: true, Hold: true,
				Servers: []netip.Addr{netip.MustParseAddr("10.0.0.53"),
					netip.MustParseAddr("fd00::53")},
				Search: []string{"corp.example"}, Domains: []string{"corp.example", "."}},
			Congestion: "outer", MaxDelay: 90 * time.Second,
		},
		CA: "/etc/masque/ca.crt", Cert: "/etc/masque/keys/me.crt", Key: "/var/me.key",
		ServerName: "other.example.org", TokenFile: "/etc/masque/token",
		UseKillSwitch: true, KillSwitchAllow: prefixes("192.168.5.0/24", "fd00:5::/64"),
		Metrics: ":9485", QlogDir: "/var/lib/masque/qlog", KeyLog: "/etc/masque/keys.log",
		PCAP: "/etc/masque/home.pcap",
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Error(diff)
	}
}

func TestClientScope(t *testing.T) {
	for _, ipproto := range []string{`"17"`, `17`} {
		t.Run(ipproto, func(t *testing.T) {
			c, err := ParseClient("c.toml",
				lines(`proxy = "p"`, `[scope]`, `target = "192.0.2.0/24"`, `ipproto = `+ipproto))
			if err != nil {
				t.Fatal(err)
			}
			if c.Target != "192.0.2.0/24" || c.IPProto != "17" {
				t.Errorf("target %q, ipproto %q", c.Target, c.IPProto)
			}
		})
	}
}

// An empty list disables the request, unlike a missing key.
func TestClientRequest(t *testing.T) {
	for text, want := range map[string][]netip.Prefix{
		``:                         prefixes("0.0.0.0/32", "::/128"),
		`request = []`:             {},
		`request = ["0.0.0.0/32"]`: prefixes("0.0.0.0/32"),
	} {
		t.Run(text, func(t *testing.T) {
			c, err := ParseClient("c.toml", lines(`proxy = "p"`, `[addresses]`, text))
			if err != nil {
				t.Fatal(err)
			}
			if c.Request == nil || !slices.Equal(c.Request, want) {
				t.Errorf("%q: got %#v, want %v", text, c.Request, want)
			}
		})
	}
}

func TestClientInlineSecrets(t *testing.T) {
	for _, test := range []struct {
		name   string
		data   []byte
		secret bool
	}{
		{"token", lines(`proxy = "p"`, `[auth]`, `token = "abc"`), true},
		{"key", lines(`proxy = "p"`, `[tls]`, `cert_pem = "c"`, `key_pem = "k"`), true},
		{"name of a key file", lines(`proxy = "p"`, `[tls]`, `cert = "c"`, `key = "k"`), false},
		{"authority", lines(`proxy = "p"`, `[tls]`, `ca_pem = "c"`), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := ParseClient("c.toml", test.data)
			if err != nil {
				t.Fatal(err)
			}
			if c.Secret() != test.secret {
				t.Errorf("Secret() = %v for\n%s", c.Secret(), test.data)
			}
		})
	}
}

func TestProxyDefaults(t *testing.T) {
	got, err := ParseProxy("/etc/masque/proxy.toml", lines(`name = "vpn.example.org"`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Proxy{
		Config: proxy.Config{
			Name: "vpn.example.org", Listen: []string{"[::]:443"}, Methods: []string{"token"},
			TUN:   tun.Config{Name: "masque%d", Offload: true},
			Pool4: netip.MustParsePrefix("10.77.0.0/24"),
			Pool6: netip.MustParsePrefix("fd77::/64"), Hold: time.Hour,
			Advertise: prefixes("0.0.0.0/0", "::/0"), Congestion: "inner", Masquerade: true,
			ConnectUDP: true, MaxSessions: 4096, MaxSessionsPerUser: 8, MaxUDPFlows: 4096,
			MaxUDPFlowsPerUser: 256,
		},
		Cert: "/etc/masque/proxy.crt", Key: "/etc/masque/proxy.key",
		UsersFile: "/etc/masque/users.toml", Metrics: "127.0.0.1:9484",
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Error(diff)
	}
}

func TestProxyFull(t *testing.T) {
	data, err := os.ReadFile("testdata/proxy.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseProxy("/etc/masque/proxy.toml", data)
	if err != nil {
		t.Fatal(err)
	}
	want := &Proxy{
		Config: proxy.Config{
			Name: "vpn.example.org", Listen: []string{"[::]:443", "192.0.2.1:4433"},
			Template: "https://vpn.example.org/t/{target}/{ipproto}/",
			Methods:  []string{"mtls", "token"}, TUN: tun.Config{Name: "masque0", MTU: 1280},
			Pool4: netip.MustParsePrefix("10.78.0.0/24"), Delegate4: 28, Hold: 24 * time.Hour,
			Advertise: prefixes("10.0.0.0/8"), Deny: prefixes("169.254.0.0/16"),
			DNS: proxy.DNS{
				Servers: []netip.Addr{netip.MustParseAddr("10.78.0.1"),
					netip.MustParseAddr("10.0.0.53")},
				Domains: []string{"corp.example"},
				Search:  []string{"corp.example", "a.corp.example"},
				NAT64:   prefixes("64:ff9b::/96")},
			ClientToClient: true, KernelHopLimit: true, Congestion: "outer", MaxSessions: 10,
			MaxSessionsPerUser: 2, MaxAddressesPerUser: 3, MaxUDPFlows: 20,
			MaxUDPFlowsPerUser: 5,
			Sites: []proxy.Site{
				{User: "branch", Networks: prefixes("192.0.2.0/24", "2001:db8:a::/64"),
					Peer: prefixes("10.9.0.0/24")},
				{User: "depot", Networks: prefixes("198.51.100.0/24"),
					Reach: prefixes("192.0.2.0/24")},
				{User: "kiosk", Networks: prefixes("203.0.113.0/24"), Reach: prefixes()},
			},
		},
		Cert: "/etc/masque/a.crt", Key: "/etc/masque/a.key", ClientCA: "/etc/masque/ca.crt",
		UsersFile: "/etc/masque/people.toml", QlogDir: "/etc/masque/qlog", KeyLog: "/tmp/keys",
		Metrics: "[::1]:9100", MetricsNamed: true,
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Error(diff)
	}
	if got.Sites[0].Reach != nil || got.Sites[2].Reach == nil {
		t.Error("an empty reach and a missing one are equal")
	}
}

func TestProxyACME(t *testing.T) {
	got, err := ParseProxy("/etc/masque/proxy.toml",
		lines(`name = "vpn.example.org"`, `[tls.acme]`, `email = "admin@example.org"`,
			`agree_tos = true`))
	if err != nil {
		t.Fatal(err)
	}
	want := &ACME{Email: "admin@example.org", Challenge: "tls-alpn-01",
		Storage: "/var/lib/masque/acme"}
	if diff := cmp.Diff(want, got.ACME); diff != "" || got.Cert != "" || got.Key != "" {
		t.Errorf("%s, certificate %q, key %q", diff, got.Cert, got.Key)
	}
	got, err = ParseProxy("/etc/masque/proxy.toml",
		lines(`name = "vpn.example.org"`, `[tls]`, `client_ca = "ca.crt"`, `[tls.acme]`,
			`email = "admin@example.org"`, `agree_tos = true`,
			`directory = "https://acme.example:14000/dir"`, `ca = "acme.crt"`,
			`challenge = "http-01"`, `listen = "192.0.2.1:8080"`, `storage = "state"`))
	if err != nil {
		t.Fatal(err)
	}
	want = &ACME{
		Email: "admin@example.org", Directory: "https://acme.example:14000/dir",
		CA:        "/etc/masque/acme.crt",
		Challenge: "http-01", Listen: "192.0.2.1:8080", Storage: "/etc/masque/state",
	}
	if diff := cmp.Diff(want, got.ACME); diff != "" || got.ClientCA != "/etc/masque/ca.crt" {
		t.Errorf("%s, client_ca %q", diff, got.ClientCA)
	}
}

func TestProxyDefaultMethods(t *testing.T) {
	for _, test := range []struct {
		name string
		data []byte
		want []string
	}{
		{"no client authority", lines(`name = "p"`), []string{"token"}},
		{"client authority", lines(`name = "p"`, `[tls]`, `client_ca = "ca.crt"`),
			[]string{"mtls", "token"}},
		{"explicit methods", lines(`name = "p"`, `[tls]`, `client_ca = "ca.crt"`, `[auth]`,
			`methods = ["token"]`), []string{"token"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := ParseProxy("p.toml", test.data)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, p.Methods); diff != "" {
				t.Error(diff)
			}
		})
	}
	p, err := ParseProxy("p.toml", lines(`name = "p"`, `[auth]`, `methods = ["none"]`))
	if err != nil || p.UsersFile != "" {
		t.Errorf("methods none: users %q, %v; want no users file", p.UsersFile, err)
	}
}

// TestProblems has one row per error. Each error names the file, the line, the
// key and, unless it is secret, the value.
func TestProblems(t *testing.T) {
	const client, proxy, users = "client", "proxy", "users"
	head := map[string]string{client: `proxy = "vpn.example.org"`,
		proxy: `name = "vpn.example.org"`, users: `# users`}
	for _, test := range []struct {
		kind string
		data []string // lines after the first, which is valid
		want string   // text of the only problem
	}{
		// The document.
		{client, []string{`[tls`}, `f.toml:2: `},
		{client, []string{`colour = "red"`}, `f.toml:2: colour: unknown key; remove it`},
		{client, []string{`[colours]`, `a = 1`}, `f.toml:2: colours: unknown key; remove it`},
		{client, []string{`[routes]`, `exlude = []`},
			`f.toml:3: routes.exlude: unknown key; did you mean "routes.exclude"?`},
		{client, []string{`mtu = 1300`}, `f.toml:2: mtu: unknown key; it belongs to [tun]`},
		{client, []string{`[tun]`, `name = "m"`, `[scope]`, `proxy = "x"`},
			`f.toml:5: scope.proxy: unknown key; it belongs at the top of the file, before ` +
				`the first table`},
		{client, []string{`proxy = "again"`}, `f.toml:2: proxy: `},
		{client, []string{`tun = "masque0"`},
			`f.toml:2: tun: is a table, not a value; write [tun] on a line of its own`},
		{client, []string{`tun.mtu = true`},
			`f.toml:2: tun.mtu = true: not an MTU; write "auto" or a number from 576 to 65535`},
		{client, []string{`tun = { mtu = 10 }`},
			`f.toml:2: tun.mtu = 10: not an MTU; write "auto" or a number from 576 to 65535`},

		// The client.
		{client, []string{`[tls]`, `ca = 1`},
			`f.toml:3: tls.ca = 1: not a string in quotes; write a string in quotes`},
		{client, []string{`[tls]`, `ca = "a"`, `ca_pem = "b"`},
			`f.toml:3: tls.ca = "a": tls.ca_pem says the same; keep one of the two`},
		{client, []string{`[tls]`, `cert = "a"`, `cert_pem = "b"`, `key = "k"`},
			`f.toml:3: tls.cert = "a": tls.cert_pem says the same; keep one of the two`},
		{client, []string{`[tls]`, `cert = "a"`, `key = "b"`, `key_pem = "k"`},
			`f.toml:4: tls.key = "b": tls.key_pem says the same; keep one of the two`},
		{client, []string{`[tls]`, `cert = "a"`},
			`f.toml:2: tls.key: the key of the certificate is missing; set tls.key or tls.key_pem`},
		{client, []string{`[tls]`, `key = "a"`},
			`f.toml:2: tls.cert: the certificate of the key is missing; set tls.cert or ` +
				`tls.cert_pem`},
		{client, []string{`[tls]`, `server_name = "a b"`},
			`f.toml:3: tls.server_name = "a b": not a name or an address; write for example ` +
				`"vpn.example.org"`},
		{client, []string{`[auth]`, `token = "s3cret"`, `token_file = "t"`},
			`f.toml:4: auth.token_file = "t": auth.token says the same; keep one of the two`},
		{client, []string{`[auth]`, `token = 5`},
			`f.toml:3: auth.token: not a string in quotes; write a string in quotes`},
		{client, []string{`[auth]`, `tokn = "s3cret"`},
			`f.toml:3: auth.tokn: unknown key; did you mean "auth.token"?`},
		{client, []string{`[scope]`, `target = 7`},
			`f.toml:3: scope.target = 7: not a string in quotes; write a string in quotes`},
		{client, []string{`[scope]`, `target = ""`},
			`f.toml:3: scope.target = "": empty; write "*" for no preference, or leave it out`},
		{client, []string{`[scope]`, `ipproto = ""`},
			`f.toml:3: scope.ipproto = "": empty; write "*" for no preference, or leave it out`},
		{client, []string{`[scope]`, `ipproto = true`},
			`f.toml:3: scope.ipproto = true: not a string in quotes; write a string in quotes`},
		{client, []string{`[tun]`, `name = "a-name-that-is-too-long"`},
			`f.toml:3: tun.name = "a-name-that-is-too-long": not a name of a network ` +
				`interface; write for example "masque0", at most 15 characters`},
		{client, []string{`[tun]`, `name = "../x"`},
			`f.toml:3: tun.name = "../x": not a name of a network interface; `},
		{client, []string{`[tun]`, `name = "a%d%d"`},
			`f.toml:3: tun.name = "a%d%d": not a name of a network interface; `},
		{client, []string{`[tun]`, `name = ""`},
			`f.toml:3: tun.name = "": not a name of a network interface; `},
		{client, []string{`[tun]`, `mtu = 100`},
			`f.toml:3: tun.mtu = 100: not an MTU; write "auto" or a number from 576 to 65535`},
		{client, []string{`[tun]`, `mtu = "big"`}, `f.toml:3: tun.mtu = "big": not an MTU; `},
		{client, []string{`[tun]`, `offload = "yes"`},
			`f.toml:3: tun.offload = "yes": not true or false; write true or false`},
		{client, []string{`[tunnel]`, `congestion = "both"`},
			`f.toml:3: tunnel.congestion = "both": `},
		{client, []string{`[addresses]`, `request = "0.0.0.0/32"`},
			`f.toml:3: addresses.request = "0.0.0.0/32": not a list; write a list of ` +
				`strings: ["...", "..."]`},
		{client, []string{`[addresses]`, `static = ["10.0.0.1"]`},
			`f.toml:3: addresses.static[0] = "10.0.0.1": the prefix length is missing; write ` +
				`"10.0.0.1/32" for this one address`},
		{client, []string{`[addresses]`, `static = ["10.0.0.1/8"]`, `request = ["::/128"]`},
			`f.toml:4: addresses.request = ["::/128"]: static addresses are used instead of ` +
				`asking; keep one of request and static`},
		{client, []string{`[routes]`, `install = 1`},
			`f.toml:3: routes.install = 1: not true or false; write true or false`},
		{client, []string{`[routes]`, `accept = [`, ` "0.0.0.0/0",`, ` "10.0.0.1/8",`, `]`},
			`f.toml:5: routes.accept[1] = "10.0.0.1/8": bits are set behind the prefix ` +
				`length; write "10.0.0.0/8"`},
		{client, []string{`[routes]`, `mark = "0x250c"`},
			`f.toml:3: routes.mark = "0x250c": not two bits of a mark; write for example ` +
				`"0xa0000000", two bits that no other program of this host uses in marks`},
		{client, []string{`[routes]`, `mark = 4`},
			`f.toml:3: routes.mark = 4: not two bits of a mark; `},
		{client, []string{`[routes]`, `mark = "0x100000001"`},
			`f.toml:3: routes.mark = "0x100000001": not two bits of a mark; `},
		{client, []string{`[routes]`, `mark = true`},
			`f.toml:3: routes.mark = true: not two bits of a mark; `},
		{client, []string{`[routes]`, `lan = 0`},
			`f.toml:3: routes.lan = 0: not true, false or "all"; write true for the private ` +
				`networks of this host, "all" for all of its routes, false for neither`},
		{client, []string{`[routes]`, `lan = "none"`},
			`f.toml:3: routes.lan = "none": not true, false or "all"; `},
		{client, []string{`[routes]`, `lan = false`, `advertise = ["10.1.0.0/24"]`},
			`f.toml:3: routes.lan = false: the networks behind this host, routes.advertise, ` +
				`would lead into the tunnel; remove one of the two`},
		{client, []string{`[routes]`, `exclude = [1]`},
			`f.toml:3: routes.exclude[0] = 1: not a string in quotes; put it in quotes`},
		{client, []string{`[routes]`, `exclude = ["lan"]`},
			`f.toml:3: routes.exclude[0] = "lan": not an address prefix; write for example ` +
				`"192.0.2.0/24" or "2001:db8::/32"`},
		{client, []string{`[routes]`, `exclude = ["::ffff:10.0.0.0/104"]`},
			`f.toml:3: routes.exclude[0] = "::ffff:10.0.0.0/104": an IPv4 address in IPv6 ` +
				`form; write the IPv4 prefix`},
		{client, []string{`[routes]`, `advertise = ["10.0.0.1/8"]`},
			`f.toml:3: routes.advertise[0] = "10.0.0.1/8": bits are set behind the prefix ` +
				`length; write "10.0.0.0/8"`},
		{client, []string{`[routes]`, `assign = ["10.1.0.200"]`},
			`f.toml:3: routes.assign[0] = "10.1.0.200": the prefix length is missing; write ` +
				`"10.1.0.200/32" for this one address`},
		{client, []string{`[routes]`, `assign = ["fd01::c8/64"]`},
			`f.toml:3: routes.assign[0] = "fd01::c8/64": not a single address; write ` +
				`"fd01::c8/128"`},
		{client, []string{`[dns]`, `outside = "hold"`},
			`f.toml:3: dns.outside = "hold": not true or false; write true or false`},
		{client, []string{`[dns]`, `mode = "resolved"`},
			`f.toml:3: dns.mode = "resolved": not known; write "auto" or "off"`},
		{client, []string{`[kill_switch]`, `enabled = "true"`},
			`f.toml:3: kill_switch.enabled = "true": not true or false; write true or false`},
		{client, []string{`[kill_switch]`, `allow = ["10.0.0.1/8"]`},
			`f.toml:3: kill_switch.allow[0] = "10.0.0.1/8": bits are set behind the prefix ` +
				`length; write "10.0.0.0/8"`},
		{client, []string{`[kill_switch]`, `allow = ["fd00::/8", "::/0"]`},
			`f.toml:3: kill_switch.allow[1] = "::/0": allows everything of its family; name ` +
				`the networks, `},
		{client, []string{`[dns]`, `servers = ["127.0.0.1"]`},
			`f.toml:3: dns.servers[0] = "127.0.0.1": not an address that others can reach; ` +
				`write for example "10.77.0.1" or "fd77::1"`},
		{client, []string{`[dns]`, `servers = []`},
			`f.toml:3: dns.servers = []: empty; leave it out for what the proxy says, or ` +
				`write mode = "off"`},
		{client, []string{`[dns]`, `servers = "10.77.0.1"`},
			`f.toml:3: dns.servers = "10.77.0.1": not a list; write a list of strings: ` +
				`["...", "..."]`},
		{client, []string{`[dns]`, `search = ["."]`},
			`f.toml:3: dns.search[0] = ".": not a domain name; `},
		{client, []string{`[dns]`, `search = ["a\nnameserver 192.0.2.1"]`},
			`f.toml:3: dns.search[0] = "a\nnameserver 192.0.2.1": not a domain name; `},
		{client, []string{`[dns]`, `domains = ["corp.example", "CORP.example."]`},
			`f.toml:3: dns.domains[1] = "CORP.example.": given twice; remove one`},
		{client, []string{`[dns]`, `domains = ["..", "."]`},
			`f.toml:3: dns.domains[0] = "..": not a domain name; `},
		{client, []string{`[reconnect]`, `enabled = "no"`},
			`f.toml:3: reconnect.enabled = "no": not true or false; write true or false`},
		{client, []string{`[reconnect]`, `max_delay = "soon"`},
			`f.toml:3: reconnect.max_delay = "soon": not a time span; write for example ` +
				`"30s" or "5m"`},
		{client, []string{`[reconnect]`, `max_delay = "1ms"`},
			`f.toml:3: reconnect.max_delay = "1ms": too short; write at least "1s"`},
		{client, []string{`[log]`, `pcap = true`},
			`f.toml:3: log.pcap = true: not a string in quotes; write a string in quotes`},

		// The proxy.
		{proxy, []string{`[tls]`, `acme = true`},
			`f.toml:3: tls.acme: is a table, not a value; write [tls.acme] on a line of its own`},
		{proxy, []string{`[tls.acme]`, `email = "a@example.org"`},
			`f.toml:2: tls.acme.agree_tos: the terms of service of the authority have to be ` +
				`agreed to; read them, and write agree_tos = true`},
		{proxy, []string{`[tls.acme]`, `email = "a@example.org"`, `agree_tos = false`},
			`f.toml:4: tls.acme.agree_tos = false: the terms of service`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`},
			`f.toml:2: tls.acme.email: not an e-mail address; write one`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`, `email = "a b@example.org"`},
			`f.toml:4: tls.acme.email = "a b@example.org": not an e-mail address`},
		{proxy, []string{`[tls]`, `cert = "a.crt"`, `[tls.acme]`, `agree_tos = true`,
			`email = "a@example.org"`},
			`f.toml:3: tls.cert = "a.crt": tls.acme gets the certificate; keep one of the two`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`, `email = "a@example.org"`,
			`directory = "http://acme.example/dir"`},
			`f.toml:5: tls.acme.directory = "http://acme.example/dir": not the URL of a ` +
				`directory; write for example ` +
				`"https://acme-v02.api.letsencrypt.org/directory"`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`, `email = "a@example.org"`,
			`challenge = "dns-01"`},
			`f.toml:5: tls.acme.challenge = "dns-01": not known; write "tls-alpn-01" or "http-01"`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`, `email = "a@example.org"`,
			`listen = "443"`}, `f.toml:5: tls.acme.listen = "443": not an address and port; write for example ":443" or "192.0.2.1:443"`},
		{proxy, []string{`[tls.acme]`, `agree_tos = true`, `email = "a@example.org"`,
			`storage = ""`}, `f.toml:5: tls.acme.storage = "": empty; write the name of a folder`},
		{proxy, []string{`listen = []`},
			`f.toml:2: listen = []: empty; write for example ["[::]:443"]`},
		{proxy, []string{`listen = ["443"]`},
			`f.toml:2: listen[0] = "443": not an address and port; write for example ` +
				`"[::]:443" or "192.0.2.1:443"`},
		{proxy, []string{`listen = ["a.example:443"]`},
			`f.toml:2: listen[0] = "a.example:443": not an address and port; `},
		{proxy, []string{`listen = [":0"]`},
			`f.toml:2: listen[0] = ":0": not an address and port; `},
		{proxy, []string{`listen = [":1", ":1"]`},
			`f.toml:2: listen[1] = ":1": given twice; remove one`},
		{proxy, []string{`[auth]`, `methods = []`}, `f.toml:3: auth.methods = []: empty; `},
		{proxy, []string{`[auth]`, `methods = ["password"]`},
			`f.toml:3: auth.methods[0] = "password": not known; write "mtls" or "token" or "none"`},
		{proxy, []string{`[auth]`, `methods = ["token", "token"]`},
			`f.toml:3: auth.methods[1] = "token": given twice; remove one`},
		{proxy, []string{`[auth]`, `methods = ["token", "none"]`},
			`f.toml:3: auth.methods[1] = "none": lets everyone in, whatever the other ` +
				`methods are; write it alone, or remove it`},
		{proxy, []string{`[auth]`, `methods = ["mtls"]`},
			`f.toml:3: auth.methods[0] = "mtls": needs the CA of the clients' certificates; ` +
				`set tls.client_ca, or remove "mtls"`},
		{proxy, []string{`[auth]`, `users = ""`},
			`f.toml:3: auth.users = "": empty; write the name of the users file`},
		{proxy, []string{`[tunnel]`, `congestion = ""`}, `f.toml:3: tunnel.congestion = "": `},
		{proxy, []string{`[pool]`}, `f.toml:2: pool: empty; `},
		{proxy, []string{`[pool]`, `ipv4 = "fd77::/64"`},
			`f.toml:3: pool.ipv4 = "fd77::/64": an address of the other family; put it under ` +
				`the other key`},
		{proxy, []string{`[pool]`, `ipv6 = "10.0.0.0/24"`},
			`f.toml:3: pool.ipv6 = "10.0.0.0/24": an address of the other family; put it ` +
				`under the other key`},
		{proxy, []string{`[pool]`, `ipv4 = "10.77.0.1/24"`},
			`f.toml:3: pool.ipv4 = "10.77.0.1/24": bits are set behind the prefix length; ` +
				`write "10.77.0.0/24"`},
		{proxy, []string{`[pool]`, `ipv4 = "10.77.0.0/31"`},
			`f.toml:3: pool.ipv4 = "10.77.0.0/31": too small for the proxy and one client; ` +
				`write a prefix length of 30 or less`},
		{proxy, []string{`[pool]`, `ipv4 = "10.77.0.0/24"`, `delegate_ipv4 = 24`},
			`f.toml:4: pool.delegate_ipv4 = 24: out of range; write a number from 25 to 32`},
		{proxy, []string{`[pool]`, `ipv4 = "10.77.0.0/24"`, `delegate_ipv6 = 64`},
			`f.toml:4: pool.delegate_ipv6 = 64: there is no pool of this family; set the ` +
				`pool too, or remove it`},
		{proxy, []string{`[pool]`, `ipv6 = "fd77::/127"`},
			`f.toml:3: pool.ipv6 = "fd77::/127": too small for the proxy and one client; ` +
				`write a prefix length of 126 or less`},
		{proxy, []string{`[routes]`, `advertise = ["all"]`},
			`f.toml:3: routes.advertise[0] = "all": not an address prefix; `},
		{proxy, []string{`[routes]`, `deny = ["10.0.0.1"]`},
			`f.toml:3: routes.deny[0] = "10.0.0.1": the prefix length is missing; `},
		{proxy, []string{`[routes]`, `client_to_client = 1`},
			`f.toml:3: routes.client_to_client = 1: not true or false; `},
		{proxy, []string{`[nat]`, `masquerade = "x"`},
			`f.toml:3: nat.masquerade = "x": not true or false; `},
		{proxy, []string{`[dns]`, `servers = "10.77.0.1"`},
			`f.toml:3: dns.servers = "10.77.0.1": not a list; `},
		{proxy, []string{`[dns]`, `servers = ["10.77.0.1", "dns.example"]`},
			`f.toml:3: dns.servers[1] = "dns.example": not an address; write for example ` +
				`"10.77.0.1" or "fd77::1"`},
		{proxy, []string{`[dns]`, `servers = ["127.0.0.53"]`},
			`f.toml:3: dns.servers[0] = "127.0.0.53": not an address that others can reach; `},
		{proxy, []string{`[dns]`, `servers = ["fe80::1%eth0"]`},
			`f.toml:3: dns.servers[0] = "fe80::1%eth0": not an address that others can reach; `},
		{proxy, []string{`[dns]`, `servers = ["fd77::1", "::ffff:10.77.0.1", "10.77.0.1"]`},
			`f.toml:3: dns.servers[2] = "10.77.0.1": given twice; remove one`},
		{proxy, []string{`[dns]`, `search = ["corp.example"]`},
			`f.toml:3: dns.search = ["corp.example"]: there are no servers to resolve names; ` +
				`set dns.servers`},
		{proxy, []string{`[dns]`, `servers = ["fd77::1"]`, `search = ["*.example"]`},
			`f.toml:4: dns.search[0] = "*.example": not a domain name; `},
		{proxy, []string{`[dns]`, `servers = ["fd77::1"]`, `domains = ["10.0.0.1"]`},
			`f.toml:4: dns.domains[0] = "10.0.0.1": not a domain name; `},
		{proxy, []string{`[dns]`, `servers = ["fd77::1"]`,
			`domains = ["corp.example", "CORP.example."]`},
			`f.toml:4: dns.domains[1] = "CORP.example.": given twice; remove one`},
		{proxy, []string{`[dns]`, `nat64 = ["64:ff9b::/95"]`},
			`f.toml:3: dns.nat64[0] = "64:ff9b::/95": not a prefix of NAT64; write an IPv6 ` +
				`prefix of length 32, 40, 48, 56, 64 or 96, for example "64:ff9b::/96"`},
		{proxy, []string{`[dns]`, `nat64 = ["10.0.0.0/32"]`},
			`f.toml:3: dns.nat64[0] = "10.0.0.0/32": not a prefix of NAT64; `},
		{proxy, []string{`[forwarding]`, `hop_limit = "keep"`},
			`f.toml:3: forwarding.hop_limit = "keep": not known; write "decrement" or "kernel"`},
		{proxy, []string{`[limits]`, `sessions = 0`},
			`f.toml:3: limits.sessions = 0: out of range; write a number from 1 to 1048576`},
		{proxy, []string{`[limits]`, `sessions_per_user = "8"`},
			`f.toml:3: limits.sessions_per_user = "8": not a number from 1 to 1048576; `},
		{proxy, []string{`[metrics]`, `listen = "localhost:9484"`},
			`f.toml:3: metrics.listen = "localhost:9484": not an address and port; write for ` +
				`example "127.0.0.1:9484", or "" for none`},
		{proxy, []string{`[metrics]`, `listen = "127.0.0.1:0"`},
			`f.toml:3: metrics.listen = "127.0.0.1:0": not an address and port; write for ` +
				`example "127.0.0.1:9484", or "" for none`},
		{proxy, []string{`[metrics]`, `listen = 9484`},
			`f.toml:3: metrics.listen = 9484: not a string in quotes; write a string in quotes`},
		{proxy, []string{`[metrics]`, `address = ":9484"`},
			`f.toml:3: metrics.address: unknown key; remove it`},
		{client, []string{`[metrics]`, `listen = "9484"`},
			`f.toml:3: metrics.listen = "9484": not an address and port; write for example ` +
				`"127.0.0.1:9484", or "" for none`},
		{proxy, []string{`[connect_udp]`, `enabled = 1`},
			`f.toml:3: connect_udp.enabled = 1: not true or false; `},
		{proxy, []string{`[log]`, `pcap = "p"`}, `f.toml:3: log.pcap: unknown key; remove it`},
		{proxy, []string{`[[site]]`, `networks = ["192.0.2.0/24"]`},
			`f.toml:2: site[0].user: is missing; write the name of the user whose client is ` +
				`the gateway`},
		{proxy, []string{`[[site]]`, `user = "a/b"`, `networks = ["192.0.2.0/24"]`},
			`f.toml:3: site[0].user = "a/b": not a name of a user; write the name that was ` +
				`invited`},
		{proxy, []string{`[[site]]`, `user = "branch"`},
			`f.toml:2: site[0].networks: is missing; write the networks behind the gateway, ` +
				`for example networks = ["192.0.2.0/24"]`},
		{proxy, []string{`[[site]]`, `user = "branch"`, `networks = ["192.0.2.1/24"]`},
			`f.toml:4: site[0].networks[0] = "192.0.2.1/24": bits are set behind the prefix ` +
				`length; write "192.0.2.0/24"`},
		{proxy, []string{`[[site]]`, `user = "branch"`, `networks = ["192.0.2.0/24"]`,
			`reach = ["all"]`}, `f.toml:5: site[0].reach[0] = "all": not an address prefix; `},
		{proxy, []string{`[[site]]`, `user = "branch"`, `networks = ["192.0.2.0/24"]`,
			`network = []`}, `f.toml:5: site[0].network: unknown key; did you mean "site[0].networks"?`},
		{proxy, []string{`[site]`, `user = "branch"`},
			`f.toml:2: site: is a list of tables; start each with [[site]] on a line of its own`},

		// Peers.
		{proxy, []string{`[federation]`, `domains = ["a.example:443"]`},
			`f.toml:3: federation.domains[0] = "a.example:443": not a domain name; `},
		{proxy, []string{`[federation]`, `domains = ["a.example", "A.example."]`},
			`f.toml:3: federation.domains[1] = "A.example.": given twice; remove one`},
		{proxy, []string{`[federation]`, `domains = []`},
			`f.toml:3: federation.domains = []: empty; `},
		{proxy, []string{`[federation]`, `dnssec = "on"`},
			`f.toml:3: federation.dnssec = "on": not known; write "off" or "use" or "require"`},
		{proxy, []string{`[federation]`, `nameservers = ["ns"]`},
			`f.toml:3: federation.nameservers[0] = "ns": not the address of a server; `},
		{proxy, []string{`[[peer]]`, `networks = ["192.0.2.0/24"]`, `reach = []`},
			`f.toml:2: peer[0].domain: is missing; write the domain of the peer, `},
		{proxy, []string{`[[peer]]`, `domain = "192.0.2.1"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`}, `f.toml:3: peer[0].domain = "192.0.2.1": not a domain name; `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `reach = []`},
			`f.toml:2: peer[0].networks: is missing; write the peer's networks, `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = []`, `reach = []`},
			`f.toml:4: peer[0].networks = []: empty; write the peer's networks, `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`},
			`f.toml:2: peer[0].reach: is missing; write the networks that the peer may reach, `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`policy = "verified"`},
			`f.toml:6: peer[0].policy = "verified": QUIC has no connection without encryption; ` +
				`write "encrypted"`},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`policy = "permissive"`},
			`f.toml:6: peer[0].policy = "permissive": accepts everybody under any name, and is ` +
				`not there; `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`policy = "all"`},
			`f.toml:6: peer[0].policy = "all": not known; write "trusted" or "encrypted"`},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`delegation = ["dns"]`},
			`f.toml:6: peer[0].delegation[0] = "dns": not known; write "well-known" or "dnssec"`},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`pins = ["47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="]`},
			`f.toml:6: peer[0].pins[0] = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=": not a pin; `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`pins = ["sha256:AAAA"]`},
			`f.toml:6: peer[0].pins[0] = "sha256:AAAA": not a pin; write "sha256:" and the hash of ` +
				`the key, 32 bytes in base64`},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`local = "a b"`}, `f.toml:6: peer[0].local = "a b": not a domain name; `},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`server = "gw.b.example:0"`},
			`f.toml:6: peer[0].server = "gw.b.example:0": not a name or an address, perhaps with a ` +
				`port; write for example "gw.b.example:4433"`},
		{proxy, []string{`[[peer]]`, `domain = "b.example"`, `networks = ["192.0.2.0/24"]`,
			`reach = []`,
			`rate_up = 5`}, `f.toml:6: peer[0].rate_up = 5: has no unit; `},

		// The users.
		{users, []string{`[[user]]`}, `f.toml:2: user[0].name: is missing; write name = "..."`},
		{users, []string{`[[user]]`, `name = "a"`, `[[user]]`, `name = "b/c"`},
			`f.toml:5: user[1].name = "b/c": not a name of a user; `},
		{users, []string{`[[user]]`, `name = "a"`, `[[user]]`, `name = "a"`},
			`f.toml:5: user[1].name = "a": given twice; remove one of the entries`},
		{users, []string{`[[user]]`, `name = "a"`, `token_sha256 = "xyz"`},
			`f.toml:4: user[0].token_sha256 = "xyz": not a SHA-256; write 64 hexadecimal digits`},
		{users, []string{`[[user]]`, `name = "a"`, `certificate_sha256 = "00"`},
			`f.toml:4: user[0].certificate_sha256 = "00": not a SHA-256; `},
		{users, []string{`[[user]]`, `name = "a"`, `addresses = ["10.0.0.0/8"]`},
			`f.toml:4: user[0].addresses[0] = "10.0.0.0/8": not an address; write for ` +
				`example "10.77.0.9"`},
		{users, []string{`[[user]]`, `name = "a"`, `addresses = ["10.0.0.1"]`, `[[user]]`,
			`name = "b"`, `addresses = ["::1", "10.0.0.1"]`},
			`f.toml:7: user[1].addresses[1] = "10.0.0.1": reserved for a as well; remove one`},
		{users, []string{`[[user]]`, `name = "a"`, `sessions = -1`},
			`f.toml:4: user[0].sessions = -1: out of range; write a number from 0 to 1048576`},
		{users, []string{`[[user]]`, `name = "a"`, `created = "now"`},
			`f.toml:4: user[0].created = "now": not a time such as 2026-01-02T15:04:05Z, or ` +
				`a date such as 2026-01-02, without quotes; `},
		{users, []string{`[[user]]`, `name = "a"`, `expires = "2026-12-31"`},
			`f.toml:4: user[0].expires = "2026-12-31": not a time such as ` +
				`2026-01-02T15:04:05Z, or a date such as 2026-01-02, without quotes; `},
		{users, []string{`[[user]]`, `name = "a"`, `routes = ["10.0.0.1/8"]`},
			`f.toml:4: user[0].routes[0] = "10.0.0.1/8": bits are set behind the prefix ` +
				`length; write "10.0.0.0/8"`},
		{users, []string{`[[user]]`, `name = "a"`, `rate_up = 20`},
			`f.toml:4: user[0].rate_up = 20: has no unit; write bits per second with their ` +
				`unit, for example "512kbit"`},
		{users, []string{`[[user]]`, `name = "a"`, `rate_up = true`},
			`f.toml:4: user[0].rate_up = true: not a string in quotes; `},
		{users, []string{`[[user]]`, `name = "a"`, `rate_down = "20MB"`},
			`f.toml:4: user[0].rate_down = "20MB": not a number of kbit, Mbit or Gbit per ` +
				`second; write`},
		{users, []string{`[[user]]`, `name = "a"`, `rate_down = "9kbit"`},
			`f.toml:4: user[0].rate_down = "9kbit": less than 64kbit; write`},
		{users, []string{`[[user]]`, `name = "a"`, `token = "s3cret"`},
			`f.toml:4: user[0].token: unknown key; remove it`},
	} {
		t.Run(test.kind+" "+strings.Join(test.data, " "), func(t *testing.T) {
			data := lines(append([]string{head[test.kind]}, test.data...)...)
			var err error
			switch test.kind {
			case client:
				_, err = ParseClient("f.toml", data)
			case proxy:
				_, err = ParseProxy("f.toml", data)
			case users:
				_, err = ParseUsers("f.toml", data)
			}
			e, ok := errors.AsType[fault.List](err)
			if !ok {
				t.Fatalf("error %v; want %s", err, test.want)
			}
			if len(e) != 1 || !strings.HasPrefix(e.Error(), test.want) {
				t.Errorf("got  %s\nwant %s", e, test.want)
			}
			if strings.Contains(e.Error(), "s3cret") {
				t.Errorf("the message contains the secret: %s", e)
			}
		})
	}
}

func TestMissingMainKey(t *testing.T) {
	_, err := ParseClient("c.toml", nil)
	if want := `c.toml: proxy: is missing; write for example proxy = "vpn.example.org"`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = ParseProxy("p.toml", nil)
	if want := `p.toml: name: is missing; write the name that clients dial, for example name = "vpn.example.org"`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	for _, proxy := range []string{"", "a b", "host:0", "host:99999", "-x", "[::1", "host:port",
		"10.0.0.256", "a/b"} {
		t.Run("refused "+proxy, func(t *testing.T) {
			_, err := ParseClient("c.toml", lines(`proxy = "`+proxy+`"`))
			if err == nil || !strings.HasPrefix(err.Error(),
				`c.toml:1: proxy = "`+proxy+`": not a name`) {
				t.Errorf("proxy %q: %v", proxy, err)
			}
		})
	}
	for _, proxy := range []string{"host", "host:443", "2001:db8::1", "[2001:db8::1]:443",
		"192.0.2.1", "https://h/{target}/{ipproto}"} {
		t.Run("accepted "+proxy, func(t *testing.T) {
			if _, err := ParseClient("c.toml", lines(`proxy = "`+proxy+`"`)); err != nil {
				t.Errorf("proxy %q: %v", proxy, err)
			}
		})
	}
	for _, name := range []string{"", "a:1", "a b"} {
		t.Run("name "+name, func(t *testing.T) {
			_, err := ParseProxy("p.toml", lines(`name = "`+name+`"`))
			if err == nil || !strings.HasPrefix(err.Error(),
				`p.toml:1: name = "`+name+`": not a name`) {
				t.Errorf("name %q: %v", name, err)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := ParseClient("c.toml", lines(`[tun]`, `mtu = 1`, `[log]`, `pcap = 1`, `[nonsense]`))
	e, ok := errors.AsType[fault.List](err)
	if !ok {
		t.Fatal(err)
	}
	var got []string
	for _, p := range e {
		got = append(got, p.Key)
	}
	if diff := cmp.Diff([]string{"proxy", "tun.mtu", "log.pcap", "nonsense"}, got); diff != "" {
		t.Error(diff)
	}
}

// later is an error about a key that is found after parsing.
func later(key string) error {
	return &fault.Error{Kind: fault.Usage, Key: key, Reason: "does not exist", Remedy: "copy it"}
}

func TestLaterProblem(t *testing.T) {
	c, err := ParseClient("c.toml", lines(`proxy = "p"`, `[tls]`, `ca = "/x/ca.crt"`))
	if err != nil {
		t.Fatal(err)
	}
	got := c.Locate(later("tls.ca")).Error()
	if want := `c.toml:3: tls.ca = "/x/ca.crt": does not exist; copy it`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	p, err := ParseProxy("p.toml", lines(`name = "p"`, `[tls]`))
	if err != nil {
		t.Fatal(err)
	}
	got = p.Locate(later("tls.cert")).Error()
	if want := `p.toml:2: tls.cert: does not exist; copy it`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{
		"alice": true, "alice@example.org": true, "a_b-c.d": true, "9": true,
		"": false, ".hidden": false, "-flag": false, "a/b": false, "a b": false, "ä": false,
		"a\n": false, strings.Repeat("a", 65): false,
	} {
		t.Run("name "+name, func(t *testing.T) {
			if got := IsName(name); got != want {
				t.Errorf("IsName(%q) = %v", name, got)
			}
		})
	}
	for host, want := range map[string]bool{
		"vpn.example.org": true, "vpn.example.org.": true, "localhost": true, "10.0.0.1": true,
		"::1": true, "xn--bcher-kva.example": true,
		"": false, ".": false, "a..b": false, "a b": false, "1.2.3": false, "fe80::1%eth0": false,
		"-a": false, "a-": false,
		strings.Repeat("a", 64): false, strings.Repeat("a.", 126) + "a": true,
		strings.Repeat("a.", 127) + "a": false,
	} {
		t.Run("host "+host, func(t *testing.T) {
			if got := IsHost(host); got != want {
				t.Errorf("IsHost(%q) = %v", host, got)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"testdata/client.toml", "testdata/proxy.toml",
		"testdata/users.toml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("[[user]]\n[user.x]\na.b.c = [{d = 1}, [2]]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, err := range []error{second(ParseClient("f", data)), second(ParseProxy("f", data)),
			second(ParseUsers("f", data))} {
			if err == nil {
				continue
			}
			e, ok := errors.AsType[fault.List](err)
			if !ok || len(e) == 0 {
				t.Fatalf("error %v is not a fault.List with an error", err)
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }

// A file with a byte order mark gets a remedy of its own, unlike other invalid
// files.
func TestByteOrderMarks(t *testing.T) {
	for mark, remedy := range map[string]string{
		"\xef\xbb\xbf": "save the file as UTF-8 without one",
		"\xff\xfe":     "save the file as UTF-8, not UTF-16",
		"\xfe\xff":     "save the file as UTF-8, not UTF-16",
	} {
		t.Run(fmt.Sprintf("%x", mark), func(t *testing.T) {
			want := "f.toml:1: starts with a byte order mark; " + remedy
			for _, text := range []string{"", `proxy = "p"`} {
				if _, err := ParseClient("f.toml", []byte(mark+text)); err == nil ||
					err.Error() != want {
					t.Errorf("%q: %v, want %s", mark+text, err, want)
				}
			}
		})
	}
}
