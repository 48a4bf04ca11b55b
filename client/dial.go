package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/qlogwriter"

	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/nat64"
	"masquevpn/internal/udpconn"
	"masquevpn/routing"
)

const (
	idleTimeout      = 30 * time.Second
	handshakeTimeout = 5 * time.Second
	resolveTimeout   = 5 * time.Second

	// answerTimeout limits the wait for SETTINGS and the answer to the request.
	answerTimeout = 10 * time.Second

	// keepAlive is the time after which an idle connection is used. In a tunnel
	// this is a packet that the proxy answers, so that the client notices a
	// restarted proxy.
	keepAlive = 10 * time.Second

	// translatorTimeout limits the discovery of the network's NAT64 prefixes,
	// of which the first maxTranslators are used.
	translatorTimeout = 2 * time.Second
	maxTranslators    = 2

	// attemptDelay is the time between the starts of attempts with two
	// addresses of the proxy (RFC 8305 section 5).
	attemptDelay = 250 * time.Millisecond

	// initialPacketSize is the size of the first QUIC packets, in bytes. It
	// leaves room for an IPv6 packet of 1280 bytes in a datagram, and the
	// packet with its headers fits a path of 1400 bytes. smallPacketSize fits
	// every path that supports QUIC (RFC 9000 section 14).
	initialPacketSize = 1350
	smallPacketSize   = 1200

	// maxInterim limits the responses to a request. All but the last are
	// informational (RFC 9110 section 15.2).
	maxInterim = 8
)

// controlFunc prepares a socket, see net.Dialer.Control.
type controlFunc = func(network, address string, c syscall.RawConn) error

// dialer connects to one proxy. It is used by one goroutine at a time.
type dialer struct {
	target     target
	tls        *tls.Config
	token      string
	congestion congestion.Mode
	control    controlFunc // may be nil
	resolver   *net.Resolver
	logger     *slog.Logger

	// tracer is the Tracer of quic.Config. It may be nil.
	tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace

	// dropped is called with the number of packets that the kernel dropped
	// because a socket was full. It may be nil.
	dropped func(packets int)

	// upstream is Resolver.Upstream. It may be nil.
	upstream func() (servers []netip.AddrPort, applied bool)

	// progress is called with a text after each successful step. It may be nil.
	progress func(string)

	// hasRoute reports whether this host has a route to an address.
	hasRoute func(netip.Addr) bool

	lastAddrs []netip.AddrPort // addresses of the proxy
	outer     outerSockets
	timeouts  int // attempts without an answer
}

func newDialer(to target, config *tls.Config, token string, control controlFunc,
	logger *slog.Logger) *dialer {
	return &dialer{target: to, tls: to.tlsConfig(config), token: token, control: control,
		resolver: resolver(control, nil), logger: logger, hasRoute: hasRoute}
}

// hasRoute reports whether the kernel has a route to an address outside
// tunnels.
func hasRoute(to netip.Addr) bool {
	_, err := routing.LookUpNextHop(to, routing.DefaultMark)
	return err == nil
}

// dialed is an established connection to the proxy.
type dialed struct {
	transport     *quic.Transport // transport of the current path
	socket        *udpconn.Conn   // socket of transport
	path          *quic.Path      // current path; nil before the first migration
	closePrevious func()          // closes the path before the last migration

	// conn is the connection. Its LocalAddr and RemoteAddr must not be called,
	// because quic-go changes them without a lock when the connection migrates.
	conn   *quic.Conn
	remote netip.AddrPort
}

// close closes the connection and its sockets.
func (d *dialed) close() { d.closeWith(http3.ErrCodeNoError) }

// closeWith is close with an error code for the proxy.
func (d *dialed) closeWith(code http3.ErrCode) {
	_ = d.conn.CloseWithError(quic.ApplicationErrorCode(code), "")
	d.closePrevious()
	_ = d.transport.Close()
	_ = d.socket.Close()
}

// dial connects to the proxy and calls request, which makes the first request.
// SETTINGS and request have answerTimeout. An error of request closes the
// connection.
func (d *dialer) dial(ctx context.Context,
	request func(context.Context, *http3.ClientConn) error) (*dialed, error) {
	addrs, err := d.resolve(ctx)
	if err != nil {
		return nil, err
	}
	c, err := d.race(ctx, addrs)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		d.timeouts++
	}
	if err != nil {
		return nil, err
	}
	d.reportConn(c.conn)
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, c.close) // unblocks request
	h3, err := d.handshake(ctx, c.conn)
	if err == nil {
		d.report("it is a MASQUE proxy: it offers Extended CONNECT and HTTP Datagrams")
		err = request(ctx, h3)
	}
	if !stop() {
		err = ctx.Err() // not the error of the closed connection
	}
	if err != nil {
		err = classify(err, c.conn, d.target)
		c.close()
		return nil, err
	}
	return c, nil
}

