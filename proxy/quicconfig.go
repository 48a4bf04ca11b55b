package proxy

import (
	"crypto/tls"
	"slices"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/proxy/internal/connlimit"
)

const (
	idleTimeout      = 30 * time.Second
	handshakeTimeout = 5 * time.Second

	// initialPacketSize is the size in bytes of the first QUIC packets. A
	// datagram of this size has room for an IPv6 packet of 1280 bytes, and with
	// its headers it fits a path of 1400 bytes.
	initialPacketSize = 1350

	// smallPacketSize is the size in bytes that every path must carry for QUIC
	// (RFC 9000 section 14).
	smallPacketSize = 1200

	// maxStreams is the number of requests that may be open on a connection.
	maxStreams = 64

	// maxUniStreams is the number of unidirectional streams that a client may
	// open. HTTP/3 has three.
	maxUniStreams = 8

	// streamWindow and connWindow are the flow control windows in bytes of one
	// stream and of a connection. Streams carry capsules only. The longest
	// capsule fits, and a client that sends capsules too fast has to wait.
	streamWindow = 128 << 10
	connWindow   = 1 << 20

	// pendingWindow and pendingStreams replace connWindow and maxStreams until
	// a request is accepted. Stock quic-go cannot raise the number of streams
	// later, so it begins with maxStreams.
	pendingWindow  = 16 << 10
	pendingStreams = 10

	// maxHeaderBytes limits the header of a request, in bytes.
	maxHeaderBytes = 16 << 10

	// unvalidatedRate is the number of handshakes per second that begin without
	// address validation. Further clients have to validate their address first,
	// with a Retry packet (RFC 9000 section 8.1.2).
	unvalidatedRate = 100
)

// quicConfig returns the configuration of new connections. A client whose path
// may be too narrow for initialPacketSize gets smallPacketSize.
func (s *Server) quicConfig() *quic.Config {
	config := &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: handshakeTimeout,
		MaxIdleTimeout:       idleTimeout,
		InitialPacketSize:    initialPacketSize,
		Tracer:               s.cfg().Tracer,

		MaxIncomingStreams:    maxStreams,
		MaxIncomingUniStreams: maxUniStreams,

		InitialStreamReceiveWindow:     streamWindow,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: pendingWindow,
		MaxConnectionReceiveWindow:     connWindow,
		AllowConnectionWindowIncrease: func(c *quic.Conn, _ uint64) bool {
			return connlimit.FromContext(c.Context()).Admitted()
		},
	}
	awaitAdmission(config)
	s.cfg().Congestion.Apply(config)
	small := config.Clone()
	small.InitialPacketSize = smallPacketSize
	config.GetConfigForClient = func(info *quic.ClientInfo) (*quic.Config, error) {
		if s.smallMTU.Begin(info.RemoteAddr, time.Now()) {
			return small, nil
		}
		return config, nil
	}
	return config
}

// tlsConfig returns Config.TLS with the client authentication that the methods
// need. While there are peers, TLS asks for a certificate and judges none: the
// requests say which authorities count.
func (s *Server) tlsConfig() *tls.Config {
	c := s.cfg().TLS.Clone()
	c.MinVersion = tls.VersionTLS13
	switch {
	case !slices.Contains(s.cfg().Methods, MethodMTLS):
		c.ClientAuth = tls.NoClientCert
	case len(s.cfg().Methods) > 1:
		c.ClientAuth = tls.VerifyClientCertIfGiven
	default:
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	forPeers := c.Clone()
	forPeers.ClientAuth = tls.RequestClientCert
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		if len(s.cfg().Peers) > 0 {
			return forPeers, nil
		}
		return nil, nil
	}
	return c
}
