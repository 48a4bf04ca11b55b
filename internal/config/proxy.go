package config

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"masquevpn/proxy"
	"masquevpn/tun"
)

// The ACME challenges, in tls.acme.challenge.
const (
	ChallengeTLSALPN = "tls-alpn-01"
	ChallengeHTTP    = "http-01"
)

// Proxy is the proxy's configuration file, proxy.toml. Relative file names are
// joined with the directory of the file.
type Proxy struct {
	// Config has the keys whose values the proxy takes as they are. TLS, Users
	// and everything that belongs to a running program are left to the caller.
	proxy.Config

	Cert, Key string // names of PEM files; empty with ACME
	ACME      *ACME  // nil: the certificate is in files
	ClientCA  string // name of a PEM file; empty: none

	// UsersFile is the name of the users file. Empty if no method needs it.
	UsersFile string

	// FederationCA and PeerCAs, with an element for each of Peers, are names of
	// PEM files. Empty: the default.
	FederationCA string
	PeerCAs      []string
	// Nameservers are asked about the domains of peers instead of the host's.
	Nameservers []netip.AddrPort

	Metrics      string // HOST:PORT, TCP; empty: no metrics
	MetricsNamed bool   // set if the file has the key

	QlogDir string // directory for qlog; empty: none
	KeyLog  string // file for TLS secrets; empty: none

	doc *document
}

// ACME is the table [tls.acme]. Empty Directory, Challenge and Listen select
// defaults.
type ACME struct {
	Email     string
	Directory string // URL
	// CA is the name of a PEM file. Empty: the system's authorities.
	CA        string
	Challenge string // "tls-alpn-01" or "http-01"
	Listen    string // HOST:PORT, TCP; the host may be empty
	Storage   string // directory
}