// resolve returns the addresses of the proxy. If its name cannot be resolved,
// it returns the last known addresses.
func (d *dialer) resolve(ctx context.Context) ([]netip.AddrPort, error) {
	port, err := strconv.ParseUint(d.target.port, 10, 16)
	if err != nil || port == 0 {
		return nil, usage("proxy", "%q is not a port", d.target.port)
	}
	if a, err := netip.ParseAddr(d.target.host); err == nil {
		d.lastAddrs = interleave(d.translate(ctx, []netip.Addr{a.Unmap()}), uint16(port))
		return d.lastAddrs, nil
	}
	lookup, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, err := d.lookup(lookup, "ip", d.target.host)
	if err != nil {
		if len(d.lastAddrs) > 0 {
			d.logger.Info("the proxy's name could not be resolved, trying its last addresses",
				"error", err)
			return d.lastAddrs, nil
		}
		return nil, fail(causeName, err,
			fmt.Sprintf("the name %s of the proxy cannot be resolved (%v)", d.target.host,
				dnsReason(err)),
			"check its spelling in the configuration, and this host's DNS")
	}
	d.lastAddrs = interleave(d.translate(ctx, found), uint16(port))
	d.report("the name %s leads to %v", d.target.host, d.lastAddrs)
	return d.lastAddrs, nil
}

// translate returns addrs. If this host has no route to any of them, it appends
// the addresses that the NAT64 of the host's network translates to the IPv4
// addresses (RFC 7050, RFC 6052). Forged DNS answers do no harm here, because
// the peer has to prove that it is the proxy.
func (d *dialer) translate(ctx context.Context, addrs []netip.Addr) []netip.Addr {
	ipv4 := slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Unmap().Is4() })
	if !ipv4 || slices.ContainsFunc(addrs, func(a netip.Addr) bool {
		return d.hasRoute(a.Unmap())
	}) {
		return addrs
	}
	ctx, cancel := context.WithTimeout(ctx, translatorTimeout)
	defer cancel()
	answers, err := d.lookup(ctx, "ip6", nat64.Name)
	if err != nil {
		d.logger.Debug("no NAT64 is known in the network of this host",
			"error", err)
		return addrs
	}
	prefixes := nat64.Prefixes(answers)
	prefixes = prefixes[:min(len(prefixes), maxTranslators)]
	out := slices.Clone(addrs)
	for _, p := range prefixes {
		for _, a := range addrs {
			if translated, ok := nat64.Embed(p, a.Unmap()); ok {
				out = append(out, translated)
			}
		}
	}
	if len(out) > len(addrs) {
		d.logger.Info("this host has no route to the proxy's IPv4 address, trying the network's NAT64", "prefix", prefixes)
		d.report("this host has no route to the proxy's IPv4 address; its network has a NAT64 with %v", prefixes)
	}
	return out
}

// dnsReason returns the text of a DNS error without the name and the server.
func dnsReason(err error) string {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.Err
	}
	return err.Error()
}

// interleave orders addresses for attempts: IPv6 and IPv4 alternate, beginning
// with IPv6 (RFC 8305 section 4).
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

// race dials addrs with attemptDelay between two starts, and returns the first
// connection (RFC 8305 section 5).
func (d *dialer) race(ctx context.Context, addrs []netip.AddrPort) (*dialed, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		c   *dialed
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
			c, err := d.dialAddr(ctx, addr)
			results <- result{c, err}
		}()
	}
	var won *dialed
	var failed error
	for range addrs {
		r := <-results
		switch {
		case r.err == nil && won == nil:
			won = r.c
			cancel()
		case r.err == nil:
			r.c.close()
		case failed == nil || worse(r.err, failed):
			failed = r.err
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, failed
}

// worse reports whether a explains a failed attempt better than b: the error of
// a proxy that answered is better than a timeout, and a timeout is better than
// an address to which this host cannot send.
func worse(a, b error) bool {
	var x, y *Error
	if !errors.As(a, &x) || !errors.As(b, &y) || y.Kind != KindUnreachable {
		return errors.As(a, &x) && !errors.As(b, &y)
	}
	return x.Kind != KindUnreachable ||
		errors.As(b, new(*unsentError)) && !errors.As(a, new(*unsentError))
}

// unsentError means that packets do not leave this host.
type unsentError struct{ reason error }

func (e *unsentError) Error() string {
	return fmt.Sprintf("packets to the proxy do not leave this host (%v)", e.reason)
}

// dialAddr connects to one address of the proxy.
func (d *dialer) dialAddr(ctx context.Context, addr netip.AddrPort) (*dialed, error) {
	t, udp, err := d.open(ctx, addr)
	if err != nil {
		return nil, classify(err, nil, d.target)
	}
	config := &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: handshakeTimeout,
		MaxIdleTimeout:       idleTimeout,
		KeepAlivePeriod:      keepAlive,
		InitialPacketSize:    d.packetSize(),
		Tracer:               d.tracer,
	}
	d.congestion.Apply(config)
	conn, err := t.Dial(ctx, net.UDPAddrFromAddrPort(addr), d.tls, config)
	if err != nil {
		unsent := udp.Unsent()
		_ = t.Close()
		_ = udp.Close()
		if unsent != nil {
			unsent := &unsentError{unsent}
			return nil, fail(causeNetwork, unsent, unsent.Error(),
				"check this host's network and firewall")
		}
		return nil, withAddress(classify(err, nil, d.target), addr)
	}
	udp.IgnoreSendErrors()
	return &dialed{transport: t, socket: udp, closePrevious: func() {}, conn: conn,
		remote: addr}, nil
}

