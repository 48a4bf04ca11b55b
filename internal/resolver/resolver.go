// Package resolver makes discovery's resolvers that use this host: its DNS
// servers, its table of names, and its network.
package resolver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"syscall"
	"time"

	"masquevpn/internal/discovery"
	"masquevpn/internal/dnsclient"
)

const (
	// attemptDelay is the time after which the next address of a web server is
	// tried as well (RFC 8305 section 5).
	attemptDelay = 250 * time.Millisecond
	// maxHeader limits the header of an answer, in bytes.
	maxHeader = 16 << 10

	resolvConf = "/etc/resolv.conf"
	hostsFile  = "/etc/hosts"
)

// A Config says how a resolver reaches DNS and web servers.
type Config struct {
	// Servers returns the DNS servers to ask; nil for those of resolv.conf.
	Servers func() []dnsclient.Server
	// Local looks up a name as any program of the host does; nil for such a
	// look-up by sockets that Control prepares.
	Local func(ctx context.Context, name string) ([]netip.Addr, error)
	// Control prepares sockets, as that of net.Dialer; nil for none.
	Control func(network, address string, c syscall.RawConn) error
	// CA has the authorities of the domains' web servers; nil for the system's.
	CA        *x509.CertPool
	UserAgent string       // the header field of requests for delegation files
	Logger    *slog.Logger // nil for none
}

// New returns a resolver for c. It has a cache, so a program has one for each
// configuration.
func New(c Config) *discovery.Resolver {
	if c.Servers == nil {
		c.Servers = HostServers
	}
	if c.Local == nil {
		c.Local = func(ctx context.Context, name string) ([]netip.Addr, error) {
			return dnsclient.LookupLocal(ctx, name, nil, false, c.Control)
		}
	}
	hosts := &dnsclient.HostsFile{Path: hostsFile}
	return &discovery.Resolver{
		DNS:    &dnsclient.Client{Servers: c.Servers, Control: c.Control},
		Fetch:  c.fetch,
		Hosts:  hosts.Lookup,
		Local:  c.Local,
		Now:    time.Now,
		Rand:   rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())),
		Logger: c.Logger,
	}
}

// HostServers returns the DNS servers of the host (resolv.conf(5)).
func HostServers() []dnsclient.Server {
	c := dnsclient.ReadConfig(resolvConf)
	var list []dnsclient.Server
	for _, a := range c.Servers {
		list = append(list, dnsclient.Server{Addr: a, Trusted: c.TrustAD})
	}
	return list
}

// TrustsHost reports whether the host's DNS servers are trusted to validate
// signatures ("options trust-ad" in resolv.conf(5)).
func TrustsHost() bool { return dnsclient.ReadConfig(resolvConf).TrustAD }

// Unprotected returns the servers among addrs to which the path is not
// protected, because they are not on this host: answers of theirs can be
// forged, with the sign that they were validated.
func Unprotected(addrs []netip.AddrPort) []netip.AddrPort {
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.AddrPort) bool {
		return a.Addr().IsLoopback()
	})
}

// Trusted returns a function for Config.Servers that returns servers which the
// operator named, and which are trusted to validate signatures.
func Trusted(addrs []netip.AddrPort) func() []dnsclient.Server {
	var list []dnsclient.Server
	for _, a := range addrs {
		list = append(list, dnsclient.Server{Addr: a, Trusted: true})
	}
	return func() []dnsclient.Server { return list }
}

// fetch makes one request. It is a discovery.Fetch.
func (c *Config) fetch(ctx context.Context, u *url.URL, addrs []netip.Addr) (*discovery.Response,
	error) {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return c.dial(ctx, addrs, port)
		},
		TLSClientConfig:        &tls.Config{RootCAs: c.CA},
		ForceAttemptHTTP2:      true,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", c.UserAgent)
	resp, err := t.RoundTrip(req)
	if err != nil {
		if errors.As(err, new(*tls.CertificateVerificationError)) {
			return nil, discovery.ErrCertificate
		}
		return nil, err
	}
	return &discovery.Response{Status: resp.StatusCode, Header: resp.Header, Body: resp.Body}, nil
}

// dial connects to one of addrs: to each a moment after the one before, until
// the first succeeds.
func (c *Config) dial(ctx context.Context, addrs []netip.Addr, port string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		conn net.Conn
		err  error
	}
	outcomes := make(chan outcome, len(addrs))
	d := net.Dialer{Control: c.Control}
	for i, a := range addrs {
		go func() {
			select {
			case <-time.After(time.Duration(i) * attemptDelay):
				conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a.String(), port))
				outcomes <- outcome{conn, err}
			case <-ctx.Done():
				outcomes <- outcome{nil, ctx.Err()}
			}
		}()
	}
	var won net.Conn
	var failed error
	for range addrs {
		o := <-outcomes
		switch {
		case o.err == nil && won == nil:
			won = o.conn
			cancel()
		case o.err == nil:
			_ = o.conn.Close()
		case failed == nil:
			failed = o.err
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, failed
}
