package proxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sys/unix"
)

func TestParseUDPTarget(t *testing.T) {
	for path, want := range map[string]string{
		"192.0.2.7/53/":            "192.0.2.7:53",
		"2001%3Adb8%3A%3a7/65535/": "[2001:db8::7]:65535",
		"dns.example/1/":           "dns.example:1",
		"%64ns.example/%35%33/":    "dns.example:53",
	} {
		t.Run(path, func(t *testing.T) {
			got, err := parseUDPTarget(udpPath + path)
			if err != nil || got.String() != want {
				t.Errorf("got %v, %v, want %s", got, err, want)
			}
		})
	}
	for _, path := range []string{
		"", "/", "//", "/53/", "a.example//", "a.example/53", "a.example/53//", "a.example/53/x",
		"a.example/53/?q",
		"a.example/0/", "a.example/65536/", "a.example/-1/", "a.example/+5/", "a.example/dns/",
		"a.example/%zz/",
		"::1/53/", "%3A%3A1%25eth0/53/", "%3A%3Affff%3A192.0.2.7/53/", "*/53/",
		"192.0.2.0%2F24/53/", "192.0.2.7%2F32/53/",
		"256.1.1.1/53/", "-a.example/53/", "a%00b/53/", "a%0d%0ab/53/", "user@a.example/53/",
		"%252e/53/", "%zz/53/",
	} {
		t.Run("refused "+path, func(t *testing.T) {
			got, err := parseUDPTarget(udpPath + path)
			if err == nil || errors.Is(err, errNotServed) {
				t.Errorf("got %v, %v, want an error about a variable", got, err)
			}
		})
	}
	for _, path := range []string{"", "/", "/.well-known/masque/ip/*/*/", "/.well-known/masque/udp",
		"/x" + udpPath + "a.example/53/"} {
		t.Run("not served "+path, func(t *testing.T) {
			if got, err := parseUDPTarget(path); !errors.Is(err, errNotServed) {
				t.Errorf("got %v, %v, want %v", got, err, errNotServed)
			}
		})
	}
}

// FuzzParseUDPTarget checks that an accepted target can be dialed, and that its
// path, written again, has the same target.
func FuzzParseUDPTarget(f *testing.F) {
	for _, s := range []string{"192.0.2.7/53/", "2001%3Adb8%3A%3A7/443/", "dns.example/53/", "*/1/",
		"%2F/0/", "a%0d%0a/53/"} {
		f.Add(udpPath + s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		target, err := parseUDPTarget(path)
		if err != nil {
			return
		}
		host, port, err := net.SplitHostPort(target.String())
		if err != nil || port == "0" || strings.ContainsAny(host, "%/ \x00\r\n") ||
			(target.name == "") != target.addr.IsValid() {
			t.Fatalf("%q gave %+v", path, target)
		}
		again, err := parseUDPTarget(udpPath +
			strings.ReplaceAll(url.PathEscape(host), ":", "%3A") + "/" + port + "/")
		if err != nil || again != target {
			t.Fatalf("%q gave %v, and then %v, %v", path, target, again, err)
		}
	})
}

// dialed stands for the network beyond the proxy: it maps targets to the
// addresses of sockets on loopback.
type dialed map[netip.AddrPort]string

func (d dialed) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	local, ok := d[to]
	if !ok {
		return nil, &net.OpError{Op: "dial", Net: "udp",
			Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}
	}
	return new(net.Dialer).DialContext(ctx, "udp", local)
}

// echo starts a UDP server that sends every packet back.
func echo(t *testing.T) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

var target4 = netip.MustParseAddrPort("192.0.2.7:53")

// withUDP returns a change of a Config that turns on UDP proxying, with to as
// the target at 192.0.2.7 and 2001:db8::7, port 53, followed by change.
func withUDP(to net.PacketConn, change func(*Config)) func(*Config) {
	local := to.LocalAddr().String()
	return func(c *Config) {
		c.ConnectUDP = true
		c.DialUDP = dialed{target4: local, netip.MustParseAddrPort("[2001:db8::7]:53"): local}.dial
		if change != nil {
			change(c)
		}
	}
}

