// Package dnsclient asks DNS servers the questions of discovery. It is a stub
// resolver (RFC 1034 section 5.3.1): the servers follow delegations and
// validate signatures.
//
// Unlike net.Resolver it asks for HTTPS records, tells whether a server
// validated an answer, and which aliases led to it; it never completes a name
// by a search domain.
package dnsclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/discovery"
)

const (
	// A server is asked minTries times; of several, up to maxTries are asked.
	minTries, maxTries = 2, 3

	tryTimeout   = 2 * time.Second // for each of the tries
	totalTimeout = 5 * time.Second // for one name
	// udpSize is the size of answers that fit every path (RFC 9715). Longer
	// ones come by TCP.
	udpSize = 1232
	// maxAliases limits the CNAMEs that are followed.
	maxAliases = 8
	// maxRecords limits the records of one answer that are read.
	maxRecords = 256
)

// A Client asks DNS servers. It implements discovery.DNS.
type Client struct {
	// Servers returns the servers to ask, the preferred one first.
	Servers func() []Server
	// Control prepares sockets, as that of net.Dialer; nil for none.
	Control func(network, address string, c syscall.RawConn) error
}

// A Server is a DNS server.
type Server struct {
	Addr netip.AddrPort
	// Trusted says that the server, and the path to it, can be believed when it
	// says that an answer is signed.
	Trusted bool
}

// A failure is a temporary failure; its text is discovery's status.
type failure string

func (f failure) Error() string { return string(f) }

const (
	errTimeout     failure = "TIMEOUT"
	errUnreachable failure = "UNREACHABLE"
	errMalformed   failure = "MALFORMED"
	errNoServer    failure = "no nameserver to ask"
)

// Lookup asks for the records of a type. CNAMEs are followed, also those that a
// server leaves to its client.
func (c *Client) Lookup(ctx context.Context, name string, t discovery.Type) (discovery.Answer,
	error) {
	ctx, cancel := context.WithTimeout(ctx, totalTimeout)
	defer cancel()
	chain := newChain(name, dnsmessage.Type(t))
	for {
		complete, err := c.ask(ctx, chain)
		if err != nil || complete {
			return chain.answer, err
		}
	}
}

// ask asks the servers, one after the other, about the last name of a chain. It
// reports whether the answer completed the chain.
func (c *Client) ask(ctx context.Context, chain *chain) (complete bool, err error) {
	n, err := dnsmessage.NewName(chain.name() + ".")
	if err != nil || !packable(chain.name()) {
		return true, nil // too long to exist
	}
	q := dnsmessage.Question{Name: n, Type: chain.t, Class: dnsmessage.ClassINET}
	servers := c.Servers()
	if len(servers) == 0 {
		return false, errNoServer
	}
	err = errTimeout
	for try := range min(max(len(servers), minTries), maxTries) {
		s := servers[try%len(servers)]
		if try >= len(servers) && err != errTimeout {
			break // the same server would say the same again
		}
		var m *message
		if m, err = c.exchange(ctx, s.Addr, q); err == nil {
			return chain.add(m, s.Trusted)
		}
		if ctx.Err() != nil {
			return false, errTimeout
		}
	}
	return false, err
}

// packable reports whether every label of a name fits a message.
func packable(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
	}
	return true
}

// exchange asks one server, by UDP first. An old server that knows no EDNS is
// asked again without.
func (c *Client) exchange(ctx context.Context, server netip.AddrPort, q dnsmessage.Question) (
	*message, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	edns, network := true, "udp"
	for range 4 { // each of them at most: without EDNS, by TCP, both
		m, err := c.roundTrip(ctx, network, server, q, edns)
		switch {
		case err != nil:
			return nil, err
		case m.truncated && network == "udp":
			network = "tcp"
		case edns && (m.code == dnsmessage.RCodeFormatError ||
			m.code == dnsmessage.RCodeNotImplemented):
			edns = false
		default:
			return m, m.failure()
		}
	}
	return nil, errMalformed
}

// roundTrip sends one message and waits for its answer.
func (c *Client) roundTrip(ctx context.Context, network string, server netip.AddrPort,
	q dnsmessage.Question, edns bool) (*message, error) {
	id := uint16(rand.Uint32())
	query, err := pack(id, q, edns)
	if err != nil {
		return nil, errMalformed
	}
	d := net.Dialer{Control: c.Control}
	conn, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, failureOf(ctx, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		return streamTrip(ctx, conn, query, id, q)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, failureOf(ctx, err)
	}
	buf := make([]byte, udpSize)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, failureOf(ctx, err)
		}
		// Anything else is somebody's guess or an answer that comes too late.
		if m, ok := parse(buf[:n], id, q); ok {
			return m, nil
		}
	}
}

// streamTrip sends a query on a TCP connection (RFC 7766), and reads the
// answer.
func streamTrip(ctx context.Context, conn net.Conn, query []byte, id uint16,
	q dnsmessage.Question) (*message, error) {
	framed := binary.BigEndian.AppendUint16(nil, uint16(len(query)))
	if _, err := conn.Write(append(framed, query...)); err != nil {
		return nil, failureOf(ctx, err)
	}
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, failureOf(ctx, err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, failureOf(ctx, err)
	}
	m, ok := parse(buf, id, q)
	if !ok || m.truncated {
		return nil, errMalformed
	}
	return m, nil
}

// failureOf returns the status of a network error.
func failureOf(ctx context.Context, err error) error {
	var timeout net.Error
	if ctx.Err() != nil || errors.As(err, &timeout) && timeout.Timeout() {
		return errTimeout
	}
	return errUnreachable
}

// pack returns a query. It asks for recursion and for the AD bit (RFC 6840
// section 5.7), but not for signatures.
func pack(id uint16, q dnsmessage.Question, edns bool) ([]byte, error) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true,
		AuthenticData: true})
	b.EnableCompression()
	if err := errors.Join(b.StartQuestions(), b.Question(q)); err != nil {
		return nil, err
	}
	if edns {
		var h dnsmessage.ResourceHeader
		err := h.SetEDNS0(udpSize, dnsmessage.RCodeSuccess, false)
		if err := errors.Join(err, b.StartAdditionals(),
			b.OPTResource(h, dnsmessage.OPTResource{})); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// failure returns the error that the response code of m means; nil for an
// answer, also for that a name does not exist.
func (m *message) failure() error {
	switch m.code {
	case dnsmessage.RCodeSuccess, dnsmessage.RCodeNameError:
		if m.malformed {
			return errMalformed
		}
		return nil
	case dnsmessage.RCodeServerFailure:
		return failure("SERVFAIL")
	case dnsmessage.RCodeRefused:
		return failure("REFUSED")
	case dnsmessage.RCodeFormatError:
		return failure("FORMERR")
	case dnsmessage.RCodeNotImplemented:
		return failure("NOTIMP")
	}
	return failure(fmt.Sprintf("RCODE %d", m.code))
}
