package main

import (
	"context"
	"time"

	"masquevpn/internal/systemd"
	"masquevpn/internal/text"
)

// aliveInterval is how often systemd's watchdog is fed.
const aliveInterval = 5 * time.Second

// tell tells systemd how the tunnel is until it stops. The service is ready
// when its interface is there: whether the proxy answers shall not hold up the
// start of a host. The watchdog is fed as long as the tunnel answers. A
// certificate of the client's own that ends is warned of.
func (t *tunnel) tell(ctx context.Context, service *systemd.Service) {
	tick := time.NewTicker(aliveInterval)
	defer tick.Stop()
	ready := false
	for {
		changed := t.client.Changed()
		s := t.client.Status()
		if s.Interface != "" && !ready {
			ready = true
			service.Ready()
		}
		status := s.State
		if s.Reason != "" {
			status += ": " + text.OneLine(s.Reason)
		}
		service.Status(status)
		t.lookAtCertificate()
		select {
		case <-changed:
		case <-tick.C:
			service.Health(t.client.Stuck())
		case <-ctx.Done():
			service.Stopping()
			return
		case <-t.done:
			return
		}
	}
}