// open opens a socket for packets to addr, and a transport that uses it.
func (d *dialer) open(ctx context.Context, addr netip.AddrPort) (*quic.Transport, *udpconn.Conn,
	error) {
	network := "udp4"
	if addr.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: d.control}
	socket, err := lc.ListenPacket(ctx, network, ":0")
	if err != nil {
		return nil, nil, fmt.Errorf("opening a UDP socket: %w", err)
	}
	udp, err := udpconn.New(socket.(*net.UDPConn), d.logger, d.dropped)
	if err != nil {
		_ = socket.Close()
		return nil, nil, fmt.Errorf("preparing a UDP socket: %w", err)
	}
	if d.tls.KeyLogWriter != nil {
		if err := udp.DisableOffload(); err != nil {
			_ = udp.Close()
			return nil, nil, fmt.Errorf("preparing a UDP socket: %w", err)
		}
	}
	d.outer.add(udp.LocalAddr(), addr)
	return &quic.Transport{Conn: udp}, udp, nil
}

// packetSize returns the size of the first QUIC packets, in bytes. If an
// attempt gets no answer, the MTU of the path may be too small. Then two
// attempts use small packets, because the proxy needs one of them to notice it.
func (d *dialer) packetSize() uint16 {
	if d.timeouts%3 == 0 {
		return initialPacketSize
	}
	return smallPacketSize
}

