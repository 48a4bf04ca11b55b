package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"masquevpn/internal/logtest"
)

// allChains contains the chains of a client with every feature of State.
var allChains = []string{
	"untracked", "untracked-output", "outer", "guard", "save", "restore", "inbound", "reply",
	"forward", "translate", "nat", "leave", "arp",
}

// without returns allChains without names.
func without(names ...string) []string {
	return slices.DeleteFunc(slices.Clone(allChains), func(name string) bool {
		return slices.Contains(names, name)
	})
}

// A kernel that lacks an expression refuses the table. Apply then omits
// optional chains and logs each omission once.
func TestKernelLacksFeatures(t *testing.T) {
	for _, tt := range []struct {
		name    string
		lacks   []string // chains that the kernel refuses
		chains  []string // chains in the table
		logged  int      // warnings
		failure bool     // Apply fails
	}{
		{"nothing", nil, allChains, 0, false},
		{"rerouting", []string{"reply"}, without("outer", "inbound", "reply"), 1, false},
		{"fib", []string{"guard", "inbound"},
			without("untracked", "untracked-output", "outer", "guard", "inbound", "reply"),
			2, false},
		{"conntrack marks", []string{"save", "restore", "inbound"},
			without("outer", "save", "restore", "inbound", "reply"), 2, false},
		{"both", []string{"guard", "restore", "inbound"},
			without("untracked", "untracked-output", "outer", "guard", "save", "restore", "inbound",
				"reply"), 3, false},
		{"ARP", []string{"arp"}, without("arp"), 1, false},
		{"conntrack state", []string{"forward"}, without("forward"), 1, false},
		{"all optional chains", without("translate", "nat", "leave"),
			[]string{"translate", "nat", "leave"}, 5, false},
		{"NAT", []string{"nat"}, nil, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			before := h.snapshot()
			var log logtest.Buffer
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
				Logger: log.Logger()})
			m.commit = func(table string, replace bool, chains []chain) error {
				if slices.ContainsFunc(chains, func(c chain) bool {
					return slices.Contains(tt.lacks, c.name)
				}) {
					return unix.ENOENT
				}
				return commitTable(table, replace, chains)
			}
			s := fullState()
			s.Masquerade, s.Listen = prefixes("10.77.0.0/24"), []uint16{443}
			for range 2 {
				if err := h.tryApply(m, s); (err != nil) != tt.failure {
					t.Errorf("Apply: %v, want an error: %t", err, tt.failure)
				}
			}
			if tt.failure {
				h.wantSnapshot(before)
				return
			}
			ruleset := h.run("nft", "list", "ruleset")
			if got, want := h.readSysctl("net/ipv4/conf/masque0/accept_local"),
				slices.Contains(tt.chains, "guard"); (got == "1") != want {
				t.Errorf("accept_local is %s, guard in the table: %t", got, want)
			}
			for _, name := range allChains {
				if got, want := strings.Contains(ruleset, "chain "+name+" "),
					slices.Contains(tt.chains, name); got != want {
					t.Errorf("chain %s in the table: %t, want %t:\n%s", name, got, want, ruleset)
				}
			}
			if got := strings.Count(log.String(), "level=WARN"); got != tt.logged {
				t.Errorf("%d warnings, want %d:\n%s", got, tt.logged, log.String())
			}
			h.close(m)
			h.wantSnapshot(before)
		})
	}
}

// An operator can read the table, and nft can load its output again.
func TestTableAsText(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := fullState()
	s.Masquerade, s.Listen, s.Forward, s.Reach = prefixes("10.77.0.0/24", "fd77::/64"),
		[]uint16{443}, true, prefixes("192.168.9.0/24")
	h.apply(m, s)
	ruleset := h.run("nft", "list", "ruleset")
	for _, line := range []string{
		"type filter hook prerouting priority raw; policy accept;",
		"udp dport 443 fib daddr type local notrack",
		"type filter hook output priority raw; policy accept;",
		"udp sport 443 notrack",
		`iif != "masque0" iif != "lo" ip daddr 10.77.0.2 counter packets 0 bytes 0 drop`,
		`iif != "masque0" iif != "lo" ip6 daddr fd77::2 counter packets 0 bytes 0 drop`,
		`iif "masque0" ip saddr 10.77.0.2 accept`,
		`iif "masque0" fib saddr type local counter packets 0 bytes 0 drop`,
		"type filter hook postrouting priority -175; policy accept;",
		"meta mark & 0xa0000000 == 0xa0000000 ct mark set ct mark | 0xa0000000",
		"type filter hook prerouting priority -175; policy accept;",
		"ct mark & 0xa0000000 == 0xa0000000 meta mark set meta mark | 0xa0000000",
		"type filter hook forward priority filter; policy accept;",
		`iif "masque0" ip daddr 192.168.9.0/24 accept`,
		`iif "masque0" counter packets 0 bytes 0 drop`,
		"meta l4proto tcp masquerade to :32768-65535",
		"type nat hook postrouting priority srcnat; policy accept;",
		`ip saddr 10.77.0.0/24 oif != "masque0" oif != "lo" jump translate`,
		`ip6 saddr fd77::/64 oif != "masque0" oif != "lo" jump translate`,
		`ip saddr 10.77.0.0/24 oif != "masque0" oif != "lo" counter packets 0 bytes 0 drop`,
		"table arp masque-one",
		"type filter hook input priority filter; policy accept;",
	} {
		if !strings.Contains(ruleset, line) {
			t.Errorf("no %q in\n%s", line, ruleset)
		}
	}
}

// Tables with many addresses are written as well. A proxy may assign 64.
func TestManyAddresses(t *testing.T) {
	for _, n := range []int{64, 2000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			h := newHost(t)
			h.tun("masque0")
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			s := State{Routes: prefixes("0.0.0.0/0")}
			for i := range n {
				s.Addresses = append(s.Addresses,
					netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(i >> 8), byte(i)}), 32))
			}
			h.apply(m, s)
		})
	}
}
