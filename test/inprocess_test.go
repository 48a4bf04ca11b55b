package test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

const proxyName = "proxy.example"

// installation is the credentials of a proxy that runs in the test.
type installation struct {
	ca    *x509.CertPool
	proxy tls.Certificate
}

func newInstallation(t *testing.T) installation {
	t.Helper()
	ca, pair, err := pki.NewAuthority("test CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	in := installation{ca: x509.NewCertPool()}
	in.ca.AppendCertsFromPEM(pair.Cert)
	server, err := ca.Server(proxyName, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if in.proxy, err = tls.X509KeyPair(server.Cert, server.Key); err != nil {
		t.Fatal(err)
	}
	return in
}

// runProxy runs s until the test ends.
func runProxy(t *testing.T, s *proxy.Server) {
	t.Helper()
	runUntilEnd(t, s.Run)
	select {
	case <-s.Ready():
	case <-time.After(30 * time.Second):
		t.Fatal("the proxy does not start")
	}
}

// runClient runs c until the test ends.
func runClient(t *testing.T, c *client.Client) {
	t.Helper()
	runUntilEnd(t, c.Run)
}

func runUntilEnd(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// awaitState waits until c is in the given state.
func awaitState(t *testing.T, ctx context.Context, c *client.Client, state string) {
	t.Helper()
	for {
		changed := c.Changed()
		if c.Status().State == state {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("not %s in time: %+v", state, c.Status())
		}
	}
}
