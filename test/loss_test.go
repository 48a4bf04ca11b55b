package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/lab"
)

// On a path that drops, duplicates and reorders packets, each inner packet
// arrives at most once, each change of the routes is applied in order, and the
// session and inner connections last.
func TestLossyPath(t *testing.T) {
	lossy := &lab.Impairment{Delay: 4 * time.Millisecond, Jitter: time.Millisecond, Loss: 0.03,
		Duplicate: 0.1, Reorder: 0.1}
	p := newPair(t, options{impair: lossy, proxy: "\n[routes]\nadvertise = [\"192.0.2.0/24\"]\n"})
	host := p.snapshot(p.Client)
	p.connect(p.Client, "alice")
	before := p.status(p.Client, "alice")

	// ping prints DUP for a duplicate reply.
	out, err := p.Client.Command(p.ctx, "ping", "-n", "-i", "0.01", "-c", "300", "-W", "1",
		lab.TargetIPv4.String()).CombinedOutput()
	if err != nil || strings.Contains(string(out), "DUP") {
		t.Errorf("%v; no reply, or duplicates:\n%s", err, out)
	}

	stream := p.startStream()
	advertised := `advertise = ["192.0.2.0/24"]`
	for i := range 4 {
		next := fmt.Sprintf(`advertise = ["192.0.2.0/24", "198.18.%d.0/24"]`, 2*i)
		p.editProxyConfig(advertised, next)
		advertised = next
		p.must(p.Proxy, "masque-proxy", "reload")
		want := fmt.Sprintf("198.18.%d.0", 2*i)
		p.eventually("the new route has replaced the last", func() bool {
			routes := p.status(p.Client, "alice").Routes
			for _, r := range routes {
				if r.Start.String() == want {
					return len(routes) == len(before.Routes)+1
				}
			}
			return false
		})
		stream.awaitProgress()
	}
	stream.end()
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 1<<20)
	p.transfer(p.Target, p.Client, client4, 1<<20)
	p.wantSameSession(before)
	for i, w := range p.Wires {
		ab, ba := w.Stats()
		if ab.Lost == 0 || ba.Lost == 0 {
			t.Errorf("wire %d lost nothing: %+v, %+v", i, ab, ba)
		}
	}
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, host)
}
