package client

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/qlogwriter"
	"github.com/yosida95/uritemplate/v3"
	"golang.org/x/time/rate"

	"masquevpn/internal/congestion"
	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/resolver"
	"masquevpn/routing"
)

const (
	// udpProtocol is the value of :protocol (RFC 9298 section 3.4).
	udpProtocol = "connect-udp"

	// udpPath is the path of the default URI template for UDP proxying (RFC
	// 9298 section 2).
	udpPath = "/.well-known/masque/udp/{target_host}/{target_port}/"

	// DefaultUDPIdleTimeout is the shortest timeout that RFC 9298 section 3.1
	// recommends.
	DefaultUDPIdleTimeout = 2 * time.Minute

	// useInterval is the time between requests on a connection without flows.
	// Our proxy closes a connection after two minutes without a request.
	useInterval = time.Minute

	// maxFlows limits the number of local peers served at once. Our proxy
	// accepts this many requests on one connection.
	maxFlows = 64
)

// UDPConfig is the configuration of a UDPForwarder.
type UDPConfig struct {
	// Proxy is like Config.Proxy. Only the host and port of a URI template are
	// used.
	Proxy string

	// TLS is like Config.TLS.
	TLS *tls.Config

	// Token is the bearer token, "" for none.
	Token string

	// Listen is the local UDP address, host:port. Port 0 means any free port.
	Listen string

	// Target is the address that the proxy sends to, host:port. The proxy
	// resolves a name.
	Target string

	// Mark is like Config.Mark. 0 means routing.DefaultMark.
	Mark uint32

	// Discovery is like Config.Discovery.
	Discovery Discovery

	// IdleTimeout ends the flow of a local peer after this time without
	// packets. 0 means DefaultUDPIdleTimeout.
	IdleTimeout time.Duration

	// Reconnect makes Run connect again after a connection is lost.
	Reconnect bool

	// MaxDelay limits the time between attempts to connect. 0 means
	// DefaultMaxDelay.
	MaxDelay time.Duration

	// Logger may be nil: nothing is logged.
	Logger *slog.Logger

	// Tracer is like Config.Tracer.
	Tracer func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace
}

// UDPForwarder forwards the packets of a UDP port of this host to a target
// beyond a proxy, and the answers back (RFC 9298). Each local peer gets its own
// flow; all flows share one connection. A UDPForwarder needs no privileges. Use
// NewUDPForwarder to create one.
type UDPForwarder struct {
	cfg      UDPConfig
	dialer   *dialer
	instance string // distinguishes this run from others of the same user
	started  time.Time
	ready    chan struct{}
	socket   *net.UDPConn
	link     atomic.Pointer[udpLink] // nil without a connection
	stats    connectip.Stats

	// answerTimeout limits the time until the proxy answers a request.
	answerTimeout time.Duration

	// useInterval is the constant of this name; tests shorten it.
	useInterval time.Duration

	// flowWarnings limits the log lines about flows that cannot be opened.
	flowWarnings *rate.Limiter

	running sync.WaitGroup // goroutines of flows and connections

	mu        sync.Mutex // guards the fields below
	flows     map[*udpFlow]struct{}
	holdUntil time.Time // no new flows before; set when the proxy refuses one
}

// udpLink is a connection to the proxy.
type udpLink struct {
	h3   *http3.ClientConn
	ctx  context.Context // canceled when the connection ends
	fail context.CancelCauseFunc
}

