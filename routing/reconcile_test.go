package routing

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// kept is what a test sees of a Manager that keeps its state.
type kept struct {
	h       *host
	mu      sync.Mutex
	health  Health
	reports int
	changed chan struct{}
	done    chan error
}

// keep has m keep its state until the test ends.
func (h *host) keep(m *Manager) *kept {
	h.t.Helper()
	k := &kept{h: h, changed: make(chan struct{}, 1), done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		h.do(func() { k.done <- m.Keep(ctx, k.report) })
	}()
	h.t.Cleanup(func() {
		cancel()
		<-ended
	})
	k.await("the first report", func(Health) bool { return true })
	return k
}

func (k *kept) report(h Health) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.health = h
	k.reports++
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

func (k *kept) now() (Health, int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.health, k.reports
}

// await waits for a Health that is as it shall be.
func (k *kept) await(what string, ok func(Health) bool) Health {
	k.h.t.Helper()
	for {
		if h, n := k.now(); n > 0 && ok(h) {
			return h
		}
		select {
		case <-k.changed:
		case <-k.h.t.Context().Done():
			h, _ := k.now()
			k.h.t.Fatalf("%s: the health is still %+v", what, h)
		}
	}
}

// What another program takes away of a tunnel comes back, is counted, and is logged once, with its name.
func TestKeep(t *testing.T) {
	client := func(h *host) (*Manager, State) {
		h.sysctl("net/ipv4/conf/all/src_valid_mark", "0")
		return h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark, Logger: h.log.logger()}), full()
	}
	proxy := func(h *host) (*Manager, State) {
		return h.open(Config{Instance: "one", Interface: "masque0", Logger: h.log.logger(), Journal: filepath.Join(h.t.TempDir(), "j.json")}), State{
			MTU: 1380, Addresses: prefixes("10.77.0.1/24", "fd77::1/64"), Routes: prefixes("192.0.2.0/24", "2001:db8:2::/48"),
			Forward: true, Masquerade: prefixes("10.77.0.0/24", "fd77::/64"),
		}
	}
	for _, tt := range []struct {
		name   string
		open   func(*host) (*Manager, State)
		damage string
		kinds  string // that are counted
		named  string // in the log
	}{
		{"all rules of ours", client, "ip rule flush protocol 94", "rule", "add IPv4 rule 9549: not fwmark 0x250c lookup "},
		{"one IPv6 rule", client, "ip -6 rule del priority 9741", "rule", "add IPv6 rule 9741: "},
		{"an address", client, "ip addr del 10.77.0.2/32 dev masque0", "address route", "add address 10.77.0.2/32 to masque0"},
		{"all addresses", client, "ip addr flush dev masque0", "address route", "add address fd77::2/128 to masque0"},
		{"the link is set down", client, "ip link set masque0 down", "address link route", "set masque0 up"},
		{"a smaller MTU", client, "ip link set masque0 mtu 1290", "mtu", "set the MTU of masque0 from 1290 to 1400"},
		{"an MTU too small for IPv6", client, "ip link set masque0 mtu 1000", "address link mtu route", "set the MTU of masque0 from 1000 to 1400"},
		{"a routing table", client, "ip route flush table TABLE", "route", "add 2 IPv4 routes of table TABLE"},
		{"all routes of the interface", client, "ip route flush dev masque0 table all proto 94", "route", " IPv4 routes of table "},
		{"all IPv6 routes of ours", client, "ip -6 route flush table all proto 94", "route", " IPv6 routes of table "},
		{"all of nftables", client, "nft flush ruleset", "table", "write nftables table inet masque-one"},
		{"our nftables table", client, "nft delete table inet masque-one", "table", "masque-one"},
		{"the rules of a chain", client, "nft flush chain inet masque-one restore", "table", "masque-one"},
		{"a chain", client, "nft delete chain inet masque-one guard", "table", "masque-one"},
		{"our nftables table goes dormant", client, "nft add table inet masque-one { flags dormant ; }", "table", "masque-one"},
		{"a chain gets another policy", client, "nft add chain inet masque-one restore { policy drop ; }", "table", "masque-one"},
		{"a rule before ours", client, "nft insert rule inet masque-one restore accept", "table", "masque-one"},
		{"a sysctl", client, "sysctl net.ipv4.conf.all.src_valid_mark 0", "sysctl", "set net.ipv4.conf.all.src_valid_mark from 0 to 1"},
		{"forwarding of IPv4", proxy, "sysctl net.ipv4.ip_forward 0", "sysctl", "set net.ipv4.ip_forward from 0 to 1"},
		{"forwarding of IPv6", proxy, "sysctl net.ipv6.conf.all.forwarding 0", "sysctl", "set net.ipv6.conf.all.forwarding from 0 to 1"},
		{"address translation", proxy, "nft flush ruleset", "table", "masque-one"},
		{"the proxy's address", proxy, "ip addr flush dev masque0", "address route", "add address 10.77.0.1/24 to masque0"},
		{"the route to a site", proxy, "ip route del 192.0.2.0/24", "route", "add 1 IPv4 routes of table 254"},
		{"the proxy's link is set down", proxy, "ip link set masque0 down", "address link route", "set masque0 up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.log = new(logBuffer)
			h.uplink()
			index, _ := h.tun("masque0")
			m, state := tt.open(h)
			h.apply(m, state)
			good := h.snapshot()
			k := h.keep(m)
			table := fmt.Sprint(tableID(index, 0))
			args := strings.Fields(strings.ReplaceAll(tt.damage, "TABLE", table))
			if args[0] == "sysctl" {
				h.sysctl(strings.ReplaceAll(args[1], ".", "/"), args[2])
			} else {
				h.run(args[0], args[1:]...)
			}
			want := strings.Fields(tt.kinds)
			k.await("repairs", func(now Health) bool {
				return slices.Equal(slices.Sorted(maps.Keys(now.Repairs)), want) && now.Problem == "" && len(now.Addresses) == 2
			})
			for what, now := range h.snapshot() {
				if now != good[what] && what != stableSecret {
					t.Errorf("%s is\n%s\nwant\n%s", what, now, good[what])
				}
			}
			named := strings.ReplaceAll(tt.named, "TABLE", table)
			if n := strings.Count(h.log.String(), "put right"); n != len(want) || !strings.Contains(h.log.String(), named) {
				t.Errorf("%d lines of the log are about repairs, want %d, with %q:\n%s", n, len(want), named, h.log)
			}
		})
	}
}