func TestUDPRequests(t *testing.T) {
	h3 := scoped(t, withUDP(echo(t), func(c *Config) {
		c.LocalNetworks = func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("192.0.2.1/30")}, nil
		}
		c.Advertise = append(c.Advertise, netip.MustParsePrefix("0.0.0.0/5"),
			netip.MustParsePrefix("127.0.0.0/8"),
			netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/4"),
			netip.MustParsePrefix("10.0.0.0/8"))
	}))
	for path, want := range map[string]struct {
		status int
		kind   string
	}{
		"192.0.2.7/53/":         {200, ""},
		"2001%3Adb8%3A%3A7/53/": {200, ""},
		"target.example/53/":    {200, ""},
		"192.0.2.7/0/":          {400, "http_request_error"},
		"192.0.2.7/x/":          {400, "http_request_error"},
		"2001:db8::7/53/":       {400, "http_request_error"},
		"192.0.2.7/53/more":     {400, "http_request_error"},
		"127.0.0.1/53/":         {403, "destination_ip_prohibited"}, // loopback
		"0.0.0.0/53/":           {403, "destination_ip_prohibited"},
		"169.254.169.254/80/":   {403, "destination_ip_prohibited"}, // metadata
		"fe80%3A%3A1/53/":       {403, "destination_ip_prohibited"}, // link-local
		"224.0.0.251/5353/":     {403, "destination_ip_prohibited"}, // multicast
		"192.0.2.1/53/":         {403, "destination_ip_prohibited"}, // the proxy's own
		// the proxy's own in the tunnel
		"10.77.0.1/53/":                {403, "destination_ip_prohibited"},
		"10.77.0.9/53/":                {403, "destination_ip_prohibited"}, // a client
		"192.0.2.200/53/":              {403, "destination_ip_prohibited"}, // configured
		"198.51.100.1/53/":             {403, "destination_ip_prohibited"}, // not advertised
		"denied.example/53/":           {403, "destination_ip_prohibited"},
		"outside.example/53/":          {403, "destination_ip_prohibited"},
		"192.0.2.9/53/":                {502, "destination_ip_unroutable"},
		"unknown.example/53/":          {502, "dns_error"},
		"slow.example/53/":             {504, "dns_timeout"},
		"../ip/*/*/":                   {400, "http_request_error"},
		strings.Repeat("a", 300) + "/": {400, "http_request_error"},
	} {
		t.Run(path, func(t *testing.T) {
			rsp, str := request(t, h3, "CONNECT", udpProtocol, udpPath+path, nil)
			if rsp.StatusCode != want.status {
				t.Errorf("status %d, want %d", rsp.StatusCode, want.status)
			}
			if want.status != 200 {
				if kind, _ := proxyStatus(t, rsp); kind != want.kind {
					t.Errorf("Proxy-Status says %s, want %s", kind, want.kind)
				}
			}
			if got := rsp.Header.Get("Capsule-Protocol"); (got == "?1") != (want.status == 200) {
				t.Errorf("Capsule-Protocol %q with status %d", got, want.status)
			}
			str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
			str.CancelWrite(quic.StreamErrorCode(http3.ErrCodeNoError))
		})
	}
	if rsp, _ := request(t, h3, "CONNECT", udpProtocol, anyPath, nil); rsp.StatusCode != 404 {
		t.Errorf("path of another protocol: status %d", rsp.StatusCode)
	}
}

// TestUDPToClients checks that client_to_client allows the addresses of clients
// as targets, but not the proxy's.
func TestUDPToClients(t *testing.T) {
	h3 := scoped(t, withUDP(echo(t), func(c *Config) {
		c.ClientToClient, c.Advertise = true, []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	}))
	for path, want := range map[string]int{"10.77.0.9/53/": 502, "10.77.0.1/53/": 403} {
		t.Run(path, func(t *testing.T) {
			if rsp, _ := request(t, h3, "CONNECT", udpProtocol, udpPath+path,
				nil); rsp.StatusCode != want {
				t.Errorf("status %d, want %d", rsp.StatusCode, want)
			}
		})
	}
}

func TestUDPTurnedOff(t *testing.T) {
	h3 := scoped(t, withUDP(echo(t), func(c *Config) { c.ConnectUDP = false }))
	if rsp, _ := request(t, h3, "CONNECT", udpProtocol, udpPath+"192.0.2.7/53/",
		nil); rsp.StatusCode != 501 {
		t.Errorf("status %d, want 501", rsp.StatusCode)
	}
}

