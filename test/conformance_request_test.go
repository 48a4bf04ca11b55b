package test

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/client"
	"masquevpn/internal/cli"
	"masquevpn/internal/logtest"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing"
)

// The client refuses an invalid or malicious URI template before it sends a
// packet (RFC 9484 section 3).
func TestWireBadTemplatesSendNothing(t *testing.T) {
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(t, err)
	defer socket.Close()
	at := socket.LocalAddr().String()
	for name, template := range map[string]string{
		"operator":         "https://" + at + "/{+target}/{ipproto}/",
		"level 4":          "https://" + at + "/{target*}/{ipproto}/",
		"variable in host": "https://{target}/",
		"not absolute":     "/.well-known/masque/ip/{target}/{ipproto}/",
		"scheme":           "http://" + at + "/{target}/",
		"no path":          "https://" + at + "{?target}",
		"fragment":         "https://" + at + "/{target}/#x",
		"user information": "https://user:secret@" + at + "/{target}/",
		"line break":       "https://" + at + "/{target}/\\r\\nx: y",
		"not ASCII":        "https://" + at + "/\u00e9/{target}/",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "bad.toml")
			check(t, os.WriteFile(file, []byte("proxy = \""+template+"\"\n"), 0o600))
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			sent := make(chan int)
			go func() { sent <- countPackets(socket, cancel) }()
			c := exec.CommandContext(ctx, program("masque-client"), "run", "-c", file)
			out, _ := c.CombinedOutput()
			if code := c.ProcessState.ExitCode(); code != 2 ||
				!strings.Contains(lastLine(out), "proxy") {
				t.Errorf("exit code %d:\n%s", code, out)
			}
			end, err := net.Dial("udp", at)
			check(t, err)
			defer end.Close()
			_, err = end.Write(endOfPackets)
			check(t, err)
			if n := <-sent; n > 0 {
				t.Errorf("%d packets were sent", n)
			}
		})
	}
}

// endOfPackets ends countPackets. Loopback keeps the order of packets, so all
// earlier packets have arrived before it.
var endOfPackets = []byte("end")

// countPackets counts the packets before endOfPackets and calls each for every
// one of them.
func countPackets(socket *net.UDPConn, each func()) (n int) {
	buf := make([]byte, 2048)
	for {
		size, err := socket.Read(buf)
		if err != nil || bytes.Equal(buf[:size], endOfPackets) {
			return n
		}
		n++
		each()
	}
}

// The request has the form of RFC 9484 section 4.4, and target and ipproto are
// never empty.
func TestWireClientRequest(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	_, port, err := net.SplitHostPort(r.addr)
	check(t, err)
	for name, tc := range map[string]struct {
		change func(*client.Config)
		path   string
	}{
		"no scope": {func(*client.Config) {}, "/.well-known/masque/ip/%2A/%2A/"},
		"prefix": {func(c *client.Config) {
			c.Target, c.IPProto = "192.0.2.0/24", "6"
		}, "/.well-known/masque/ip/192.0.2.0%2F24/6/"},
		"IPv6": {func(c *client.Config) {
			c.Target = "2001:db8::1"
		}, "/.well-known/masque/ip/2001%3Adb8%3A%3A1/%2A/"},
		"name": {func(c *client.Config) {
			c.Target, c.IPProto = "host.example", "17"
		}, "/.well-known/masque/ip/host.example/17/"},
		"query": {func(c *client.Config) {
			c.Proxy = "https://" + r.addr + "/vpn{?target,ipproto}"
		}, "/vpn?target=%2A&ipproto=%2A"},
		"no variables": {func(c *client.Config) {
			c.Proxy = "https://" + r.addr + "/vpn"
		}, "/vpn"},
		"extra variable": {func(c *client.Config) {
			c.Proxy = "https://" + r.addr + "/{tenant}/{target}"
		}, "//%2A"},
	} {
		t.Run(name, func(t *testing.T) {
			c := r.startClient(tc.change)
			conn := r.accept(masqueSettings)
			s, fields := conn.request()
			want := []string{
				":method: CONNECT", ":protocol: connect-ip", ":scheme: https",
				":authority: 127.0.0.1:" + port, ":path: " + tc.path,
				"capsule-protocol: ?1",
			}
			for _, f := range want {
				if !slices.Contains(fields, f) {
					t.Errorf("the request lacks %q: %q", f, fields)
				}
			}
			if got := <-conn.settings; got[settingDatagram] != 1 {
				t.Errorf("the client's SETTINGS are %v", got)
			}
			s.sendHeaders(":status: 200") // Capsule-Protocol is not required
			nextCapsule[*capsule.AddressRequest](t, capsule.NewReader(s, 1<<16))
			c.stop()
		})
	}
}

