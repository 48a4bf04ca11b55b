package config

import (
	"crypto/sha256"
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"

	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
	"masquevpn/proxy"
)

// pinPrefix is the beginning of a pin, the name of the hash.
const pinPrefix = "sha256:"

// parseFederation reads [federation] and [[peer]].
func (p *Proxy) parseFederation(root *table) {
	t := root.table("federation")
	for i, s := range t.strings("domains", nil) {
		domain, ok := federation.ParseDomain(s)
		switch {
		case !ok:
			t.add(element("domains", i), "not a domain name",
				`write the name that peers know, for example "a.example"`)
		case slices.Contains(p.Federation.Domains, domain):
			t.add(element("domains", i), "given twice", "remove one")
		default:
			p.Federation.Domains = append(p.Federation.Domains, domain)
		}
	}
	if t.has("domains") && len(t.strings("domains", nil)) == 0 {
		t.add("domains", "empty", `write the name that peers know, for example ["a.example"]`)
	}
	p.FederationCA = t.file("ca", "")
	p.Federation.DNSSEC = t.dnssec("dnssec")
	p.Nameservers = t.nameservers("nameservers")
	p.Federation.Private = t.bool("private_addresses", false)
	for _, peer := range root.tablesOf("peer") {
		p.Peers = append(p.Peers, parsePeer(peer))
		p.PeerCAs = append(p.PeerCAs, peer.file("ca", ""))
	}
}

// parsePeer reads one [[peer]], except for its ca.
func parsePeer(t *table) proxy.Peer {
	p := proxy.Peer{Domain: t.domain("domain"), Local: t.domain("local"),
		Networks: t.prefixes("networks"), Reach: t.prefixes("reach"),
		Policy: t.policy("policy"), Pins: t.pins("pins"),
		Connect: t.bool("connect", true),
		RateUp:  t.rate("rate_up"), RateDown: t.rate("rate_down"), Expires: t.time("expires")}
	if !t.has("domain") {
		t.add("domain", "is missing", `write the domain of the peer, for example "b.example"`)
	}
	if len(p.Networks) == 0 && (!t.has("networks") || len(t.strings("networks", nil)) == 0) {
		t.addMissing("networks",
			`write the peer's networks, for example networks = ["192.0.2.0/24"]`)
	}
	switch {
	case !t.has("reach"):
		t.add("reach", "is missing",
			`write the networks that the peer may reach, for example reach = ["198.51.100.0/24"]`+
				`, or reach = [] for none`)
	case p.Reach == nil:
		p.Reach = []netip.Prefix{} // no destinations
	}
	for i, way := range t.strings("delegation", []string{"well-known"}) {
		switch way {
		case "well-known":
			p.WellKnown = true
		case "dnssec":
			p.DNSSEC = true
		default:
			t.add(element("delegation", i), "not known", `write "well-known" or "dnssec"`)
		}
	}
	if s := t.string("server", ""); t.has("server") {
		n, err := discovery.ParseInput(s)
		if err != nil {
			t.add("server", "not a name or an address, perhaps with a port",
				`write for example "gw.b.example:4433"`)
		}
		p.Server = n
	}
	return p
}

// addMissing adds the problem that a key is absent or has an empty list.
func (t *table) addMissing(key, remedy string) {
	reason := "is missing"
	if t.has(key) {
		reason = "empty"
	}
	t.add(key, reason, remedy)
}

// domain returns a domain name in lower case without a final dot, "" if the key
// is absent.
func (t *table) domain(key string) string {
	s := t.string(key, "")
	domain, ok := federation.ParseDomain(s)
	if t.has(key) && !ok {
		t.add(key, "not a domain name", `write for example "b.example"`)
	}
	return domain
}

// policy returns the policy of a peer.
func (t *table) policy(key string) federation.Policy {
	switch s := t.string(key, "trusted"); s {
	case "trusted":
	case "encrypted":
		return federation.Encrypted
	case "verified":
		t.add(key, "QUIC has no connection without encryption", `write "encrypted"`)
	case "permissive":
		t.add(key, "accepts everybody under any name, and is not there",
			`write "trusted", or "encrypted" with pins`)
	default:
		t.add(key, "not known", `write "trusted" or "encrypted"`)
	}
	return federation.Trusted
}

// pins returns a list of hashes of keys.
func (t *table) pins(key string) [][sha256.Size]byte {
	var pins [][sha256.Size]byte
	for i, s := range t.strings(key, nil) {
		encoded, ok := strings.CutPrefix(s, pinPrefix)
		pin, err := base64.StdEncoding.DecodeString(encoded)
		if !ok || err != nil || len(pin) != sha256.Size {
			t.add(element(key, i), "not a pin",
				`write "sha256:" and the hash of the key, 32 bytes in base64`)
			continue
		}
		pins = append(pins, [sha256.Size]byte(pin))
	}
	return pins
}
