package client

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/netip"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
	"masquevpn/internal/resolver"
	"masquevpn/internal/udpconn"
	"masquevpn/routing"
)

const (
	// answerTimeout limits the wait for the answer to a request.
	answerTimeout = 10 * time.Second

	userAgent = "masque-client"
)

// controlFunc prepares a socket, see net.Dialer.Control.
type controlFunc = func(network, address string, c syscall.RawConn) error

// dialer connects to one proxy. It is used by one goroutine at a time.
type dialer struct {
	target target
	token  string
	dial   *dial.Dialer
	logger *slog.Logger

	// dialTo is dial.Dial, and closeConn closes its connection.
	dialTo    func(context.Context, []discovery.Group) (*dial.Conn, error)
	closeConn func(*dial.Conn)
	resolver  *discovery.Resolver

	// trusted are nameservers that are asked in place of all others, and that
	// validate signatures. nameservers replace a nameserver on this host.
	trusted, nameservers []netip.AddrPort

	// upstream is Resolver.Upstream. It may be nil.
	upstream func() (servers []netip.AddrPort, applied bool)

	// progress is called with a text after each successful step. It may be nil.
	progress func(string)

	// found is called with each result of a resolution. It may be nil.
	found func(*discovery.Result)

	// hasRoute reports whether this host has a route to an address.
	hasRoute func(netip.Addr) bool

	result     *discovery.Result // last result; nil before the first
	resolvedAt time.Time         // time of result
	failed     bool              // the last dial of result's servers failed
	lastAddrs  []netip.AddrPort  // addresses of the proxy
	outer      outerSockets
}

// newDialer returns a dialer to a proxy. config may be nil.
func newDialer(to target, config *tls.Config, token string, control controlFunc,
	logger *slog.Logger) *dialer {
	t := &tls.Config{}
	if config != nil {
		t = config.Clone()
	}
	t.Time = to.clock.now
	d := &dialer{target: to, token: token, logger: logger, hasRoute: hasRoute}
	d.dial = &dial.Dialer{TLS: t, Control: control, Opened: d.outer.add, Logger: logger}
	d.dialTo, d.closeConn = d.dial.Dial, (*dial.Conn).Close
	d.resolver = d.newResolver(resolver.Config{})
	return d
}

// setControl replaces the function that prepares sockets.
func (d *dialer) setControl(control controlFunc, c resolver.Config) {
	d.dial.Control = control
	d.resolver = d.newResolver(c)
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

	name   string           // the name that the proxy's certificate proves
	record discovery.Record // the record that led to the proxy
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

// connectAndRequest connects to the proxy and calls request, which makes the
// first request and has answerTimeout. An error of request closes the
// connection.
func (d *dialer) connectAndRequest(ctx context.Context,
	request func(context.Context, *http3.ClientConn) error) (*dialed, error) {
	conn, err := d.connect(ctx)
	if err != nil {
		return nil, d.explain(err)
	}
	c := &dialed{transport: conn.Transport, socket: conn.Socket, closePrevious: func() {},
		conn: conn.QUIC, remote: conn.Remote, name: conn.Name,
		record: conn.Record}
	d.reportConn(c)
	d.report("it is a MASQUE proxy: it offers Extended CONNECT and HTTP Datagrams")
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, c.close) // ends a blocked request
	err = request(ctx, conn.HTTP)
	if !stop() {
		err = ctx.Err() // the better explanation for the closed connection
	}
	if err != nil {
		err = classify(err, c.conn, d.target)
		c.close()
		return nil, err
	}
	return c, nil
}

// explain returns an Error for an error of connect.
func (d *dialer) explain(err error) error {
	var e *dial.Error
	if !errors.As(err, &e) {
		return classify(err, nil, d.target)
	}
	to := d.target.at(d.result, &e.Record)
	explained := classify(err, nil, to)
	if e.Failure == dial.Unsent {
		return explained
	}
	return withAddress(explained, e.Addr)
}

// template returns the URI template for requests: the configured one, or the
// default one.
func (d *dialer) template() (*connectip.Template, error) {
	if d.target.template != nil {
		return d.target.template, nil
	}
	return connectip.ParseTemplate("https://" + d.authority() + connectip.DefaultPath)
}

// authority returns the :authority of requests: that of the configured URI
// template, or the one to which discovery leads.
func (d *dialer) authority() string {
	if d.target.template != nil {
		return d.target.template.Host()
	}
	return d.result.Authority
}