// The client sends no request before it received SETTINGS, nor to a server
// whose SETTINGS lack Extended CONNECT or HTTP Datagrams (RFC 9220 section 3,
// RFC 9297 section 2.1.1).
func TestWireClientReadsSettings(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	for missing, s := range map[string]settings{
		"Extended CONNECT": {settingDatagram: 1},
		"HTTP Datagrams":   {settingExtendedConnect: 1, settingDatagram: 0},
	} {
		t.Run(missing, func(t *testing.T) {
			c := r.startClient(nil)
			conn := r.accept(nil)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if _, err := conn.AcceptStream(ctx); err == nil {
				t.Fatal("a request was sent before SETTINGS")
			}
			conn.sendSettings(s)
			e := c.failure()
			if e.Kind != client.KindUsage || !strings.Contains(e.Error(), missing) {
				t.Errorf("kind %d, %q", e.Kind, e)
			}
			if _, err := conn.AcceptStream(t.Context()); err == nil {
				t.Error("a request was sent")
			}
		})
	}
}

// Only a well-formed response with a success status opens the tunnel (RFC 9484
// section 4.5, RFC 9297 section 3.2).
func TestWireClientChecksResponse(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	for _, tc := range []struct {
		response string // fields, separated by commas
		kind     client.Kind
		want     string // in the error
	}{
		{":status: 301,location: https://proxy.example/", client.KindUsage, "status 301"},
		{":status: 204", client.KindUnreachable, "204"},
		{":status: 205", client.KindUnreachable, "205"},
		{":status: 206", client.KindUnreachable, "206"},
		{":status: 200,content-length: 0", client.KindUnreachable, "Content-Length"},
		{":status: 200,content-type: text/html", client.KindUnreachable, "Content-Type"},
		{":status: 400", client.KindUsage, "status 400"},
		{":status: 401", client.KindCredentials, "credentials"},
		{":status: 403,proxy-status: p; error=destination_ip_prohibited", client.KindRefused,
			"destination_ip_prohibited"},
		{":status: 429", client.KindFailure, "status 429"},
		{":status: 502,proxy-status: p; error=dns_error", client.KindFailure, "dns_error"},
	} {
		t.Run(tc.response, func(t *testing.T) {
			c := r.startClient(nil)
			s, _ := r.accept(masqueSettings).request()
			s.sendHeaders(strings.Split(tc.response, ",")...)
			s.send(granted...) // the client ignores it
			if e := c.failure(); e.Kind != tc.kind || !strings.Contains(e.Error(), tc.want) {
				t.Errorf("kind %d, %q", e.Kind, e)
			}
			if len(c.network.Last().Addresses) > 0 {
				t.Error("addresses were applied")
			}
		})
	}
	t.Run("endless interim responses", func(t *testing.T) {
		c := r.startClient(nil)
		s, _ := r.accept(masqueSettings).request()
		for range 20 {
			s.sendHeaders(":status: 103")
		}
		if e := c.failure(); !strings.Contains(e.Error(), "no final one") {
			t.Errorf("%q", e)
		}
	})
	t.Run("another success status, after an interim response", func(t *testing.T) {
		c := r.startClient(nil)
		s, _ := r.accept(masqueSettings).request()
		s.sendHeaders(":status: 103", "link: </x>")
		s.sendHeaders(":status: 299")
		s.send(granted...)
		c.awaitNetwork(func(state routing.State) bool { return len(state.Addresses) == 2 })
	})
}

// The proxy matches the path of a request without decoding it first (RFC 9484
// section 4.6).
func TestWirePaths(t *testing.T) {
	c := startWireProxy(t, func(c *proxy.Config) {
		c.Template = "https://" + proxyName + "/vpn{?target,ipproto}"
	}).dial(masqueSettings)
	for path, want := range map[string]string{
		"*/*":                     "200",
		"%2A/%2a":                 "200",
		"192.0.2.1/*":             "200",
		"192.0.2.0%2F24/6":        "200",
		"2001%3Adb8%3A%3A1/0":     "200",
		"2001%3adb8%3a%3a%2f32/*": "200",
		"2001:db8::1/*":           "400",
		"192.0.2.0%252F24/*":      "400",
		"192.0.2.1%2F24/*":        "400",
		"192.0.2.0%2F33/*":        "400",
		"192.0.2.0%2F024/*":       "400",
		"a%2F0/*":                 "400",
		"%3A%3A1%2F129/*":         "400",
		"192.0.2.256/*":           "400",
		"fe80%3A%3A1%25eth0/*":    "400",
		"*/256":                   "400",
		"*/-1":                    "400",
		"*/006":                   "400",
		"*/tcp":                   "400",
		"/*":                      "400",
		"*/":                      "400",
		"*/*/x":                   "400",
		"host%00.example/*":       "400",
		"host%0D%0A.example/*":    "400",
		"user%40host.example/*":   "400",
	} {
		t.Run(path, func(t *testing.T) {
			s := c.in(t).open(connectIP("/.well-known/masque/ip/" + path + "/")...)
			status, fields := s.response()
			if status != want {
				t.Errorf("status %q, want %s", status, want)
			}
			if got := field(fields, "capsule-protocol"); (got == "?1") != (status == "200") {
				t.Errorf("Capsule-Protocol %q with status %s", got, status)
			}
			s.CancelWrite(0)
			s.CancelRead(0)
		})
	}
	for path, want := range map[string]string{"/vpn?target=*&ipproto=*": "200",
		"/vpn?target=&ipproto=*": "400", "/other": "404"} {
		t.Run(path, func(t *testing.T) {
			if status, _ := c.in(t).open(connectIP(path)...).response(); status != want {
				t.Errorf("status %q, want %s", status, want)
			}
		})
	}
}

