package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/quic-go/masque-go"
	"github.com/yosida95/uritemplate/v3"
	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
	"masquevpn/routing"
)

const (
	// udpProtocol is the value of :protocol for UDP proxying (RFC 9298 section
	// 3.4).
	udpProtocol = "connect-udp"

	// udpPath is the start of the path in the default template for UDP proxying
	// (RFC 9298 section 2).
	udpPath = "/.well-known/masque/udp/"
)

// DefaultUDPIdleTimeout is the shortest timeout that RFC 9298 section 3.1
// recommends.
const DefaultUDPIdleTimeout = 2 * time.Minute

// udpTarget is the requested destination of UDP packets.
type udpTarget struct {
	name string     // DNS name; empty: addr is valid
	addr netip.Addr // has no zone
	port uint16     // not 0
}

// udpTemplate is the default template for UDP proxying (RFC 9298 section 2). It
// is used for paths only, so its host is a placeholder.
var udpTemplate = uritemplate.MustNew("https://" + udpTemplateHost + udpPath +
	"{target_host}/{target_port}/")

const udpTemplateHost = "proxy.invalid"

// parseUDPTarget returns the target in a raw request path, as received and not
// decoded. The error is errNotServed if the path does not match the template.
// Any other error is about a variable that violates RFC 9298 section 3.
func parseUDPTarget(path string) (udpTarget, error) {
	rest, ok := strings.CutPrefix(path, udpPath)
	if !ok {
		return udpTarget{}, errNotServed
	}
	values := strings.Split(rest, "/")
	if len(values) != 3 || values[2] != "" {
		return udpTarget{}, fmt.Errorf("request path does not match the template "+
			"%s{target_host}/{target_port}/", udpPath)
	}
	if strings.Contains(rest, ":") {
		return udpTarget{}, errors.New("target_host: colons must be percent-encoded")
	}
	if digits, err := url.PathUnescape(values[1]); err != nil ||
		strings.Trim(digits, "0123456789") != "" {
		return udpTarget{}, fmt.Errorf("target_port %q is not a number", values[1])
	}
	u, err := url.ParseRequestURI(path)
	if err != nil {
		return udpTarget{}, err
	}
	request, err := masque.ParseProxyRequest(&http.Request{
		Method: http.MethodConnect, Proto: udpProtocol, Host: udpTemplateHost, URL: u,
	}, udpTemplate)
	if err != nil {
		return udpTarget{}, err
	}
	host, port, err := net.SplitHostPort(request.Target)
	if err != nil {
		return udpTarget{}, fmt.Errorf("target_host: %w", err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return udpTarget{}, fmt.Errorf("target_port %q is not a number from 1 to 65535", port)
	}
	t := udpTarget{port: uint16(n)}
	// The rules for a target of IP proxying apply, except that prefixes and "*"
	// are not allowed.
	scope, err := connectip.ParseScope(host, "*")
	if err != nil || scope.IsZero() || strings.Contains(host, "/") {
		return udpTarget{}, fmt.Errorf("target_host %q is neither an address nor a DNS name", host)
	}
	if t.name = scope.Name; t.name == "" {
		t.addr = scope.Prefix.Addr()
	}
	return t, nil
}

func (t udpTarget) String() string {
	host := t.name
	if host == "" {
		host = t.addr.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(t.port)))
}

// dialOther calls dialUDP for the address of another host. The error is
// os.ErrPermission for addresses of this host and for multicast addresses.
func dialOther(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	if err := routing.LeavesHost(to.Addr()); err != nil {
		return nil, err
	}
	return dialUDP(ctx, to)
}

// dialUDP opens a socket that never fragments packets (RFC 9298 section 3.1).
// The error is os.ErrPermission for broadcast addresses.
func dialUDP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Control: func(network, _ string, c syscall.RawConn) error {
		var err error
		controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
			if network == "udp6" {
				err = errors.Join(err,
					unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER,
						unix.IPV6_PMTUDISC_DO))
			} else {
				err = errors.Join(err,
					unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER,
						unix.IP_PMTUDISC_DO))
			}
		})
		return errors.Join(controlErr, err)
	}}
	return d.DialContext(ctx, "udp", to.String())
}
