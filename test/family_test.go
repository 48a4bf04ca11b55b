package test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"masquevpn/internal/lab"
)

// With a proxy that has addresses of one family only, nothing of the other leaves beside a tunnel for everything: it is
// answered at once, so that programs take the family that works. Where the tunnel is not for everything, or not for that family,
// the other goes on as before.
func TestOneFamily(t *testing.T) {
	router4, router6 := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:2::1")
	no4, no6 := fmt.Sprintf("ipv4 = %q", pool4), fmt.Sprintf("ipv6 = %q", pool6)
	for name, tc := range map[string]struct {
		drop            string // from the proxy's pool
		routes          string
		inside, outside netip.Addr // outside is of the other family, and answers without the tunnel
		typ, code       int        // of the error about it; 0: it goes on to answer
	}{
		"IPv4":                   {no6, "", lab.TargetIPv4, router6, 1, 0},
		"IPv6":                   {no4, "", lab.TargetIPv6, router4, 3, 0},
		"IPv4, IPv6 not for it":  {no6, `accept = ["0.0.0.0/0"]`, lab.TargetIPv4, router6, 0, 0},
		"IPv4, not everything":   {no6, `accept = ["192.0.2.0/24", "::/0"]`, lab.TargetIPv4, router6, 0, 0},
		"IPv4, IPv6 is excluded": {no6, `exclude = ["2001:db8:2::/64"]`, lab.TargetIPv4, router6, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, options{routes: tc.routes})
			p.stopProxy()
			p.editProxyConfig(tc.drop, "")
			p.startProxy()
			p.ping(p.Client, tc.outside)
			before := p.snapshot(p.Client)
			p.connect(p.Client, "alice")
			p.ping(p.Client, tc.inside)
			if tc.typ == 0 {
				p.ping(p.Client, tc.outside)
				return
			}
			c, err := p.Client.Capture("eth0", nil)
			check(t, err)
			p.unreachable(p.Client, tc.outside, tc.typ, tc.code)
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			defer cancel()
			conn, err := p.Client.DialContext(ctx, "tcp", netip.AddrPortFrom(tc.outside, 80).String())
			if err == nil || ctx.Err() != nil {
				t.Errorf("TCP to %v: %v, %v", tc.outside, conn, err)
			}
			check(t, c.Close())
			for _, pkt := range c.Packets() {
				if l := pkt.NetworkLayer(); l != nil && l.NetworkFlow().Dst().String() == tc.outside.String() {
					t.Errorf("beside the tunnel: %v", pkt)
				}
			}
			p.down(p.Client, "alice")
			p.unchanged(p.Client, before)
			p.ping(p.Client, tc.outside)
		})
	}
}
