package test

import (
	"net/netip"
	"slices"
	"testing"

	"masquevpn/internal/lab"
)

// A client that requests prefixes is assigned them. It uses the first address
// of each itself, and hosts behind it may use the others. Packets to unused
// addresses are answered at the client and do not return to the proxy.
func TestPrefixDelegation(t *testing.T) {
	p := newPair(t, options{client: "\n[addresses]\nrequest = [\"0.0.0.0/28\", \"::/80\"]\n"})
	p.stopProxy()
	p.editProxyConfig("[pool]", "[pool]\ndelegate_ipv4 = 28\ndelegate_ipv6 = 80")
	p.startProxy()
	before := p.snapshot(p.Client)
	p.connect(p.Client, "alice")
	want := []netip.Prefix{netip.MustParsePrefix("10.77.0.224/28"),
		netip.MustParsePrefix("fd77::ffff:0:0:0/80")}
	if got := p.status(p.Client, "alice").Addresses; !slices.Equal(got, want) {
		t.Fatalf("addresses %v, want %v", got, want)
	}
	host4, host6 := netip.MustParseAddr("10.77.0.225"), netip.MustParseAddr("fd77::ffff:0:0:1")
	behind4, behind6 := netip.MustParseAddr("10.77.0.238"), netip.MustParseAddr("fd77::ffff:1:2:3")
	check(t, p.Client.AddAddr("lo", netip.PrefixFrom(behind4, 32)))
	check(t, p.Client.AddAddr("lo", netip.PrefixFrom(behind6, 128)))
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.ping(p.Target, host4, host6, behind4, behind6)
	p.transfer(p.Target, p.Client, behind4, 5<<20)
	p.transfer(p.Target, p.Client, behind6, 5<<20)
	p.wantUnreachable(p.Client, netip.MustParseAddr("10.77.0.230"), 3, 0)
	p.wantUnreachable(p.Client, netip.MustParseAddr("fd77::ffff:9:9:9"), 1, 0)
	p.down(p.Client, "alice")
	for _, a := range []netip.Addr{behind4, behind6} {
		p.removeAddr(p.Client, "lo", a)
	}
	p.wantUnchanged(p.Client, before)
}

// removeAddr removes an address from an interface.
func (p *pair) removeAddr(host *lab.Host, iface string, a netip.Addr) {
	p.t.Helper()
	if out, err := host.Command(p.ctx, "ip", "addr", "del", a.String(), "dev",
		iface).CombinedOutput(); err != nil {
		p.t.Errorf("removing %v: %v\n%s", a, err, out)
	}
}
