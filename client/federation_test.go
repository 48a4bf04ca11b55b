package client

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/federation"
)

// peerConfig is the configuration of a gateway of a.example.
func peerConfig(proxy string) Config {
	in := newInstallation()
	return Config{Name: "test", Proxy: proxy,
		TLS: &tls.Config{RootCAs: in.Roots, ServerName: proxyName,
			Certificates: []tls.Certificate{in.Proxy}},
		AdvertiseRoutes: prefixes("10.1.0.0/24"), Accept: prefixes("10.2.0.0/24"),
		Federation: Federation{Domain: "A.example.", Peer: "b.example"}}
}

// A gateway of a domain needs a certificate and routes, and has no token.
func TestFederationConfig(t *testing.T) {
	for _, tt := range []struct {
		name, key string // key of the error; "" for none
		change    func(*Config)
	}{
		{"complete", "", func(*Config) {}},
		{"the peer is the name of the proxy", "", func(c *Config) {
			c.Proxy, c.Federation.Peer = "b.example", ""
		}},
		{"no certificate", "federation.domain", func(c *Config) { c.TLS.Certificates = nil }},
		{"a peer without a domain", "federation.domain", func(c *Config) {
			c.Federation.Domain = ""
		}},
		{"a domain that is none", "federation.domain", func(c *Config) {
			c.Federation.Domain = "a.example:443"
		}},
		{"a peer that is an address", "federation.peer", func(c *Config) {
			c.Federation.Peer = ""
		}},
		{"a token", "auth.token", func(c *Config) { c.Token = "secret" }},
		{"no networks", "routes.advertise", func(c *Config) { c.AdvertiseRoutes = nil }},
		{"any routes", "routes.accept", func(c *Config) { c.Accept = nil }},
		{"all routes", "routes.accept", func(c *Config) { c.Accept = prefixes("0.0.0.0/0") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := peerConfig("192.0.2.1")
			tt.change(&c)
			_, err := New(c)
			var e *Error
			if errors.As(err, &e); tt.key == "" && err != nil ||
				tt.key != "" && (e == nil || e.Key != tt.key) {
				t.Errorf("got %v, want an error about %q", err, tt.key)
			}
		})
	}
}

// The request of a gateway has the two domains, and each refusal of the peer
// has a text of its own.
func TestFederationRequest(t *testing.T) {
	for _, tt := range []struct {
		status int
		cause  cause
		want   string
	}{
		{401, causeCredentials, `the peer b.example does not accept our identity: it has to have [[peer]] domain = "a.example"`},
		{403, causeForbidden, "the peer b.example does not link with a.example"},
		{421, causeAnswer, "the server 127.0.0.1 does not serve b.example"},
		{503, causeBusy, "the proxy takes no more sessions now"},
	} {
		t.Run(http.StatusText(tt.status), func(t *testing.T) {
			headers := make(chan http.Header, 1)
			f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
				headers <- r.Header
				w.WriteHeader(tt.status)
			})
			c, err := New(peerConfig(f.addr))
			if err != nil {
				t.Fatal(err)
			}
			c.dialer.setControl(nil, c.cfg.resolverConfig())
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, _, err = c.dial(ctx)
			var e *Error
			if !errors.As(err, &e) || attemptOf(e).cause != tt.cause ||
				!strings.Contains(e.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			want := federation.Pair{From: "a.example", To: "b.example"}
			if got, err := federation.ParseFields(<-headers); err != nil || got != want {
				t.Errorf("the request has %+v, %v, want %+v", got, err, want)
			}
		})
	}
}

// A peer leads nobody into private networks, as a domain may do with its own
// clients.
func TestFederationQuery(t *testing.T) {
	c, err := New(peerConfig("b.example"))
	if err != nil {
		t.Fatal(err)
	}
	if q := c.target.query; q.Private || !q.Name.Discovers() || q.Name.Addr() != (netip.Addr{}) {
		t.Errorf("got the query %+v", q)
	}
}
