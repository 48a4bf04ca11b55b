package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
)

const (
	idleTimeout = 30 * time.Second
	// keepAlive also bounds how long a restarted proxy goes unnoticed by an idle client.
	keepAlive        = 10 * time.Second
	handshakeTimeout = 5 * time.Second
	resolveTimeout   = 5 * time.Second
	answerTimeout    = 10 * time.Second
	// attemptDelay is the time after which the next address of the proxy is tried as well (RFC 8305 section 5).
	attemptDelay = 250 * time.Millisecond
	// initialPacketSize leaves room for an IPv6 packet of 1280 bytes in a datagram and fits, with its headers, a path of 1400 bytes.
	initialPacketSize = 1350
)

type controlFunc = func(network, address string, c syscall.RawConn) error

// dialed is an established connection to the proxy with the request stream that it accepted.
type dialed struct {
	transport *quic.Transport
	conn      *quic.Conn
	stream    *http3.RequestStream
}

// close ends the connection and frees its socket.
func (d *dialed) close() {
	_ = d.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
	_ = d.transport.Close()
	_ = d.transport.Conn.Close()
}

// dial connects to the proxy and has the request accepted.
func (c *Client) dial(ctx context.Context) (*dialed, error) {
	addrs, err := c.resolve(ctx)
	if err != nil {
		return nil, err
	}
	d, err := c.race(ctx, addrs)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, d.close) // unblocks the exchange
	err = c.request(ctx, d)
	if !stop() {
		err = ctx.Err() // and not that the connection was closed for it
	}
	if err != nil {
		err = classify(err, d.conn, c.to)
		d.close()
		return nil, err
	}
	return d, nil
}

// resolve finds the addresses of the proxy. When DNS does not answer, those of the last time serve.
func (c *Client) resolve(ctx context.Context) ([]netip.AddrPort, error) {
	port, err := strconv.ParseUint(c.to.port, 10, 16)
	if err != nil || port == 0 {
		return nil, usage("proxy", "%q is not a port", c.to.port)
	}
	if a, err := netip.ParseAddr(c.to.host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), uint16(port))}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, err := c.resolver.LookupNetIP(ctx, "ip", c.to.host)
	if err != nil {
		if len(c.lastAddrs) > 0 {
			c.cfg.Logger.Info("the proxy's name could not be resolved, trying its last addresses", "error", err)
			return c.lastAddrs, nil
		}
		return nil, &Error{
			Kind: KindUnreachable, Err: err, Reason: fmt.Sprintf("the name %s of the proxy cannot be resolved (%v)", c.to.host, dnsReason(err)),
			Remedy: "check its spelling in the configuration, and this host's DNS",
		}
	}
	c.lastAddrs = interleave(found, uint16(port))
	return c.lastAddrs, nil
}

func dnsReason(err error) string {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.Err
	}
	return err.Error()
}

// interleave orders addresses for attempts: IPv6 first, then by turns (RFC 8305 section 4).
func interleave(addrs []netip.Addr, port uint16) []netip.AddrPort {
	var by [2][]netip.Addr
	for _, a := range addrs {
		a = a.Unmap()
		if a.Is6() {
			by[0] = append(by[0], a)
		} else {
			by[1] = append(by[1], a)
		}
	}
	var out []netip.AddrPort
	for i := range max(len(by[0]), len(by[1])) {
		for _, family := range by {
			if i < len(family) {
				out = append(out, netip.AddrPortFrom(family[i], port))
			}
		}
	}
	return out
}

// race dials addrs, each a moment after the one before, and returns the first connection (RFC 8305).
func (c *Client) race(ctx context.Context, addrs []netip.AddrPort) (*dialed, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		d   *dialed
		err error
	}
	results := make(chan result)
	for i, addr := range addrs {
		go func() {
			select {
			case <-time.After(time.Duration(i) * attemptDelay):
			case <-ctx.Done():
				results <- result{nil, ctx.Err()}
				return
			}
			d, err := c.dialAddr(ctx, addr)
			results <- result{d, err}
		}()
	}
	var won *dialed
	var failed error
	for range addrs {
		r := <-results
		switch {
		case r.err == nil && won == nil:
			won = r.d
			cancel()
		case r.err == nil:
			r.d.close()
		case failed == nil || worse(r.err, failed):
			failed = r.err
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, failed
}

// worse reports whether a says more about the failure of an attempt than b: a proxy that answered beats silence.
func worse(a, b error) bool {
	var x, y *Error
	return errors.As(a, &x) && (!errors.As(b, &y) || y.Kind == KindUnreachable && x.Kind != KindUnreachable)
}

func (c *Client) dialAddr(ctx context.Context, addr netip.AddrPort) (*dialed, error) {
	network := "udp4"
	if addr.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: c.control}
	socket, err := lc.ListenPacket(ctx, network, ":0")
	if err != nil {
		return nil, classify(fmt.Errorf("opening a UDP socket: %w", err), nil, c.to)
	}
	t := &quic.Transport{Conn: socket}
	conn, err := t.Dial(ctx, net.UDPAddrFromAddrPort(addr), c.tls, &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: handshakeTimeout,
		MaxIdleTimeout:       idleTimeout,
		KeepAlivePeriod:      keepAlive,
		InitialPacketSize:    initialPacketSize,
	})
	if err != nil {
		_ = t.Close()
		_ = socket.Close()
		return nil, classify(err, nil, c.to)
	}
	return &dialed{transport: t, conn: conn}, nil
}

