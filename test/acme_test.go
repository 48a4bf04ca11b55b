package test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"masquevpn/internal/dnstest"
	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// caName is the name of the ACME server, which runs on the target.
const caName = "acme.example"

// caLife is the validity of the certificates that the ACME server issues. The
// proxy renews them after two thirds of it.
const caLife = 30 * time.Second

// proxyInside is the proxy's address on the link to the target.
var proxyInside = netip.MustParseAddr("192.0.2.1")

// acmeServer is the ACME server pebble, which runs on the target.
type acmeServer struct {
	p    *pair
	root string      // file with the authority of the server's own certificate
	args []string    // command line
	dns  atomic.Bool // the server's resolver knows the proxy's name
}

// newACMEServer prepares an ACME server without starting it. The server
// validates challenges on the standard ports and resolves names with a name
// server on the target.
func newACMEServer(p *pair) *acmeServer {
	p.t.Helper()
	dir := p.t.TempDir()
	authority, root, err := pki.NewAuthority("ACME server", time.Now())
	check(p.t, err)
	own, err := authority.Server(caName, nil, time.Now())
	check(p.t, err)
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress":             netip.AddrPortFrom(lab.TargetIPv4, 14000).String(),
		"managementListenAddress":   netip.AddrPortFrom(lab.TargetIPv4, 15000).String(),
		"certificate":               filepath.Join(dir, "own.crt"),
		"privateKey":                filepath.Join(dir, "own.key"),
		"httpPort":                  80,
		"tlsPort":                   443,
		"certificateValidityPeriod": int(caLife.Seconds()),
	}})
	check(p.t, err)
	resolver := netip.AddrPortFrom(lab.TargetIPv4, 53).String()
	s := &acmeServer{p: p, root: filepath.Join(dir, "root.crt"),
		args: []string{"pebble", "-config", filepath.Join(dir, "config.json"), "-dnsserver",
			resolver}}
	names, err := p.Target.ListenPacket("udp", resolver)
	check(p.t, err)
	dnstest.Serve(p.t, names, func(name string) ([]netip.Addr, error) {
		if name == lab.ProxyName && s.dns.Load() {
			return []netip.Addr{proxyInside}, nil
		}
		return nil, dnstest.ErrNotFound
	})
	for name, data := range map[string][]byte{"own.crt": own.Cert, "own.key": own.Key,
		"root.crt": root.Cert, "config.json": config} {
		check(p.t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	check(p.t, p.Proxy.Resolve(caName, lab.TargetIPv4))
	return s
}

// start starts the server and waits until it answers.
func (s *acmeServer) start() *lab.Cmd {
	s.p.t.Helper()
	c := s.p.Target.Command(s.p.ctx, s.args[0], s.args[1:]...)
	// Validate challenges at once, and validate each one.
	c.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0")
	check(s.p.t, c.Start())
	s.p.eventually("pebble answers", func() bool {
		_, err := s.get("/roots/0")
		return err == nil
	})
	return c
}

// issuer writes the authority of the issued certificates to a file and returns
// its path.
func (s *acmeServer) issuer() string {
	s.p.t.Helper()
	data, err := s.get("/roots/0")
	check(s.p.t, err)
	file := filepath.Join(s.p.t.TempDir(), "issuer.crt")
	check(s.p.t, os.WriteFile(file, data, 0o600))
	return file
}

// get sends a request to the management interface of the server.
func (s *acmeServer) get(path string) ([]byte, error) {
	data, err := os.ReadFile(s.root)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(data)
	c := http.Client{Transport: &http.Transport{
		DialContext:     s.p.Proxy.DialContext,
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: caName}, DisableKeepAlives: true,
	}}
	rsp, err := c.Get("https://" + netip.AddrPortFrom(lab.TargetIPv4, 15000).String() + path)
	if err != nil {
		return nil, err
	}
	defer rsp.Body.Close()
	return io.ReadAll(rsp.Body)
}

// expiry returns the end of the validity of the proxy's certificate.
func (p *pair) expiry() time.Time {
	p.t.Helper()
	var s struct {
		Certificate struct {
			Until time.Time `json:"until"`
		} `json:"certificate"`
	}
	check(p.t, json.Unmarshal([]byte(p.must(p.Proxy, "masque-proxy", "status", "--json")), &s))
	return s.Certificate.Until
}

