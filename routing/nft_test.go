package routing

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Kernels that lack an expression refuse the table. What can be done without is
// done without, and said once.
func TestKernelLacksFeatures(t *testing.T) {
	for _, tt := range []struct {
		name    string
		lacks   []string
		chains  []string // in the table that is written
		logged  int
		failure bool // the state with NAT fails
	}{
		{"nothing", nil, []string{"guard", "save", "restore", "inbound", "reply", "nat"}, 0, false},
		{"rerouting", []string{"reply"}, []string{"guard", "save", "restore", "nat"}, 1, false},
		{"fib", []string{"guard", "inbound"}, []string{"save", "restore", "nat"}, 2, false},
		{"conntrack marks", []string{"save", "restore", "inbound"}, []string{"guard", "nat"}, 2, false},
		{"both", []string{"guard", "restore", "inbound"}, []string{"nat"}, 3, false},
		{"NAT", []string{"nat"}, nil, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.uplink()
			h.tun("masque0")
			before := h.snapshot()
			var log logBuffer
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark, Logger: log.logger()})
			m.commit = func(table string, replace bool, chains []chain) error {
				if slices.ContainsFunc(chains, func(c chain) bool { return slices.Contains(tt.lacks, c.name) }) {
					return unix.ENOENT
				}
				return commitTable(table, replace, chains)
			}
			s := full()
			s.Masquerade = prefixes("10.77.0.0/24")
			for range 2 {
				if err := h.tryApply(m, s); (err != nil) != tt.failure {
					t.Errorf("Apply: %v, want failure %t", err, tt.failure)
				}
			}
			if tt.failure {
				h.same(before)
				return
			}
			ruleset := h.run("nft", "list", "ruleset")
			for _, name := range []string{"guard", "save", "restore", "inbound", "reply", "nat"} {
				if got, want := strings.Contains(ruleset, "chain "+name+" "), slices.Contains(tt.chains, name); got != want {
					t.Errorf("chain %s in the table: %t, want %t:\n%s", name, got, want, ruleset)
				}
			}
			if got := strings.Count(log.String(), "level=WARN"); got != tt.logged {
				t.Errorf("%d warnings, want %d:\n%s", got, tt.logged, log.String())
			}
			h.close(m)
			h.same(before)
		})
	}
}

// nft prints what we write, so that an operator can read it and nft can load it
// again.
func TestTableIsReadable(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := full()
	s.Masquerade = prefixes("10.77.0.0/24", "fd77::/64")
	h.apply(m, s)
	ruleset := h.run("nft", "list", "table", "inet", "masque-one")
	for _, line := range []string{
		"type filter hook prerouting priority raw; policy accept;",
		`iif != "masque0" ip daddr 10.77.0.2 fib saddr type != local counter packets 0 bytes 0 drop`,
		`iif != "masque0" ip6 daddr fd77::2 fib saddr type != local counter packets 0 bytes 0 drop`,
		`iif "masque0" ip saddr 10.77.0.2 accept`,
		`iif "masque0" fib saddr type local counter packets 0 bytes 0 drop`,
		"type filter hook postrouting priority mangle; policy accept;",
		"meta mark 0x0000250c ct mark set meta mark",
		"type filter hook prerouting priority mangle; policy accept;",
		"ct mark 0x0000250c meta mark set ct mark",
		"type nat hook postrouting priority srcnat; policy accept;",
		`ip saddr 10.77.0.0/24 oif != "masque0" oif != "lo" masquerade`,
		`ip6 saddr fd77::/64 oif != "masque0" oif != "lo" masquerade`,
	} {
		if !strings.Contains(ruleset, line) {
			t.Errorf("no %q in\n%s", line, ruleset)
		}
	}
}