// handshake starts HTTP/3 on conn and checks that the peer supports Extended
// CONNECT and HTTP Datagrams (RFC 9220, RFC 9297 section 2.1.1).
func (d *dialer) handshake(ctx context.Context, conn *quic.Conn) (*http3.ClientConn, error) {
	h3 := (&http3.Transport{EnableDatagrams: true, DisableCompression: true}).NewClientConn(conn)
	select {
	case <-h3.ReceivedSettings():
	case <-h3.Context().Done():
		return nil, context.Cause(h3.Context())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	switch s := h3.Settings(); {
	case !s.EnableExtendedConnect:
		return nil, fail(causeNoProxy, nil,
			d.target.host+" does not offer Extended CONNECT, so it is no MASQUE proxy",
			"check the name and the port of the proxy")
	case !s.EnableDatagrams:
		return nil, fail(causeNoProxy, nil,
			d.target.host+" does not offer HTTP Datagrams, so it is no MASQUE proxy",
			"check the name and the port of the proxy")
	}
	return h3, nil
}

// identify adds the credentials to the header of a request.
func (d *dialer) identify(h http.Header) {
	h.Set("User-Agent", "masque-client")
	if d.token != "" {
		h.Set("Authorization", "Bearer "+d.token)
	}
}

// dial connects to the proxy and returns the stream of the accepted request.
func (c *Client) dial(ctx context.Context) (d *dialed, str *http3.RequestStream, err error) {
	d, err = c.dialer.dial(ctx, func(ctx context.Context, h3 *http3.ClientConn) (err error) {
		str, err = c.request(ctx, h3)
		return err
	})
	return d, str, err
}

// request sends the Extended CONNECT request for the tunnel and checks the
// response (RFC 9484 section 4).
func (c *Client) request(ctx context.Context, h3 *http3.ClientConn) (*http3.RequestStream, error) {
	u, err := c.target.template.Expand(c.target.scope)
	if err != nil {
		return nil, usage("proxy", "%v", err)
	}
	req := (&http.Request{
		Method: http.MethodConnect,
		Proto:  connectip.Protocol,
		URL:    u,
		Host:   u.Host,
		Header: http.Header{
			http3.CapsuleProtocolHeader: {"?1"},
			connectip.InstanceHeader:    {c.instance},
		},
	}).WithContext(ctx)
	if c.cfg.Installation != "" {
		req.Header.Set(connectip.InstallationHeader, c.cfg.Installation)
	}
	c.dialer.identify(req.Header)
	str, err := h3.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	if err := str.SendRequestHeader(req); err != nil {
		return nil, err
	}
	rsp, err := readFinalResponse(str)
	if err != nil {
		return nil, err
	}
	return str, checkResponse(rsp)
}

// readFinalResponse returns the first response that is not informational.
func readFinalResponse(str *http3.RequestStream) (*http.Response, error) {
	for range maxInterim {
		rsp, err := str.ReadResponse()
		if err != nil {
			return nil, err
		}
		// HTTP/3 has no 101 (RFC 9114 section 4.5).
		if rsp.StatusCode >= 200 || rsp.StatusCode == http.StatusSwitchingProtocols {
			return rsp, nil
		}
	}
	return nil, fmt.Errorf("the proxy sent %d informational responses and no final one", maxInterim)
}

// checkResponse returns nil for a successful response (RFC 9484 section 4.5)
// that is well-formed (RFC 9297 section 3.2).
func checkResponse(rsp *http.Response) error {
	status := rsp.StatusCode
	kind, rcode := proxyError(rsp.Header)
	detail := proxyDetail(rsp.Header)
	switch {
	case status == http.StatusNoContent || status == http.StatusResetContent ||
		status == http.StatusPartialContent:
		return fmt.Errorf("the proxy answered with status %d, which cannot open a tunnel", status)
	case status >= 200 && status < 300:
		for _, field := range []string{"Content-Length", "Content-Type"} {
			if _, ok := rsp.Header[field]; ok {
				return fmt.Errorf("the proxy's response with status %d has a %s, which a tunnel cannot have",
					status, field)
			}
		}
		return nil
	case status == http.StatusUnauthorized || status == http.StatusProxyAuthRequired:
		return fail(causeCredentials, nil, "the proxy does not accept the credentials",
			"ask its operator for a new invitation")
	case status == http.StatusForbidden:
		return fail(causeForbidden, nil, "the proxy does not allow this request"+detail,
			"check [scope], or ask its operator")
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable:
		return fail(causeBusy, nil,
			fmt.Sprintf("the proxy takes no more sessions now, status %d%s", status, detail), "")
	case kind == "dns_error" && rcode == "NXDOMAIN":
		return fail(causeTarget, nil, "the proxy finds no address of the target's name",
			"check its spelling")
	case kind == "dns_error" || kind == "dns_timeout":
		return fail(causeBusy, nil, "the proxy cannot resolve the target's name now"+detail,
			"ask its operator to check its DNS")
	case status >= 500 || status == http.StatusRequestTimeout:
		// 408 means that the proxy waited in vain for the client's SETTINGS.
		return fail(causeBusy, nil,
			fmt.Sprintf("the proxy failed, status %d%s", status, detail), "")
	default:
		return fail(causeAnswer, nil,
			fmt.Sprintf("the proxy answered with status %d%s", status, detail),
			"check the URI template in proxy")
	}
}

// proxyDetail returns the field Proxy-Status in parentheses, with a leading
// space. It returns "" if there is none.
func proxyDetail(h http.Header) string {
	if s := h.Get("Proxy-Status"); s != "" {
		return fmt.Sprintf(" (%.200q)", s)
	}
	return ""
}

// proxyError returns the error type in Proxy-Status and the DNS response code
// (RFC 9209 section 2.3). Each is "" if it is missing.
func proxyError(h http.Header) (kind, rcode string) {
	list, err := httpsfv.UnmarshalList(h["Proxy-Status"])
	if err != nil {
		return "", ""
	}
	for _, member := range list {
		item, ok := member.(httpsfv.Item)
		if !ok {
			continue
		}
		v, _ := item.Params.Get("error")
		if token, ok := v.(httpsfv.Token); ok {
			kind = string(token)
			v, _ = item.Params.Get("rcode")
			rcode, _ = v.(string)
		}
	}
	return kind, rcode
}

// tlsConfig returns base, which may be nil, with the settings of HTTP/3.
func (to target) tlsConfig(base *tls.Config) *tls.Config {
	t := &tls.Config{}
	if base != nil {
		t = base.Clone()
	}
	t.ServerName, t.Time = to.verify, to.clock.now
	t.NextProtos = []string{http3.NextProtoH3}
	t.MinVersion = tls.VersionTLS13
	if len(t.Certificates) > 0 && t.GetClientCertificate == nil {
		// Otherwise crypto/tls leaves out a certificate from an authority that
		// the proxy does not name, and the proxy reports a missing certificate.
		cert := t.Certificates[0]
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &cert, nil
		}
	}
	return t
}
