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

// caLife is how long its certificates are good, so that they are renewed every
// two thirds of that.
const caLife = 30 * time.Second

// proxyInside is the proxy's address on the target's side.
var proxyInside = netip.MustParseAddr("192.0.2.1")

// acmeServer is pebble.
type acmeServer struct {
	p    *pair
	root string      // file with the authority of the server itself
	args []string    // the program with its arguments
	dns  atomic.Bool // the proxy's name is known
}

// newACMEServer prepares the server on the target. It asks for challenges on
// the standard ports, and a name server there for names.
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

func (s *acmeServer) start() *lab.Cmd {
	s.p.t.Helper()
	c := s.p.Target.Command(s.p.ctx, s.args[0], s.args[1:]...)
	// Challenges are asked at once, and each time anew.
	c.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0")
	check(s.p.t, c.Start())
	s.p.eventually("pebble answers", func() bool {
		_, err := s.get("/roots/0")
		return err == nil
	})
	return c
}

// issuer writes the authority of the certificates that the server issues into a
// file.
func (s *acmeServer) issuer() string {
	s.p.t.Helper()
	data, err := s.get("/roots/0")
	check(s.p.t, err)
	file := filepath.Join(s.p.t.TempDir(), "issuer.crt")
	check(s.p.t, os.WriteFile(file, data, 0o600))
	return file
}

// get asks the management interface.
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

// expiry is when the proxy's certificate ends.
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

// The proxy gets its certificate from an ACME server, says what is in the way,
// and renews it without a session noticing.
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
	// waits lasts until the status of the proxy, which does not serve, says
	// why.
	waits := func(why ...string) {
		t.Helper()
		p.eventually("the proxy says: "+strings.Join(why, ", "), func() bool {
			c := p.Proxy.Command(p.ctx, program("masque-proxy"), "status")
			out, _ := c.CombinedOutput()
			for _, w := range append(why, "no certificate yet") {
				if !strings.Contains(string(out), w) {
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
	p.must(p.Proxy, "masque-proxy", "reload") // which tries again at once
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
		// until the first certificate has ended
		_, err := io.CopyN(conn, data, max(0, min(size/1000, size/2-sent)))
		check(t, err)
		time.Sleep(20 * time.Millisecond)
	}
	if renewed := p.expiry(); !renewed.After(first) {
		t.Errorf("the certificate ends at %v, the first one ended at %v", renewed, first)
	}
	p.up(p.Clients[1], invite("bob")) // it would not take one that has ended
	_, err = io.Copy(conn, data)
	check(t, err)
	conn.Close()
	if got, want := <-received, digest(content(size)); got != want {
		t.Errorf("received %s, sent %s", got, want)
	}
	p.wantSameSession(before)

	// The other challenge, and the sessions of the proxy before: what resets
	// them outlives certificates.
	p.editProxyConfig("#challenge = \"http-01\" ", "challenge = \"http-01\" ")
	check(t, p.Proxy.Do(func() error { return os.RemoveAll("/var/lib/masque/acme/certificates") }))
	p.killProxy()
	p.startProxy()
	p.awaitReconnected(0)
	p.ping(p.Client, lab.TargetIPv4)
	check(t, p.Client.Do(func() error {
		text, err := os.ReadFile("/run/masque/alice.log")
		if err == nil && !strings.Contains(string(text), "the proxy was restarted") {
			t.Errorf("the client was not told of the restart:\n%s", text)
		}
		return err
	}))
}