// NewUDPForwarder checks cfg and returns a UDPForwarder. It opens and sends
// nothing. Errors are *Error of KindUsage.
func NewUDPForwarder(cfg UDPConfig) (*UDPForwarder, error) {
	to, err := parseProxy(cfg.Proxy, cfg.TLS)
	if err != nil {
		return nil, err
	}
	to.query.Method, to.query.DNSSEC = cfg.Discovery.Method, cfg.Discovery.DNSSEC
	if _, port, err := net.SplitHostPort(cfg.Listen); err != nil || !isPort(port, 0) {
		return nil, usage("listen", "%q is not an address and a UDP port, such as 127.0.0.1:5353",
			cfg.Listen)
	}
	host, port, err := net.SplitHostPort(cfg.Target)
	if err != nil || !isPort(port, 1) {
		return nil, usage("target",
			"%q is not a name or an address and a UDP port, such as dns.example:53", cfg.Target)
	}
	if scope, err := connectip.ParseScope(host, "*"); err != nil || scope.IsZero() ||
		strings.Contains(host, "/") {
		return nil, usage("target", "%q is neither a name nor an address", host)
	}
	if n := len(cfg.Token); n > maxToken {
		return nil, usage("auth.token",
			"%d bytes are too long for a proxy, at most %d are possible", n, maxToken)
	}
	if cfg.IdleTimeout < 0 || cfg.MaxDelay < 0 {
		return nil, usage("reconnect.max_delay", "a time span cannot be negative")
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = DefaultUDPIdleTimeout
	}
	if cfg.MaxDelay == 0 {
		cfg.MaxDelay = DefaultMaxDelay
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	f := &UDPForwarder{
		cfg: cfg, instance: rand.Text(), started: time.Now(),
		answerTimeout: answerTimeout, useInterval: useInterval, ready: make(chan struct{}),
		flowWarnings: rate.NewLimiter(rate.Every(10*time.Second), 3),
		flows:        make(map[*udpFlow]struct{}),
	}
	f.dialer = newDialer(to, cfg.TLS, cfg.Token,
		routing.MarkSocketIfAllowed(cmp.Or(cfg.Mark, routing.DefaultMark)), cfg.Logger)
	f.dialer.trusted = cfg.Discovery.Nameservers
	f.dialer.resolver = f.dialer.newResolver(resolver.Config{CA: cfg.Discovery.CA})
	f.dialer.dial.Tracer = cfg.Tracer
	// The forwarded protocol may have no congestion control of its own (RFC
	// 9298 section 6).
	f.dialer.dial.Congestion = congestion.Outer
	f.dialer.dial.Dropped = func(packets int) {
		f.stats.Receive.DropMany(connectip.DropSocketFull, packets)
	}
	return f, nil
}

// isPort reports whether s is the number of a port, lowest or greater.
func isPort(s string, lowest uint64) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= lowest
}

// Ready returns a channel that is closed when the proxy accepts the target for
// the first time.
func (f *UDPForwarder) Ready() <-chan struct{} { return f.ready }

// LocalAddr returns the local address. It may be called once Ready is closed.
func (f *UDPForwarder) LocalAddr() netip.AddrPort {
	return f.socket.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Stats returns the counters of packets: Send counts packets from local peers
// to the proxy, Receive packets from the proxy.
func (f *UDPForwarder) Stats() *connectip.Stats { return &f.stats }

// Run forwards packets. It returns nil when ctx ends, and an *Error when it
// cannot continue. It may be called once.
func (f *UDPForwarder) Run(ctx context.Context) error {
	var lc net.ListenConfig
	c, err := lc.ListenPacket(ctx, "udp", f.cfg.Listen)
	if err != nil {
		cause, remedy := causeFailure, ""
		if errors.Is(err, os.ErrPermission) {
			cause, remedy = causePrivileges, "choose a port above 1023, or run as root"
		}
		return fail(cause, err, fmt.Sprintf("listening on UDP %s: %v", f.cfg.Listen, err), remedy)
	}
	f.socket = c.(*net.UDPConn)
	var reader sync.WaitGroup
	var readErr error
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	reader.Go(func() {
		defer stop()
		readErr = f.readSocket()
	})
	r := retry{enabled: f.cfg.Reconnect, maxDelay: f.cfg.MaxDelay, logger: f.cfg.Logger,
		beforeWait: func(bool, *Error) {}}
	err = r.run(ctx, f.session)
	f.socket.Close()
	reader.Wait()
	f.running.Wait()
	if !errors.Is(readErr, net.ErrClosed) {
		return fail(causeFailure, readErr,
			fmt.Sprintf("reading from UDP %s: %v", f.cfg.Listen, readErr), "")
	}
	return err
}

// session connects and forwards packets until the connection or ctx ends. It
// returns how long it was connected and why it ended.
func (f *UDPForwarder) session(ctx context.Context) (connected time.Duration, err error) {
	link := &udpLink{}
	d, err := f.dialer.connectAndRequest(ctx,
		func(ctx context.Context, h3 *http3.ClientConn) error {
			link.h3 = h3
			// One flow checks that the proxy accepts the credentials and the
			// target.
			str, err := f.request(ctx, link)
			if err == nil {
				connectip.NewUDPStream(str).Close()
			}
			return err
		})
	if err != nil {
		return 0, err
	}
	defer d.close()
	since := time.Now()
	link.ctx, link.fail = context.WithCancelCause(ctx)
	defer link.fail(nil)
	f.running.Go(func() { sendKeepAlives(link.ctx, d.conn) })
	f.running.Go(func() { f.keepUsed(link) })
	f.link.Store(link)
	defer f.link.Store(nil)
	f.cfg.Logger.Info("connected", "proxy", f.dialer.target.host, "remote",
		d.conn.RemoteAddr().String())
	select {
	case <-f.ready:
	default:
		close(f.ready)
	}
	select {
	case <-d.conn.Context().Done():
		err = explainEnd(context.Cause(d.conn.Context()), d.conn, f.dialer.target)
	case <-link.ctx.Done():
		err = context.Cause(link.ctx)
	}
	return time.Since(since), err
}

// keepAliveDatagram belongs to the first stream of a connection, which has
// ended, and has an unknown context ID, so the proxy drops it (RFC 9297 section
// 2.1, RFC 9298 section 5). A proxy that has lost the connection answers it
// with a stateless reset. It need not answer short packets, such as QUIC's own
// keep-alives (RFC 9000 section 10.3.3).
var keepAliveDatagram = append([]byte{0, 2}, make([]byte, 62)...)

// sendKeepAlives sends keepAliveDatagrams until ctx ends, so that conn learns
// of a restart of the proxy: one every dial.KeepAlive, and one a second while
// packets go unanswered.
func sendKeepAlives(ctx context.Context, conn *quic.Conn) {
	const interval = time.Second
	tick := time.NewTicker(interval)
	defer tick.Stop()
	last, idle := conn.ConnectionStats(), time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := conn.ConnectionStats()
		unanswered := now.PacketsSent > last.PacketsSent &&
			now.PacketsReceived == last.PacketsReceived
		if idle += interval; unanswered || idle >= dial.KeepAlive {
			_ = conn.SendDatagram(keepAliveDatagram)
			idle = 0
		}
		last = conn.ConnectionStats()
	}
}

