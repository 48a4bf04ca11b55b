package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"masquevpn/client"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
	"masquevpn/routing"
	"masquevpn/tun"
)

// Client is a client's configuration file, NAME.toml. Relative file names are
// joined with the directory of the file.
type Client struct {
	// Config has the keys whose values the client takes as they are. Name, TLS
	// and everything that belongs to a running program are left to the caller.
	client.Config

	CA, Cert, Key          string // names of PEM files
	WebCA                  string // name of the PEM file of Config.Discovery.CA
	CAPEM, CertPEM, KeyPEM string // PEM in the file itself
	ServerName             string // empty: taken from Proxy

	// TokenFile is the name of a file with the token. Empty if Config.Token has
	// it, or if there is none.
	TokenFile string

	UseKillSwitch   bool
	KillSwitchAllow []netip.Prefix // destinations allowed outside the tunnel

	Metrics string // HOST:PORT, TCP; empty: no metrics

	QlogDir string // directory for qlog; empty: none
	KeyLog  string // file for TLS secrets; empty: none
	PCAP    string // file for packets inside the tunnel; empty: none

	doc *document
}

// ParseClient parses and validates the contents of a client's configuration.
// The file name is used in messages and to resolve relative names. The error,
// if any, is a fault.List.
func ParseClient(file string, data []byte) (*Client, error) {
	d, root, err := parse(file, data)
	if err != nil {
		return nil, err
	}
	c := &Client{doc: d}
	c.Proxy = root.string("proxy", "")
	switch {
	case !root.has("proxy"):
		d.add("proxy", "is missing", `write for example proxy = "vpn.example.org"`)
	default:
		if err := CheckProxy(c.Proxy); err != nil {
			root.add("proxy", err.Reason, err.Remedy)
		}
	}
	c.parseDiscovery(root.table("discovery"))
	c.parseFederation(root.table("federation"))

	c.parseTLS(root.table("tls"))

	auth := root.table("auth")
	c.Token, c.TokenFile = auth.secretString("token"), auth.file("token_file", "")
	auth.either("token_file", c.TokenFile, "token", c.Token)

	scope := root.table("scope")
	c.Target, c.IPProto = scope.string("target", "*"), scope.stringOrInt("ipproto", "*")
	for _, key := range []string{"target", "ipproto"} {
		if scope.values[key] == "" {
			scope.add(key, "empty", `write "*" for no preference, or leave it out`)
		}
	}

	tunTable := root.table("tun")
	c.TUN.Name, c.TUN.MTU, c.TUN.Offload = tunTable.device("name", tun.DefaultName),
		tunTable.mtu("mtu"), tunTable.bool("offload", true)

	c.Congestion = root.table("tunnel").congestion("congestion")

	addresses := root.table("addresses")
	c.Static = addresses.addresses("static")
	if len(c.Static) == 0 {
		c.Request = append([]netip.Prefix{},
			addresses.prefixes("request", "0.0.0.0/32", "::/128")...)
	} else if c.Request = addresses.prefixes("request"); len(c.Request) > 0 {
		addresses.add("request", "static addresses are used instead of asking",
			"keep one of request and static")
	}

	routes := root.table("routes")
	c.InstallRoutes = routes.bool("install", true)
	c.HostRoutes = routes.hostRoutes("lan")
	c.Mark = routes.mark("mark")
	// A nil list would accept everything.
	c.Accept = append([]netip.Prefix{}, routes.prefixes("accept", "0.0.0.0/0", "::/0")...)
	c.Exclude = routes.prefixes("exclude")
	c.AdvertiseRoutes = routes.prefixes("advertise")
	c.AssignPeer = routes.addresses("assign")
	if c.HostRoutes == routing.HostNone && len(c.AdvertiseRoutes) > 0 {
		routes.add("lan", "the networks behind this host, routes.advertise, would lead into the tunnel", "remove one of the two")
	}
	for i, p := range c.AssignPeer {
		if !p.IsSingleIP() {
			routes.add(element("assign", i), "not a single address",
				fmt.Sprintf("write %q", netip.PrefixFrom(p.Addr(), p.Addr().BitLen())))
		}
	}

	c.parseDNS(root.table("dns"))

	kill := root.table("kill_switch")
	c.UseKillSwitch = kill.bool("enabled", false)
	c.KillSwitchAllow = kill.prefixes("allow")
	for i, p := range c.KillSwitchAllow {
		if p.Bits() == 0 {
			kill.add(element("allow", i), "allows everything of its family",
				"name the networks, such as that of the LAN, or set enabled = false")
		}
	}

	reconnect := root.table("reconnect")
	c.Reconnect = reconnect.bool("enabled", true)
	c.MaxDelay = reconnect.duration("max_delay", client.DefaultMaxDelay, time.Second)

	c.Metrics = root.table("metrics").tcpAddress("listen", "")

	log := root.table("log")
	c.QlogDir, c.KeyLog, c.PCAP = log.file("qlog_dir", ""), log.file("key_log", ""),
		log.file("pcap", "")

	if err := d.finish(); err != nil {
		return nil, err
	}
	return c, nil
}

