package test

import (
	"context"
	"testing"
	"time"

	"masquevpn/client"
	"masquevpn/proxy"
)

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
