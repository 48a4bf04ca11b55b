package proxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	lookupTimeout = 5 * time.Second

	// maxLookups and maxLookupsOfUser limit the concurrent lookups, of all
	// users and of one user.
	maxLookups       = 64
	maxLookupsOfUser = 8

	// maxResolved is the number of addresses of one name that are used.
	maxResolved = 64
)

// Resolver looks up the addresses of DNS names, like *net.Resolver. Errors
// should be or wrap a *net.DNSError.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// nameResolver resolves names for clients, with limits on concurrent lookups.
type nameResolver struct {
	cfg     func() *Config
	lookups lookups
}

// resolve returns the IPv4 and IPv6 addresses of name, or a refusal with the
// reason in the terms of RFC 9209 section 2.3.
func (n *nameResolver) resolve(ctx context.Context, user User, name string) ([]netip.Addr,
	*refusal) {
	if !n.lookups.begin(user.Name) {
		return nil, refuse(http.StatusServiceUnavailable, "connection_limit_reached",
			"user %q: too many names are being resolved", user.Name)
	}
	defer n.lookups.end(user.Name)
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := n.cfg().Resolver.LookupNetIP(ctx, "ip", name)
	if err == nil && len(found) == 0 {
		err = &net.DNSError{Err: "it has no addresses", Name: name, IsNotFound: true}
	}
	if err != nil {
		return nil, notResolved(name, err)
	}
	var addrs []netip.Addr
	for _, a := range found {
		a = a.Unmap().WithZone("")
		if len(addrs) < maxResolved && !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}

// notResolved returns the refusal of a request whose name could not be
// resolved.
func notResolved(name string, err error) *refusal {
	var dns *net.DNSError
	isDNS := errors.As(err, &dns)
	if errors.Is(err, context.DeadlineExceeded) || isDNS && dns.IsTimeout {
		return refuse(http.StatusGatewayTimeout, "dns_timeout", "resolving %q: %w", name, err)
	}
	r := refuse(http.StatusBadGateway, "dns_error", "resolving %q: %w", name, err)
	if isDNS && dns.IsNotFound {
		r.rcode = "NXDOMAIN"
	}
	return r
}

// lookups counts concurrent lookups.
type lookups struct {
	mu     sync.Mutex // guards the fields below
	total  int
	ofUser map[string]int // key: user
}

// begin reports whether another lookup may begin; end must then be called after
// it. All users without a name are one user, without a limit of its own.
func (l *lookups) begin(user string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxLookups || user != "" && l.ofUser[user] >= maxLookupsOfUser {
		return false
	}
	if l.ofUser == nil {
		l.ofUser = make(map[string]int)
	}
	l.total++
	l.ofUser[user]++
	return true
}

func (l *lookups) end(user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.ofUser[user]--; l.ofUser[user] == 0 {
		delete(l.ofUser, user)
	}
}
