// Package dial connects to a MASQUE server that discovery found: it tries the
// records of a result, verifies the server's certificate, and checks that the
// server offers Extended CONNECT and HTTP Datagrams.
package dial

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/qlogwriter"

	"masquevpn/internal/congestion"
	"masquevpn/internal/discovery"
	"masquevpn/internal/udpconn"
)

const (
	// IdleTimeout ends a connection on which nothing was received for as long.
	IdleTimeout = 30 * time.Second
	// KeepAlive is how often an idle connection is used. Tunnels do so with
	// packets that a restarted proxy answers, so that it goes unnoticed no
	// longer.
	KeepAlive = 10 * time.Second
	// handshakeTimeout limits the handshake with one address, and then the wait
	// for its SETTINGS.
	handshakeTimeout = 5 * time.Second
	// attemptTimeout limits an attempt to connect, with all of its addresses.
	attemptTimeout = 30 * time.Second
	// attemptDelay is the time after which the next address of a record is
	// tried as well (RFC 8305 section 5), recordDelay that for the next record
	// of a group.
	attemptDelay = 250 * time.Millisecond
	recordDelay  = time.Second
	// initialPacketSize leaves room for an IPv6 packet of 1280 bytes in a
	// datagram and fits, with its headers, a path of 1400 bytes.
	// smallPacketSize is the size that every path of QUIC carries.
	initialPacketSize = 1350
	smallPacketSize   = 1200
)

// A Dialer makes connections. Its fields do not change after the first call of
// a method. The zero value of a field is its default, unless the field says
// otherwise.
type Dialer struct {
	// TLS has the client's certificates, the authorities of the server's, and
	// the time. Names and protocols are set by the Dialer. nil: no certificate,
	// and the system's authorities.
	TLS *tls.Config
	// Verify judges the server's certificate in place of VerifyServer, and
	// returns the name that it proves.
	Verify     func(s tls.ConnectionState, r *discovery.Record) (name string, err error)
	Congestion congestion.Mode
	// Control prepares sockets, as that of net.Dialer.
	Control func(network, address string, c syscall.RawConn) error
	// Opened is told of each socket from which packets to remote are sent.
	Opened func(local net.Addr, remote netip.AddrPort)
	// Dropped is told of packets that the kernel dropped because the receive
	// buffer of a socket was full.
	Dropped func(packets int)
	Tracer  func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace
	Logger  *slog.Logger // not nil

	timeouts atomic.Int32 // attempts that got no answer
	// dialOne replaces dialAddr in tests.
	dialOne func(context.Context, *discovery.Record, netip.AddrPort) (*Conn, error)
}

// A Conn is an established connection to a server that offers Extended CONNECT
// and HTTP Datagrams.
type Conn struct {
	QUIC *quic.Conn // its LocalAddr and RemoteAddr may change at any time
	HTTP *http3.ClientConn
	// Transport has the Socket of the current path.
	Transport *quic.Transport
	Socket    *udpconn.Conn
	Remote    netip.AddrPort
	Record    discovery.Record // the record that led to the server
	Name      string           // the name that the server's certificate proves
}

// Close ends the connection and frees its socket.
func (c *Conn) Close() { c.CloseWithError(http3.ErrCodeNoError) }

// CloseWithError is Close with a code for the server.
func (c *Conn) CloseWithError(code http3.ErrCode) {
	_ = c.QUIC.CloseWithError(quic.ApplicationErrorCode(code), "")
	_ = c.Transport.Close()
	_ = c.Socket.Close()
}

