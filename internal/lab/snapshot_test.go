package lab

import (
	"strings"
	"testing"
)

// TestSnapshot changes each part of a snapshot and reverts it.
func TestSnapshot(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	h := topo.Client
	before, err := h.Snapshot()
	must(t, err)
	for _, tt := range []struct{ do, undo, section string }{
		{"ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500", "links"},
		{"ip link add d0 type bridge", "ip link del d0", "links"},
		{"ip addr add 10.0.0.1/32 dev lo", "ip addr del 10.0.0.1/32 dev lo", "addresses"},
		{"ip -6 addr add fd00::1/128 dev lo", "ip -6 addr del fd00::1/128 dev lo", "addresses"},
		{"ip route add 10.0.0.0/8 via 198.51.100.1 table 77", "ip route del 10.0.0.0/8 table 77",
			"routes IPv4"},
		{"ip -6 route add unreachable fd00::/8 metric 5",
			"ip -6 route del unreachable fd00::/8 metric 5", "routes IPv6"},
		{"ip rule add fwmark 7 table 77", "ip rule del fwmark 7 table 77", "rules IPv4"},
		{"ip -6 rule add not fwmark 7 table 77", "ip -6 rule del not fwmark 7 table 77",
			"rules IPv6"},
		{"ip rule add table main suppress_prefixlength 0",
			"ip rule del table main suppress_prefixlength 0", "rules IPv4"},
		{"nft add table inet x", "nft delete table inet x", "nftables"},
		{"nft add table inet x; nft add chain inet x c '{ type filter hook output priority 0; policy accept; }'; nft add rule inet x c ip daddr { 10.0.0.1, 10.0.0.2 } counter drop", "nft delete table inet x", "nftables"},
		{"nft add table ip y; nft add set ip y s '{ type ipv4_addr; flags interval; }'; nft add element ip y s { 10.0.0.0/8 }", "nft delete table ip y", "nftables"},
		{"echo 1 >/proc/sys/net/ipv4/conf/all/src_valid_mark",
			"echo 0 >/proc/sys/net/ipv4/conf/all/src_valid_mark", "kernel parameters"},
		{"echo 1 >/proc/sys/net/ipv6/conf/all/forwarding",
			"echo 0 >/proc/sys/net/ipv6/conf/all/forwarding", "kernel parameters"},
		{"echo nameserver 192.0.2.53 >/etc/resolv.conf",
			"echo '# no name servers' >/etc/resolv.conf", "resolver"},
		{"chmod 600 /etc/resolv.conf", "chmod 644 /etc/resolv.conf", "resolver"},
		{"mv /etc/resolv.conf /run/x; ln -s /run/x /etc/resolv.conf", "mv /run/x /etc/resolv.conf",
			"resolver"},
		{"echo old >/etc/resolv.conf.masque-x", "rm /etc/resolv.conf.masque-x", "resolver"},
	} {
		t.Run(tt.do, func(t *testing.T) {
			sh(t, h, tt.do)
			during, err := h.Snapshot()
			must(t, err)
			if section(during, tt.section) == section(before, tt.section) {
				t.Errorf("no difference in %q", tt.section)
			}
			if Diff(before, during) == "" {
				t.Error("Diff finds no difference")
			}
			sh(t, h, tt.undo)
			after, err := h.Snapshot()
			must(t, err)
			if diff := Diff(before, after); diff != "" {
				t.Errorf("after %q it differs:\n%s", tt.undo, diff)
			}
		})
	}
}

// TestSnapshotIgnoresTraffic sends packets to neighbours and through a counter.
func TestSnapshotIgnoresTraffic(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	h := topo.Client
	sh(t, h, "nft add table inet x; nft add chain inet x c '{ type filter hook output priority 0; }'; nft add rule inet x c counter")
	before, err := h.Snapshot()
	must(t, err)
	for range 3 {
		if _, err := h.Ping(testContext(t), ProxyIPv4); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Ping(testContext(t), ProxyIPv6); err != nil {
			t.Fatal(err)
		}
	}
	after, err := h.Snapshot()
	must(t, err)
	if diff := Diff(before, after); diff != "" {
		t.Errorf("traffic changed the snapshot:\n%s", diff)
	}
}

func TestDiff(t *testing.T) {
	if got := Diff("a\nb\nc", "a\nc\nc\nd"); got != "- b\n+ c\n+ d\n" {
		t.Errorf("got %q", got)
	}
	if got := Diff("a\nb", "b\na"); !strings.Contains(got, "order") {
		t.Errorf("got %q", got)
	}
	if got := Diff("a", "a"); got != "" {
		t.Errorf("got %q", got)
	}
}

func section(snapshot, name string) string {
	_, s, _ := strings.Cut(snapshot, "# "+name+"\n")
	s, _, _ = strings.Cut(s, "\n# ")
	return s
}

func sh(t *testing.T, h *Host, script string) {
	t.Helper()
	if out, err := h.Command(testContext(t), "sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
}
