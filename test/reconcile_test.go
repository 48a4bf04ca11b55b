package test

import (
	"strings"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
	"masquevpn/proxy"
)

// The client repairs the objects that another program removes from its host,
// and the session continues. With a kill switch, no packets leave outside the
// tunnel, before or after the repair, unless the kill switch itself was
// removed.
func TestClientHostRepaired(t *testing.T) {
	p, behind := killSwitchHosts(t, options{client: killSwitch})
	p.up(p.Client, p.invite("alice"))
	talk := startChatter(t, p.Client, behind)
	for _, tt := range []struct {
		name, damage string
		repair       string // key of the count in the status
		opens        bool   // the kill switch is open until the repair
	}{
		{"a rule", "ip rule del priority 9549", "rule", false},
		{"an address", "ip addr del 10.77.0.2/32 dev masque0", "address", false},
		{"the link is set down", "ip link set masque0 down", "link", false},
		{"the interface is deleted", "ip link del masque0", "device", false},
		{"the kill switch is deleted", "nft delete table inet masquevpn-kill-alice",
			"kill_switch", true},
		{"nftables is flushed", "nft flush ruleset", "table", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := *p
			p.t = t
			seen := p.capture()
			args := strings.Fields(tt.damage)
			check(t, p.Client.Command(p.ctx, args[0], args[1:]...).Run())
			before := len(seen.Packets())
			p.eventually("the repair is counted: "+tt.name, func() bool {
				s := p.status(p.Client, "alice")
				return s.KernelRepairs[tt.repair] > 0 && s.State == client.StateConnected &&
					s.KillSwitch == client.KillSwitchClosed
			})
			if tt.opens {
				before = len(seen.Packets())
			}
			talk.awaitRounds()
			for _, packet := range seen.Packets()[before:] {
				if l := leak(packet); l != "" {
					t.Fatalf("this left the host:\n%s", l)
				}
			}
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		})
	}
	if s := p.status(p.Client, "alice"); s.Reconnects != 0 {
		t.Errorf("%d reconnects, want none", s.Reconnects)
	}
}

// The proxy repairs the objects that another program removes from its host, and
// clients notice nothing. Its check command reports the repairs.
func TestProxyHostRepaired(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	p.editProxyConfig("masquerade = false", "masquerade = true")
	p.startProxy()
	p.up(p.Client, p.invite("alice"))
	for _, tt := range []struct{ name, damage, repair string }{
		{"nftables is flushed", "nft flush ruleset", "table"},
		{"forwarding is turned off", "sysctl -qw net.ipv4.ip_forward=0", "sysctl"},
		{"the link is set down", "ip link set masque0 down", "link"},
		{"the interface is deleted", "ip link del masque0", "device"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := *p
			p.t = t
			args := strings.Fields(tt.damage)
			check(t, p.Proxy.Command(p.ctx, args[0], args[1:]...).Run())
			p.eventually("the repair is counted: "+tt.name, func() bool {
				s := p.proxyStatus()
				return s.KernelRepairs[tt.repair] > 0 && s.State == proxy.StateRunning
			})
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
		})
	}
	if s := p.status(p.Client, "alice"); s.Reconnects != 0 {
		t.Errorf("%d reconnects, want none", s.Reconnects)
	}
	const want = "warn  host: another program changed what the running program needs; repairs since the start: "
	if out, _ := p.Proxy.Command(p.ctx, program("masque-proxy"), "check", "-c",
		p.config()).Output(); !strings.Contains(string(out), want) {
		t.Errorf("check prints\n%s", out)
	}
}