// dialAddr connects to an address of a record.
func (d *Dialer) dialAddr(ctx context.Context, r *discovery.Record, addr netip.AddrPort) (*Conn,
	error) {
	c, err := d.connect(ctx, r, addr)
	if e := asError(err); e != nil && e.Failure == Identity && r.SNI != r.Verify[0] && r.Signed {
		// A server that knows the domain alone has a certificate for it where
		// SNI is the domain too.
		plain := *r
		plain.SNI, plain.Verify = r.Verify[0], r.Verify[:1]
		c, err = d.connect(ctx, &plain, addr)
	}
	if err != nil {
		return nil, err
	}
	if err := d.settings(ctx, c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// connect makes the QUIC connection and verifies the certificate.
func (d *Dialer) connect(ctx context.Context, r *discovery.Record, addr netip.AddrPort) (*Conn,
	error) {
	t, socket, err := d.Open(ctx, addr)
	if err != nil {
		return nil, newError(err, nil, r, addr)
	}
	config := &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: handshakeTimeout,
		MaxIdleTimeout:       IdleTimeout,
		KeepAlivePeriod:      KeepAlive,
		InitialPacketSize:    d.packetSize(),
		Tracer:               d.Tracer,
	}
	d.Congestion.Apply(config)
	c := &Conn{Transport: t, Socket: socket, Remote: addr, Record: *r}
	c.QUIC, err = t.Dial(ctx, net.UDPAddrFromAddrPort(addr), d.tlsConfig(r, &c.Name), config)
	if err == nil {
		socket.IgnoreSendErrors()
		return c, nil
	}
	unsent := socket.Unsent()
	_ = t.Close()
	_ = socket.Close()
	if unsent != nil {
		return nil, &Error{Failure: Unsent, Record: *r, Addr: addr, Err: unsent}
	}
	return nil, newError(err, nil, r, addr)
}

// Open makes a socket for packets to addr, and the transport over it. The
// caller closes both.
func (d *Dialer) Open(ctx context.Context, addr netip.AddrPort) (*quic.Transport, *udpconn.Conn,
	error) {
	network := "udp4"
	if addr.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: d.Control}
	socket, err := lc.ListenPacket(ctx, network, ":0")
	if err != nil {
		return nil, nil, fmt.Errorf("opening a UDP socket: %w", err)
	}
	udp, err := udpconn.New(socket.(*net.UDPConn), d.Logger, d.Dropped)
	if err != nil {
		_ = socket.Close()
		return nil, nil, fmt.Errorf("preparing a UDP socket: %w", err)
	}
	if d.TLS != nil && d.TLS.KeyLogWriter != nil {
		if err := udp.DisableOffload(); err != nil {
			_ = udp.Close()
			return nil, nil, fmt.Errorf("preparing a UDP socket: %w", err)
		}
	}
	if d.Opened != nil {
		d.Opened(udp.LocalAddr(), addr)
	}
	return &quic.Transport{Conn: udp}, udp, nil
}

// packetSize is the size of the first QUIC packets, in bytes. When an attempt
// gets no answer, the path may be too narrow for them: two attempts with small
// packets follow, because it takes the server one of them to notice.
func (d *Dialer) packetSize() uint16 {
	if d.timeouts.Load()%3 == 0 {
		return initialPacketSize
	}
	return smallPacketSize
}

// settings begins HTTP/3 on a connection and checks that the server offers what
// MASQUE needs (RFC 9220, RFC 9297 section 2.1.1).
func (d *Dialer) settings(ctx context.Context, c *Conn) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	c.HTTP = (&http3.Transport{EnableDatagrams: true,
		DisableCompression: true}).NewClientConn(c.QUIC)
	select {
	case <-c.HTTP.ReceivedSettings():
	case <-c.HTTP.Context().Done():
		return newError(context.Cause(c.HTTP.Context()), c.QUIC, &c.Record, c.Remote)
	case <-ctx.Done():
		return newError(ctx.Err(), c.QUIC, &c.Record, c.Remote)
	}
	s := c.HTTP.Settings()
	switch {
	case !s.EnableExtendedConnect:
		return &Error{Failure: NoMASQUE, Record: c.Record, Addr: c.Remote, Err: errNoConnect}
	case !s.EnableDatagrams:
		return &Error{Failure: NoMASQUE, Record: c.Record, Addr: c.Remote, Err: errNoDatagrams}
	}
	return nil
}