// A Manager does not take its own changes for those of others.
func TestKeepLeavesItsOwnChangesAlone(t *testing.T) {
	h := newHost(t)
	h.uplink()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	k := h.keep(m) // before anything was applied
	other := full()
	other.Addresses, other.MTU = prefixes("10.77.0.3/32", "fd77::3/128"), 1380
	for range 10 {
		h.apply(m, full())
		h.apply(m, other)
	}
	now := k.await("the last state", func(now Health) bool { return slices.Equal(now.Addresses, other.Addresses) })
	if now.Problem != "" || len(now.Repairs) != 0 {
		t.Errorf("got %+v, want no repairs", now)
	}
	h.close(m)
	if err := <-k.done; err != nil {
		t.Errorf("after Close, Keep returns %v", err)
	}
}

// Whoever made the interface learns that it is gone.
func TestKeepTellsOfALostInterface(t *testing.T) {
	h := newHost(t)
	h.uplink()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, full())
	k := h.keep(m)
	h.ip("link del masque0")
	if err := <-k.done; !errors.Is(err, ErrInterfaceGone) {
		t.Errorf("Keep returns %v, want %v", err, ErrInterfaceGone)
	}
	if err := h.tryApply(m, full()); !errors.Is(err, ErrInterfaceGone) {
		t.Errorf("Apply returns %v, want %v", err, ErrInterfaceGone)
	}
}

// Where somebody turned IPv6 off on the interface, nothing of IPv6 leaves beside the tunnel, until IPv6 is back.
func TestKeepHoldsIPv6(t *testing.T) {
	h := newHost(t)
	h.uplink()
	tunnel, _ := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, full())
	k := h.keep(m)
	h.sysctl("net/ipv6/conf/masque0/disable_ipv6", "1")
	k.await("held", func(now Health) bool {
		return now.IPv6Held && strings.Contains(now.Problem, "net.ipv6.conf.masque0.disable_ipv6") && len(now.Addresses) == 1
	})
	for _, dst := range []string{"2a00::1", "2001:db8:1::1"} {
		if got := h.lookup(dst, 0); got != 0 {
			t.Errorf("%s leads to interface %d, want nowhere", dst, got)
		}
	}
	h.sysctl("net/ipv6/conf/masque0/disable_ipv6", "0")
	k.await("back", func(now Health) bool { return !now.IPv6Held && now.Problem == "" && len(now.Addresses) == 2 })
	if got := h.lookup("2a00::1", 0); got != tunnel {
		t.Errorf("2a00::1 leads to interface %d, want %d", got, tunnel)
	}
}