// The proxy resets the stream of a malformed request and no other stream (RFC
// 9114 section 4.1.2, RFC 9220).
func TestWireMalformedRequests(t *testing.T) {
	p := startWireProxy(t, nil)
	other := p.tunnel()
	for name, fields := range map[string][]string{
		"no path": {":method: CONNECT", ":protocol: connect-ip", ":scheme: https",
			":authority: p"},
		"no scheme": {":method: CONNECT", ":protocol: connect-ip", ":path: " + anyPath,
			":authority: p"},
		"no authority": {":method: CONNECT", ":protocol: connect-ip", ":scheme: https",
			":path: " + anyPath},
		"two paths": connectIP(anyPath, ":path: /"),
		"pseudo-header too late": {":method: CONNECT", "a: b", ":protocol: connect-ip",
			":scheme: https", ":path: " + anyPath, ":authority: p"},
		"unknown pseudo-header":  connectIP(anyPath, ":x: y"),
		"response pseudo-header": connectIP(anyPath, ":status: 200"),
		"protocol with GET": {":method: GET", ":protocol: connect-ip", ":scheme: https",
			":path: " + anyPath, ":authority: p"},
		"line break in the path": connectIP("/.well-known/masque/ip/*/*/\r\nx: y"),
		"user information": {":method: CONNECT", ":protocol: connect-ip", ":scheme: https",
			":path: " + anyPath, ":authority: u:s@p"},
		"hop-by-hop field": connectIP(anyPath, "connection: close"),
	} {
		t.Run(name, func(t *testing.T) {
			other.conn.in(t).open(fields...).wantReset(http3.ErrCodeMessageError)
		})
	}
	other.checkAlive()
	if status, _ := other.conn.open(":method: CONNECT", ":protocol: websocket", ":scheme: https",
		":path: "+anyPath, ":authority: p").response(); status != "501" {
		t.Errorf("another protocol: status %q", status)
	}
}

// The SETTINGS of the proxy contain Extended CONNECT and HTTP Datagrams. The
// proxy sends no datagram before the SETTINGS of the client, and none to a
// client whose SETTINGS lack HTTP Datagrams (RFC 9297 section 2.1.1).
func TestWireProxyReadsSettings(t *testing.T) {
	p := startWireProxy(t, nil)
	t.Run("late", func(t *testing.T) {
		c := p.dial(nil)
		if got := <-c.settings; got[settingExtendedConnect] != 1 || got[settingDatagram] != 1 {
			t.Errorf("the proxy's SETTINGS are %v", got)
		}
		s := c.open(connectIP(anyPath)...)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := c.ReceiveDatagram(ctx); err == nil {
			t.Error("a datagram was sent before SETTINGS")
		}
		c.sendSettings(masqueSettings)
		if status, _ := s.response(); status != "200" {
			t.Errorf("status %q", status)
		}
		p.tunnelOn(c).checkAlive()
	})
	t.Run("without datagrams", func(t *testing.T) {
		s := p.dial(settings{settingExtendedConnect: 1}).open(connectIP(anyPath)...)
		if status, fields := s.response(); status != "400" ||
			!strings.Contains(field(fields, "proxy-status"), "http_request_error") {
			t.Errorf("answered %q", fields)
		}
	})
}

// wireUsers has one user, alice, whose token is "secret".
type wireUsers struct{}

func (wireUsers) Reserved(netip.Prefix, string) bool { return false }

func (wireUsers) ByName(name string) (proxy.User, bool) {
	return proxy.User{Name: name}, name == "alice"
}

func (wireUsers) ByToken(token string) (proxy.User, bool) {
	return proxy.User{Name: "alice"}, token == "secret"
}