// CheckProxy returns an error if s cannot be the proxy of a client: a name,
// HOST:PORT, or a URI template, which package client validates.
func CheckProxy(s string) *discovery.Error {
	if strings.Contains(s, "://") {
		return nil
	}
	_, err := discovery.ParseInput(s)
	e, _ := errors.AsType[*discovery.Error](err)
	return e
}

// parseDiscovery reads [discovery]. It is of no use if the proxy is no domain.
func (c *Client) parseDiscovery(t *table) {
	n, err := discovery.ParseInput(c.Proxy)
	for key := range t.values {
		if err == nil && !n.Discovers() || strings.Contains(c.Proxy, "://") {
			t.add(key, "unused: "+whyNotDiscovered(c.Proxy, n),
				"remove it, or write the name of a domain in proxy")
		}
	}
	c.Discovery.Method = map[string]discovery.Method{"auto": discovery.Auto,
		"dns": discovery.DNSOnly,
		"off": discovery.Addresses}[t.oneOf("mode", "auto", "dns", "off")]
	c.Discovery.DNSSEC = t.dnssec("dnssec")
	c.Discovery.Nameservers = t.nameservers("nameservers")
	c.WebCA = t.file("ca", "")
}

// parseFederation reads [federation]. Package client checks the other keys that
// a gateway of a domain needs.
func (c *Client) parseFederation(t *table) {
	c.Federation.Domain, c.Federation.Peer = t.string("domain", ""), t.string("peer", "")
	for key, value := range map[string]string{"domain": c.Federation.Domain,
		"peer": c.Federation.Peer} {
		if !t.has(key) {
			continue
		}
		if _, ok := federation.ParseDomain(value); !ok {
			t.add(key, "not a domain name", `write for example "example.org"`)
		}
	}
}

// whyNotDiscovered returns why discovery does not apply to a proxy.
func whyNotDiscovered(proxy string, n discovery.Name) string {
	switch {
	case strings.Contains(proxy, "://"):
		return "proxy is a URI template"
	case n.Port() != 0:
		return "proxy has a port"
	case n.Addr().IsValid():
		return "proxy is an address"
	}
	return "proxy is a name of the local network"
}

func (c *Client) parseDNS(dns *table) {
	c.DNS.Off = dns.oneOf("mode", "auto", "off") == "off"
	c.DNS.Hold = !dns.bool("outside", true)
	c.DNS.Servers, c.DNS.Search, c.DNS.Domains = dns.hosts("servers"), dns.domains("search"),
		dns.domainsOrAll("domains")
	for _, key := range []string{"servers", "search", "domains"} {
		if list, ok := dns.values[key].([]any); ok && len(list) == 0 {
			dns.add(key, "empty", `leave it out for what the proxy says, or write mode = "off"`)
		}
	}
}

func (c *Client) parseTLS(tls *table) {
	c.CA, c.Cert, c.Key = tls.file("ca", ""), tls.file("cert", ""), tls.file("key", "")
	c.CAPEM, c.CertPEM, c.KeyPEM = tls.string("ca_pem", ""), tls.string("cert_pem", ""),
		tls.secretString("key_pem")
	c.ServerName = tls.string("server_name", "")
	if c.ServerName != "" && !IsHost(c.ServerName) {
		tls.add("server_name", "not a name or an address", `write for example "vpn.example.org"`)
	}
	tls.either("ca", c.CA, "ca_pem", c.CAPEM)
	tls.either("cert", c.Cert, "cert_pem", c.CertPEM)
	tls.either("key", c.Key, "key_pem", c.KeyPEM)
	cert, key := c.Cert != "" || c.CertPEM != "", c.Key != "" || c.KeyPEM != ""
	if cert && !key {
		tls.add("key", "the key of the certificate is missing", "set tls.key or tls.key_pem")
	}
	if key && !cert {
		tls.add("cert", "the certificate of the key is missing", "set tls.cert or tls.cert_pem")
	}
}

// Secret reports whether the file itself contains a secret, so that only its
// owner may read it.
func (c *Client) Secret() bool {
	return c.Token != "" || c.KeyPEM != ""
}

// Locate returns err with file, line and value if it is a *fault.Error about a
// key of the file, for example a file name that leads nowhere. It returns other
// errors as they are.
func (c *Client) Locate(err error) error { return c.doc.locate(err) }

// hostOf returns the host of HOST:PORT, without brackets.
func hostOf(hostPort string) string {
	host := hostPort[:strings.LastIndexByte(hostPort, ':')]
	return strings.Trim(host, "[]")
}