// The proxy obtains its certificate from an ACME server, reports the reason
// while it has none, and renews it without disturbing a session.
func TestACME(t *testing.T) {
	p := newHosts(t, options{clients: 2})
	ca := newACMEServer(p)
	p.must(p.Proxy, "masque-proxy", "init", "--name", lab.ProxyName, "--acme",
		"admin@"+lab.ProxyName, "--agree-tos",
		"--acme-directory", "https://"+caName+":14000/dir", p.dir)
	p.editProxyConfig("#ca = \"acme-ca.crt\"", fmt.Sprintf("ca = %q", ca.root))
	p.editProxyConfig("masquerade = true", "masquerade = false")

	p.server = p.Proxy.Command(p.ctx, program("masque-proxy"), "run", "-c", p.config())
	check(t, p.server.Start())
	// waits waits until the proxy, which does not serve yet, reports all of the
	// reasons in its status.
	waits := func(reasons ...string) {
		t.Helper()
		p.eventually("the status contains: "+strings.Join(reasons, ", "), func() bool {
			c := p.Proxy.Command(p.ctx, program("masque-proxy"), "status")
			out, _ := c.CombinedOutput()
			for _, r := range append(reasons, "no certificate yet") {
				if !strings.Contains(string(out), r) {
					return false
				}
			}
			return c.ExitCode() == 3
		})
	}
	waits("the ACME server https://acme.example:14000/dir cannot be asked", "connection refused",
		"check tls.acme.directory")
	taken, err := p.Proxy.Listen("tcp", ":443")
	check(t, err)
	ca.start()
	p.must(p.Proxy, "masque-proxy", "reload") // tries again at once
	waits("TCP :443, where the ACME server asks for the challenge tls-alpn-01, is in use",
		"ss -tlnp")
	check(t, taken.Close())
	p.must(p.Proxy, "masque-proxy", "reload")
	waits("the ACME server refuses: ", "proxy.example",
		"let all A and AAAA records of proxy.example lead to this host, and TCP port 443 in")
	ca.dns.Store(true)
	p.must(p.Proxy, "masque-proxy", "reload")
	p.eventually("the proxy serves", func() bool {
		return p.Proxy.Command(p.ctx, program("masque-proxy"), "status").Run() == nil
	})

	invite := func(user string) string {
		file := filepath.Join(t.TempDir(), user+".toml")
		p.must(p.Proxy, "masque-proxy", "invite", user, "-c", p.config(), "--ca", ca.issuer(),
			"-o", file)
		return file
	}
	p.up(p.Client, invite("alice"))
	before, first := p.status(p.Client, "alice"), p.expiry()
	conn, received := p.flow(p.Client, p.Target, lab.TargetIPv4, 5*patience)
	const size = 20 << 20
	data := content(size)
	for sent := int64(0); sent < size/2 || time.Now().Before(first); sent += size / 1000 {
		// Send at least until the first certificate has expired.
		_, err := io.CopyN(conn, data, max(0, min(size/1000, size/2-sent)))
		check(t, err)
		time.Sleep(20 * time.Millisecond)
	}
	if renewed := p.expiry(); !renewed.After(first) {
		t.Errorf("the certificate ends at %v, the first one ended at %v", renewed, first)
	}
	p.up(p.Clients[1], invite("bob")) // fails if the certificate has expired
	_, err = io.Copy(conn, data)
	check(t, err)
	conn.Close()
	if got, want := <-received, digest(content(size)); got != want {
		t.Errorf("received %s, sent %s", got, want)
	}
	p.wantSameSession(before)

	// Use the other kind of challenge. The key of stateless resets outlives the
	// certificates, so the client learns of the restart at once.
	p.editProxyConfig("#challenge = \"http-01\" ", "challenge = \"http-01\" ")
	check(t, p.Proxy.Do(func() error { return os.RemoveAll("/var/lib/masque/acme/certificates") }))
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(0)
	p.ping(p.Client, lab.TargetIPv4)
	check(t, p.Client.Do(func() error {
		text, err := os.ReadFile("/run/masque/alice.log")
		if err == nil && !strings.Contains(string(text), "the proxy was restarted") {
			t.Errorf("the log does not mention the restart:\n%s", text)
		}
		return err
	}))
}