// request sends the Extended CONNECT request on d and checks the answer (RFC 9484 section 4).
func (c *Client) request(ctx context.Context, d *dialed) error {
	h3 := (&http3.Transport{EnableDatagrams: true, DisableCompression: true}).NewClientConn(d.conn)
	select {
	case <-h3.ReceivedSettings():
	case <-h3.Context().Done():
		return context.Cause(h3.Context())
	case <-ctx.Done():
		return ctx.Err()
	}
	switch s := h3.Settings(); {
	case !s.EnableExtendedConnect:
		return &Error{Kind: KindUsage, Reason: c.to.host + " does not offer Extended CONNECT, so it is no proxy for IP", Remedy: "check the name and the port of the proxy"}
	case !s.EnableDatagrams:
		return &Error{Kind: KindUsage, Reason: c.to.host + " does not offer HTTP Datagrams, so it is no proxy for IP", Remedy: "check the name and the port of the proxy"}
	}
	u, err := c.to.template.Expand(c.to.scope)
	if err != nil {
		return usage("proxy", "%v", err)
	}
	req := (&http.Request{
		Method: http.MethodConnect,
		Proto:  connectip.Protocol,
		URL:    u,
		Host:   u.Host,
		Header: http.Header{
			http3.CapsuleProtocolHeader: {"?1"},
			connectip.InstanceHeader:    {c.instance},
			"User-Agent":                {"masque-client"},
		},
	}).WithContext(ctx)
	if c.cfg.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.cfg.Token)
	}
	if d.stream, err = h3.OpenRequestStream(ctx); err != nil {
		return err
	}
	if err := d.stream.SendRequestHeader(req); err != nil {
		return err
	}
	rsp, err := d.stream.ReadResponse()
	if err != nil {
		return err
	}
	return checkResponse(rsp)
}

// checkResponse returns nil for a success (RFC 9484 section 4.5) that is well-formed (RFC 9297 section 3.2).
func checkResponse(rsp *http.Response) error {
	status := rsp.StatusCode
	detail := ""
	if s := rsp.Header.Get("Proxy-Status"); s != "" {
		detail = fmt.Sprintf(" (%.200q)", s)
	}
	switch {
	case status == http.StatusNoContent || status == http.StatusResetContent || status == http.StatusPartialContent:
		return fmt.Errorf("the proxy's answer %d is not one to a request for a tunnel", status)
	case status >= 200 && status < 300:
		for _, field := range []string{"Content-Length", "Content-Type"} {
			if _, ok := rsp.Header[field]; ok {
				return fmt.Errorf("the proxy's answer %d has a %s, which a tunnel cannot have", status, field)
			}
		}
		return nil
	case status == http.StatusUnauthorized || status == http.StatusProxyAuthRequired:
		return &Error{Kind: KindCredentials, Reason: "the proxy does not accept the credentials", Remedy: "ask its operator for a new invitation"}
	case status == http.StatusForbidden:
		return &Error{Kind: KindRefused, Reason: "the proxy does not allow this request" + detail, Remedy: "check [scope], or ask its operator"}
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable:
		return &Error{Kind: KindFailure, Reason: fmt.Sprintf("the proxy takes no more sessions now, status %d%s", status, detail)}
	case status >= 500 || status == http.StatusRequestTimeout: // the latter when SETTINGS of this client got lost
		return &Error{Kind: KindFailure, Reason: fmt.Sprintf("the proxy failed, status %d%s", status, detail)}
	default:
		return &Error{Kind: KindUsage, Reason: fmt.Sprintf("the proxy answered with status %d%s", status, detail), Remedy: "check the URI template in proxy"}
	}
}

// tlsConfig is what the proxy is dialed with.
func (c *Config) tlsConfig(to target) *tls.Config {
	t := &tls.Config{}
	if c.TLS != nil {
		t = c.TLS.Clone()
	}
	t.ServerName = to.verify
	t.NextProtos = []string{http3.NextProtoH3}
	t.MinVersion = tls.VersionTLS13
	if len(t.Certificates) > 0 && t.GetClientCertificate == nil {
		// Without this, a certificate of an authority that the proxy does not name is silently left out, and the proxy's
		// refusal says nothing of it.
		cert := t.Certificates[0]
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return t
}
