package client

import (
	"context"
	"fmt"
	"time"

	"masquevpn/internal/discovery"
	"masquevpn/routing"
)

// CheckProxy connects to the proxy like Run, sends the request for the tunnel,
// and closes the connection again. It opens no device, requests no addresses,
// does not change this host, and needs no privileges. The proxy counts a
// session for that moment. CheckProxy calls step with a text after each
// successful step. Its errors are of type *Error.
func CheckProxy(ctx context.Context, cfg Config, step func(string)) error {
	c, err := New(cfg)
	if err != nil {
		return err
	}
	// With the mark, packets bypass a tunnel that is already up.
	control := routing.MarkSocketIfAllowed(c.cfg.Mark)
	c.dialer.setControl(control, c.cfg.resolverConfig())
	c.dialer.progress = step
	d, _, err := c.dial(ctx)
	if err != nil {
		return err
	}
	d.close()
	c.dialer.report("the request for %v is accepted", c.target.scope)
	return nil
}

// ResolveProxy returns how the proxy of cfg is reached. It asks DNS and, if the
// proxy is that of a domain, the domain's web server, and sends nothing to the
// proxy. Its errors are of type *Error.
func ResolveProxy(ctx context.Context, cfg Config) (*discovery.Result, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	c.dialer.setControl(routing.MarkSocketIfAllowed(c.cfg.Mark), c.cfg.resolverConfig())
	r, err := c.dialer.resolver.Resolve(ctx, c.target.query)
	return c.dialer.resolved(resolution{r, err})
}

// Proxy returns the configured host and port of the proxy.
func (c *Client) Proxy() (host, port string) { return c.target.host, c.target.port }

// report passes the text of a step to CheckProxy's caller, if there is one.
func (d *dialer) report(format string, args ...any) {
	if d.progress != nil {
		d.progress(fmt.Sprintf(format, args...))
	}
}

// reportConn reports the round-trip time and the certificate of a new
// connection.
func (d *dialer) reportConn(c *dialed) {
	if d.progress == nil {
		return
	}
	d.report("%v answers on UDP, round trip %v", c.remote,
		c.conn.ConnectionStats().SmoothedRTT.Round(10*time.Microsecond))
	if chain := c.conn.ConnectionState().TLS.PeerCertificates; len(chain) > 0 {
		d.report("its certificate is for %s, from %q, and ends on %s", c.name,
			chain[0].Issuer.CommonName, chain[0].NotAfter.Format(time.DateOnly))
	}
}