// ParseProxy parses and validates the contents of a proxy's configuration. The
// file name is used in messages and to resolve relative names. The error, if
// any, is a fault.List.
func ParseProxy(file string, data []byte) (*Proxy, error) {
	d, root, err := parse(file, data)
	if err != nil {
		return nil, err
	}
	p := &Proxy{doc: d}
	p.Name = root.string("name", "")
	if !root.has("name") {
		d.add("name", "is missing",
			`write the name that clients dial, for example name = "vpn.example.org"`)
	} else if !IsHost(p.Name) {
		root.add("name", "not a name or an address",
			`write the name that clients dial, for example "vpn.example.org"`)
	}
	p.Listen = root.strings("listen", []string{"[::]:443"})
	if len(p.Listen) == 0 {
		root.add("listen", "empty", `write for example ["[::]:443"]`)
	}
	for i, s := range p.Listen {
		if !isHostPort(s) || hostOf(s) != "" && !isAddr(hostOf(s)) {
			root.add(element("listen", i), "not an address and port",
				`write for example "[::]:443" or "192.0.2.1:443"`)
		} else if slices.Contains(p.Listen[:i], s) {
			root.add(element("listen", i), "given twice", "remove one")
		}
	}
	p.Template = root.string("template", "")

	p.parseTLS(root.table("tls"))

	p.parseAuth(root.table("auth"))

	tunTable := root.table("tun")
	p.TUN.Name, p.TUN.MTU, p.TUN.Offload = tunTable.device("name", tun.DefaultName),
		tunTable.mtu("mtu"), tunTable.bool("offload", true)

	p.Congestion = root.table("tunnel").congestion("congestion")

	p.parsePool(root.table("pool"), root.has("pool"))

	routes := root.table("routes")
	p.Advertise = routes.prefixes("advertise", "0.0.0.0/0", "::/0")
	p.Deny = routes.prefixes("deny")
	p.ClientToClient = routes.bool("client_to_client", false)

	p.Masquerade = root.table("nat").bool("masquerade", true)

	p.parseDNS(root.table("dns"))

	p.KernelHopLimit = root.table("forwarding").oneOf("hop_limit", "decrement",
		"kernel") == "kernel"

	limits := root.table("limits")
	p.MaxSessions = limits.int("sessions", proxy.DefaultSessions, 1, 1<<20)
	p.MaxSessionsPerUser = limits.int("sessions_per_user", proxy.DefaultSessionsPerUser, 1, 1<<20)
	p.MaxAddressesPerUser = limits.int("addresses_per_user", 0, 1, 1<<20)
	p.MaxUDPFlows = limits.int("udp_flows", proxy.DefaultUDPFlows, 1, 1<<20)
	p.MaxUDPFlowsPerUser = limits.int("udp_flows_per_user", proxy.DefaultUDPFlowsPerUser, 1, 1<<20)
	p.MaxPending = limits.int("pending_connections", 0, 1, 1<<20)
	p.MaxPendingPerAddress = limits.int("pending_connections_per_address", 0, 1, 1<<20)

	metrics := root.table("metrics")
	p.Metrics, p.MetricsNamed = metrics.tcpAddress("listen", "127.0.0.1:9484"),
		metrics.has("listen")
	p.ConnectUDP = root.table("connect_udp").bool("enabled", true)

	log := root.table("log")
	p.QlogDir, p.KeyLog = log.file("qlog_dir", ""), log.file("key_log", "")

	for _, site := range root.tablesOf("site") {
		p.Sites = append(p.Sites, parseSite(site))
	}
	p.parseFederation(root)

	if err := d.finish(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Proxy) parseTLS(tls *table) {
	p.ClientCA = tls.file("client_ca", "")
	_, given := tls.values["acme"].(map[string]any)
	if !given {
		p.Cert, p.Key = tls.file("cert", "proxy.crt"), tls.file("key", "proxy.key")
	}
	t := tls.table("acme")
	for _, key := range []string{"cert", "key"} {
		if s := tls.string(key, ""); given && s != "" {
			tls.add(key, "tls.acme gets the certificate", "keep one of the two")
		}
	}
	a := &ACME{
		Email: t.string("email", ""), Directory: t.string("directory", ""), CA: t.file("ca", ""),
		Challenge: t.oneOf("challenge", ChallengeTLSALPN, ChallengeHTTP),
		Listen:    t.string("listen", ""),
		Storage:   t.file("storage", "/var/lib/masque/acme"),
	}
	agreed := t.bool("agree_tos", false)
	if !given {
		return
	}
	p.ACME = a
	if _, domain, ok := strings.Cut(a.Email, "@"); !ok || !IsHost(domain) ||
		strings.ContainsAny(a.Email, " <>,;:\"") {
		t.add("email", "not an e-mail address",
			"write one where the authority can tell you of problems")
	}
	if !agreed {
		t.add("agree_tos", "the terms of service of the authority have to be agreed to",
			"read them, and write agree_tos = true")
	}
	if u, err := url.Parse(a.Directory); a.Directory != "" &&
		(err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil) {
		t.add("directory", "not the URL of a directory",
			`write for example "https://acme-v02.api.letsencrypt.org/directory"`)
	}
	if a.Listen != "" && (!isHostPort(a.Listen) ||
		hostOf(a.Listen) != "" && !isAddr(hostOf(a.Listen))) {
		t.add("listen", "not an address and port", `write for example ":443" or "192.0.2.1:443"`)
	}
	if a.Storage == "" {
		t.add("storage", "empty", "write the name of a folder")
	}
}

func parseSite(t *table) proxy.Site {
	s := proxy.Site{User: t.string("user", ""), Networks: t.prefixes("networks"),
		Peer: t.prefixes("peer"), Reach: t.prefixes("reach")}
	if !t.has("user") {
		t.add("user", "is missing", `write the name of the user whose client is the gateway`)
	} else if !IsName(s.User) {
		t.add("user", "not a name of a user", "write the name that was invited")
	}
	if len(s.Networks) == 0 && !t.has("networks") {
		t.add("networks", "is missing",
			`write the networks behind the gateway, for example networks = ["192.0.2.0/24"]`)
	}
	if t.has("reach") && s.Reach == nil {
		s.Reach = []netip.Prefix{} // no destinations
	}
	return s
}

func (p *Proxy) parseAuth(auth *table) {
	methods := []string{proxy.MethodToken}
	if p.ClientCA != "" {
		methods = []string{proxy.MethodMTLS, proxy.MethodToken}
	}
	p.Methods = auth.strings("methods", methods)
	if len(p.Methods) == 0 {
		auth.add("methods", "empty", `write ["mtls", "token"], or ["none"] to let everyone in`)
	}
	for i, m := range p.Methods {
		key := element("methods", i)
		switch {
		case m != proxy.MethodMTLS && m != proxy.MethodToken && m != proxy.MethodNone:
			auth.add(key, "not known",
				"write "+alternatives([]string{proxy.MethodMTLS, proxy.MethodToken,
					proxy.MethodNone}))
		case slices.Contains(p.Methods[:i], m):
			auth.add(key, "given twice", "remove one")
		case m == proxy.MethodNone && len(p.Methods) > 1:
			auth.add(key, "lets everyone in, whatever the other methods are",
				`write it alone, or remove it`)
		case m == proxy.MethodMTLS && p.ClientCA == "":
			auth.add(key, "needs the CA of the clients' certificates",
				`set tls.client_ca, or remove "mtls"`)
		}
	}
	p.UsersFile = auth.file("users", "users.toml")
	if p.UsersFile == "" {
		auth.add("users", "empty", "write the name of the users file")
	}
	if slices.Contains(p.Methods, proxy.MethodNone) {
		p.UsersFile = ""
	}
}

func (p *Proxy) parseDNS(dns *table) {
	p.DNS.Servers = dns.hosts("servers")
	p.DNS.Domains, p.DNS.Search = dns.domains("domains"), dns.domains("search")
	for _, key := range []string{"domains", "search"} {
		if len(dns.strings(key, nil)) > 0 && len(dns.strings("servers", nil)) == 0 {
			dns.add(key, "there are no servers to resolve names", "set dns.servers")
		}
	}
	p.DNS.NAT64 = dns.prefixes("nat64")
	for i, n := range p.DNS.NAT64 {
		if n.Addr().Is4() || !slices.Contains([]int{32, 40, 48, 56, 64, 96}, n.Bits()) {
			dns.add(element("nat64", i), "not a prefix of NAT64",
				`write an IPv6 prefix of length 32, 40, 48, 56, 64 or 96, for example "64:ff9b::/96"`)
		}
	}
}

func (p *Proxy) parsePool(pool *table, given bool) {
	v4, v6 := "10.77.0.0/24", "fd77::/64"
	if given { // a given pool has no default for the other family
		v4, v6 = "", ""
	}
	p.Pool4, p.Pool6 = pool.prefix("ipv4", v4, true), pool.prefix("ipv6", v6, false)
	if given && pool.string("ipv4", "") == "" && pool.string("ipv6", "") == "" {
		pool.doc.add("pool", "empty", `write ipv4 = "10.77.0.0/24", ipv6 = "fd77::/64" or both`)
	}
	if p.Pool4.IsValid() && p.Pool4.Bits() > 30 {
		pool.add("ipv4", "too small for the proxy and one client",
			"write a prefix length of 30 or less")
	}
	if p.Pool6.IsValid() && p.Pool6.Bits() > 126 {
		pool.add("ipv6", "too small for the proxy and one client",
			"write a prefix length of 126 or less")
	}
	p.Delegate4, p.Delegate6 = pool.lengthWithin("delegate_ipv4", p.Pool4),
		pool.lengthWithin("delegate_ipv6", p.Pool6)
	p.Hold = pool.duration("hold", proxy.DefaultHold, time.Second)
}

// Locate returns err with file, line and value if it is a *fault.Error about a
// key of the file, for example a file name that leads nowhere. It returns other
// errors as they are.
func (p *Proxy) Locate(err error) error { return p.doc.locate(err) }

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
