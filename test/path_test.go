package test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"masquevpn/internal/lab"
)

// The MTU of the path shrinks while the tunnel is in use, and large packets
// disappear without an error. The MTU of the tunnel follows and TCP continues.
// IPv6 is turned off, with a reason, while the path is too narrow for it.
func TestPathShrinks(t *testing.T) {
	p := newPair(t, options{impair: &lab.Impairment{}})
	p.connect(p.Client, "alice")
	p.eventually("the path's MTU is found", func() bool {
		return p.status(p.Client, "alice").MTU > 1380
	})
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)

	for _, step := range []struct {
		path int
		ipv6 bool
	}{{1420, true}, {1300, false}, {1260, false}} {
		p.Wires[0].Set(lab.Impairment{MTU: step.path})
		// Both ends notice the smaller MTU by their own traffic.
		p.transfer(p.Client, p.Target, lab.TargetIPv4, 1<<20)
		p.transfer(p.Target, p.Client, client4, 1<<20)
		s := p.status(p.Client, "alice")
		if s.MTU >= step.path || s.MTU < step.path-110 {
			t.Errorf("the MTU is %d on a path of %d bytes", s.MTU, step.path)
		}
		if off := strings.Contains(s.Reason, "IPv6"); off == step.ipv6 {
			t.Errorf("on a path of %d bytes the reason is %q", step.path, s.Reason)
		}
		if step.ipv6 {
			p.transfer(p.Client, p.Target, lab.TargetIPv6, 1<<20)
		} else {
			// IPv6 packets are answered at once, so that programs fall back to
			// IPv4, and do not leave outside the tunnel.
			p.wantUnreachable(p.Client, lab.TargetIPv6, 1, 0)
		}
	}
}

// A client connects over a path that is narrower than the first packets of
// QUIC.
func TestNarrowPath(t *testing.T) {
	p := newPair(t, options{impair: &lab.Impairment{MTU: 1280}})
	p.connect(p.Client, "alice")
	p.ping(p.Client, lab.TargetIPv4)
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 1<<20)
	p.transfer(p.Target, p.Client, client4, 1<<20)
}

// A packet without DF that is too big for the tunnel is fragmented.
func TestFragmentation(t *testing.T) {
	p := newPair(t, options{mtu: 1400})
	p.connect(p.Client, "alice")
	for _, to := range []netip.Addr{client4} {
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		a, err := p.Target.Probe(ctx, lab.Probe{To: to, Size: 1400})
		cancel()
		if err != nil || !a.Echo {
			t.Errorf("1400 bytes to %v: %v, %v", to, a, err)
		}
	}
}