// Without valid credentials, the proxy assigns and forwards nothing, and all
// refusals look the same (RFC 9484 section 11).
func TestWireUnauthenticated(t *testing.T) {
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Methods, c.Users = []string{proxy.MethodToken}, wireUsers{}
	})
	c := p.dial(masqueSettings)
	var first []string
	for _, path := range []string{anyPath, "/.well-known/masque/ip/*/256/",
		"/.well-known/masque/ip/no-such-host.invalid/*/", "/other"} {
		for _, credentials := range [][]string{nil, {"authorization: Bearer guess"},
			{"authorization: Bearer"}, {"authorization: Basic YTpi"}} {
			s := c.open(connectIP(path, credentials...)...)
			s.send(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
				Prefix: any4}}})
			pkt, _ := newEcho(inside4, beyond4)
			s.sendPacket(pkt)
			status, fields := s.response()
			fields = slices.DeleteFunc(fields, func(f string) bool {
				return strings.HasPrefix(f, "date: ")
			})
			slices.Sort(fields)
			if first == nil {
				first = fields
			}
			if status != "401" || !slices.Equal(fields, first) {
				t.Errorf("%s, %q: %q, elsewhere %q", path, credentials, fields, first)
			}
		}
	}
	if st := p.Status(); st.Leased["ipv4"] != 0 || st.Sessions != 0 {
		t.Errorf("%+v", st)
	}
	s := c.open(connectIP(anyPath, "authorization: Bearer secret")...)
	if status, _ := s.response(); status != "200" {
		t.Fatalf("with good credentials: status %q", status)
	}
	s.send(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1, Prefix: any4}}})
	assigned := nextCapsule[*capsule.AddressAssign](t, capsule.NewReader(s, 1<<16)).Addresses
	pkt, id := newEcho(assigned[0].Prefix.Addr(), beyond4)
	s.send(packetCapsule(pkt))
	awaitOnly(t, p.device.Receive, id)
}

// The client does not retry when the server does not speak HTTP/3 or refuses
// the request for good, and its error names the reason.
func TestWireNoRetryStorm(t *testing.T) {
	for name, tc := range map[string]struct {
		protocol string // negotiated by ALPN
		status   string // field of the response; "": no response
		kind     client.Kind
		want     string // in the error
	}{
		"wrong ALPN": {"h2", "", client.KindUsage, "does not speak HTTP/3"},
		"refused credentials": {http3.NextProtoH3, ":status: 401", client.KindCredentials,
			"credentials"},
		"wrong template": {http3.NextProtoH3, ":status: 404", client.KindUsage, "404"},
	} {
		t.Run(name, func(t *testing.T) {
			r := startRawServer(t, pkitest.New(proxyName), tc.protocol)
			c := r.startClient(func(c *client.Config) { c.Reconnect = true })
			if tc.status != "" {
				s, _ := r.accept(masqueSettings).request()
				s.sendHeaders(tc.status)
			}
			if e := c.failure(); e.Kind != tc.kind || !strings.Contains(e.Error(), tc.want) {
				t.Errorf("kind %d, %q", e.Kind, e)
			}
			if n := c.Status().Reconnects; n != 0 {
				t.Errorf("%d reconnects", n)
			}
		})
	}
}

// The log has one line for each request, without control characters, whatever
// the client sent.
func TestWireLogsAreEscaped(t *testing.T) {
	paths := []string{
		"/.well-known/masque/ip/a%0D%0Alevel=ERROR%20msg=forged/*/",
		"/.well-known/masque/ip/a%00b/*/", "/.well-known/masque/ip/a%1B[31mb/*/",
		"/.well-known/masque/ip/a%C2%9B31mb/*/", "/.well-known/masque/ip/a%7Fb/*/",
		"/.well-known/masque/ip/*/%0A/", "/%0Aother", "/x\x85y", "/x\u009by",
	}
	for _, format := range []string{cli.FormatText, cli.FormatJSON} {
		t.Run(format, func(t *testing.T) {
			var log logtest.Buffer
			logger := cli.LogOptions{Format: format}.Logger(&log) // as in the program
			c := startWireProxy(t, func(c *proxy.Config) { c.Logger = logger }).dial(masqueSettings)
			before := len(log.Lines(""))
			for _, path := range paths {
				if status, _ := c.open(connectIP(path)...).response(); status != "400" &&
					status != "404" {
					t.Errorf("%q: status %q", path, status)
				}
			}
			got := log.Lines("")[before:]
			if len(got) != len(paths) {
				t.Errorf("%d lines for %d requests:\n%s", len(got), len(paths),
					strings.Join(got, "\n"))
			}
			for _, line := range got {
				if !strings.Contains(line, "request refused") ||
					strings.ContainsFunc(line, func(r rune) bool {
						return !strconv.IsPrint(r)
					}) {
					t.Errorf("not escaped: %q", line)
				}
			}
		})
	}
}