// keepUsed opens a flow on link every useInterval while there is none, because
// a proxy closes a connection without requests.
func (f *UDPForwarder) keepUsed(link *udpLink) {
	tick := time.NewTicker(f.useInterval)
	defer tick.Stop()
	flow := &udpFlow{f: f, link: link, ctx: link.ctx}
	for {
		select {
		case <-link.ctx.Done():
			return
		case <-tick.C:
		}
		f.mu.Lock()
		used := len(f.flows) > 0
		f.mu.Unlock()
		if used {
			continue
		}
		str, err := flow.request()
		var e *Error
		switch {
		case err == nil:
			connectip.NewUDPStream(str).Close()
		case errors.As(err, &e) && (e.Kind == KindUsage || e.Kind == KindCredentials):
			link.fail(e)
		}
	}
}

// request opens a flow and returns its stream. ctx interrupts it only until the
// request is sent; after that only the end of the connection does.
func (f *UDPForwarder) request(ctx context.Context, link *udpLink) (*http3.RequestStream, error) {
	req, err := f.newRequest(ctx)
	if err != nil {
		return nil, err
	}
	str, err := link.h3.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	if err = str.SendRequestHeader(req); err == nil {
		err = f.awaitAnswer(str)
	}
	if err != nil {
		str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
		str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeNoError))
		return nil, err
	}
	return str, nil
}

// newRequest returns the request for a flow (RFC 9298 section 3.4).
func (f *UDPForwarder) newRequest(ctx context.Context) (*http.Request, error) {
	host, port, err := net.SplitHostPort(f.cfg.Target)
	if err != nil {
		return nil, usage("target", "%v", err)
	}
	template, err := uritemplate.New("https://" + f.dialer.authority() + udpPath)
	if err != nil {
		return nil, usage("proxy", "%v", err)
	}
	uri, err := template.Expand(uritemplate.Values{"target_host": uritemplate.String(host),
		"target_port": uritemplate.String(port)})
	if err != nil {
		return nil, usage("target", "%v", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, uri, nil)
	if err != nil {
		return nil, usage("target", "%v", err)
	}
	req.Proto, req.Host = udpProtocol, req.URL.Host
	req.Header.Set(http3.CapsuleProtocolHeader, "?1")
	req.Header.Set(connectip.InstanceHeader, f.instance)
	f.dialer.identify(req.Header)
	return req, nil
}

// awaitAnswer reads the response to a request. It returns an error if the proxy
// refuses the flow.
func (f *UDPForwarder) awaitAnswer(str *http3.RequestStream) error {
	rsp, err := readFinalResponse(str)
	if err != nil {
		return err
	}
	bad := checkResponse(rsp)
	var e *Error
	switch {
	case bad == nil:
		return nil
	case errors.As(bad, &e) && rsp.StatusCode == http.StatusForbidden:
		e.Remedy = "choose another target, or ask its operator to allow this one"
	case rsp.StatusCode == http.StatusNotImplemented || rsp.StatusCode == http.StatusNotFound:
		bad = fail(causeAnswer, nil,
			fmt.Sprintf("%s does not forward UDP, status %d", f.dialer.target.host, rsp.StatusCode),
			"ask its operator to turn connect_udp on")
	case rsp.StatusCode == http.StatusTooManyRequests ||
		rsp.StatusCode == http.StatusServiceUnavailable:
		bad = &limitError{fail(causeBusy, nil,
			fmt.Sprintf("the proxy accepts no more UDP flows now, status %d%s", rsp.StatusCode,
				proxyDetail(rsp.Header)), "")}
	}
	return bad
}

// limitError is the refusal of a flow because of a limit. It wraps an *Error.
type limitError struct{ error }

func (e *limitError) Unwrap() error { return e.error }