func TestUDPUnauthenticated(t *testing.T) {
	h3 := scoped(t, withUDP(echo(t), func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, noUsers{}
	}))
	for _, path := range []string{"192.0.2.7/53/", "192.0.2.7/0/", "127.0.0.1/53/",
		"slow.example/53/"} {
		t.Run(path, func(t *testing.T) {
			rsp, _ := request(t, h3, "CONNECT", udpProtocol, udpPath+path,
				http.Header{"Authorization": {"Bearer guess"}})
			if rsp.StatusCode != 401 || rsp.Header.Get("Proxy-Status") != "" {
				t.Errorf("status %d, header %v", rsp.StatusCode, rsp.Header)
			}
		})
	}
}

// TestUDPLimits checks that flows and tunnels have limits of their own, that
// the client is told which limit was reached, and that a refused flow leaves no
// socket open.
func TestUDPLimits(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config)
		want   int // status of requests above the limit
	}{
		"all users": {func(c *Config) { c.MaxSessions, c.MaxUDPFlows = 1, 1 }, 503},
		"one user": {func(c *Config) {
			c.Methods, c.Users, c.MaxSessionsPerUser, c.MaxUDPFlowsPerUser = []string{MethodToken},
				oneUser{}, 1, 1
		}, 429},
	} {
		t.Run(name, func(t *testing.T) {
			var open atomic.Int32
			h3 := scoped(t, withUDP(echo(t), func(c *Config) {
				tc.change(c)
				dial := c.DialUDP
				c.DialUDP = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
					conn, err := dial(ctx, to)
					open.Add(1)
					return counted{conn, &open}, err
				}
			}))
			header := http.Header{"Authorization": {"Bearer secret"}}
			for _, r := range []struct {
				protocol, path string
				status         int
				counted        string // in the details of the refusal
			}{
				{udpProtocol, udpPath + "192.0.2.7/53/", 200, ""},
				{udpProtocol, udpPath + "192.0.2.7/53/", tc.want, "UDP flows"},
				{"connect-ip", anyPath, 200, ""},
				{"connect-ip", anyPath, tc.want, "sessions"},
			} {
				rsp, _ := request(t, h3, "CONNECT", r.protocol, r.path, header)
				if rsp.StatusCode != r.status {
					t.Errorf("%s: status %d, want %d", r.protocol, rsp.StatusCode, r.status)
				}
				if r.counted == "" {
					continue
				}
				kind, _ := proxyStatus(t, rsp)
				if s := rsp.Header.Get("Proxy-Status"); kind != "connection_limit_reached" ||
					!strings.Contains(s, `details="too many `+r.counted) {
					t.Errorf("%s: Proxy-Status says %s", r.protocol, s)
				}
			}
			if n := open.Load(); n != 1 {
				t.Errorf("%d sockets are open, want 1", n)
			}
		})
	}
}

// counted is a socket that decrements open when it is closed.
type counted struct {
	net.Conn
	open *atomic.Int32
}

func (c counted) Close() error {
	c.open.Add(-1)
	return c.Conn.Close()
}

// TestDialUDP checks that packets to targets are never fragmented, and do not
// go to broadcast addresses.
func TestDialUDP(t *testing.T) {
	for to, option := range map[string][2]int{
		"127.0.0.1:9": {unix.IPPROTO_IP, unix.IP_MTU_DISCOVER},
		"[::1]:9":     {unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER},
	} {
		t.Run(to, func(t *testing.T) {
			c, err := dialUDP(t.Context(), netip.MustParseAddrPort(to))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			raw, err := c.(*net.UDPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var value int
			controlErr := raw.Control(func(fd uintptr) {
				value, err = unix.GetsockoptInt(int(fd), option[0], option[1])
			})
			if err := errors.Join(err, controlErr); err != nil || value != unix.IP_PMTUDISC_DO {
				t.Errorf("path MTU discovery %d, %v, want %d", value, err, unix.IP_PMTUDISC_DO)
			}
		})
	}
	if c, err := dialUDP(t.Context(), netip.MustParseAddrPort("127.255.255.255:9")); !errors.Is(err,
		os.ErrPermission) {
		t.Errorf("broadcast address: %v, %v", c, err)
	}
}
