package client

import (
	"context"
	"fmt"
	"time"

	"github.com/quic-go/quic-go"
)

// Try connects to the proxy as Run does, has the request of the tunnel
// accepted, and closes the connection again. It opens no device, asks for no
// addresses, changes nothing on this host, and needs no privileges; a session
// of the user is there for a moment. Each step that went well is told to step,
// in words. The error, which is an *Error, says which did not.
func CheckProxy(ctx context.Context, cfg Config, step func(string)) error {
	c, err := New(cfg)
	if err != nil {
		return err
	}
	// A tunnel that is up already is gone around, if this process may.
	control := markIfAllowed(c.cfg.Mark)
	c.dialer.control, c.dialer.resolver = control, resolver(control, cfg.Nameservers)
	c.dialer.progress = step
	d, _, err := c.dial(ctx)
	if err != nil {
		return err
	}
	d.close()
	c.dialer.report("the request for %v is accepted", c.target.scope)
	return nil
}

// Proxy returns where the proxy is, as it was configured.
func (c *Client) Proxy() (host, port string) { return c.target.host, c.target.port }

// note tells who wants to know of a step.
func (d *dialer) report(format string, args ...any) {
	if d.progress != nil {
		d.progress(fmt.Sprintf(format, args...))
	}
}

// noteConn tells what is known when the handshake is done.
func (d *dialer) reportConn(conn *quic.Conn) {
	if d.progress == nil {
		return
	}
	d.report("%v answers on UDP, round trip %v", conn.RemoteAddr(),
		conn.ConnectionStats().SmoothedRTT.Round(10*time.Microsecond))
	if chain := conn.ConnectionState().TLS.PeerCertificates; len(chain) > 0 {
		d.report("its certificate is for %s, from %q, and ends on %s", d.target.verify,
			chain[0].Issuer.CommonName, chain[0].NotAfter.Format(time.DateOnly))
	}
}
