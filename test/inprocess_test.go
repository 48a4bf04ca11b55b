package test

import (
	"context"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/proxy"
)

// proxyName is the name of proxies that run in the test process.
const proxyName = "proxy.example"

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

// runUntilEnd runs run until the test ends. It must return nil then.
func runUntilEnd(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
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
