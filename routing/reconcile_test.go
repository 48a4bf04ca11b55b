package routing

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"masquevpn/internal/logtest"
)

// maintained is a Manager with a running Maintain.
type maintained struct {
	h       *host
	changed chan struct{} // receives a value after each report
	done    chan error    // receives the result of Maintain

	mu      sync.Mutex // guards the fields below
	health  Health     // last report
	reports int
}

// maintain runs m.Maintain until the test ends.
func (h *host) maintain(m *Manager) *maintained {
	h.t.Helper()
	k := &maintained{h: h, changed: make(chan struct{}, 1), done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		h.do(func() { k.done <- m.Maintain(ctx, k.report) })
	}()
	h.t.Cleanup(func() {
		cancel()
		<-ended
	})
	k.await("the first report", func(Health) bool { return true })
	return k
}

func (k *maintained) report(h Health) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.health = h
	k.reports++
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

func (k *maintained) now() (Health, int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.health, k.reports
}

// await waits for a Health for which ok returns true. name describes it.
func (k *maintained) await(name string, ok func(Health) bool) Health {
	k.h.t.Helper()
	timeout := time.After(patience)
	for {
		if h, n := k.now(); n > 0 && ok(h) {
			return h
		}
		select {
		case <-k.changed:
		case <-timeout:
			h, _ := k.now()
			k.h.t.Fatalf("waiting for %s: the last Health is %+v", name, h)
		}
	}
}

// Maintain restores changes of other programs, counts the repairs by kind, and
// logs each kind once.
func TestMaintain(t *testing.T) {
	client := func(h *host) (*Manager, State) {
		h.sysctl("net/ipv4/conf/all/src_valid_mark", "0")
		return h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
			Logger: h.log.Logger()}), fullState()
	}
	proxy := func(h *host) (*Manager, State) {
		return h.open(Config{Instance: "one", Interface: "masque0", Logger: h.log.Logger(),
				Journal: filepath.Join(h.t.TempDir(), "j.json")}), State{
				MTU: 1380, Addresses: prefixes("10.77.0.1/24", "fd77::1/64"),
				Routes:  prefixes("192.0.2.0/24", "2001:db8:2::/48"),
				Forward: true, Masquerade: prefixes("10.77.0.0/24", "fd77::/64"),
			}
	}
	for _, tt := range []struct {
		name   string
		open   func(*host) (*Manager, State)
		damage string // command of the other program
		kinds  string // kinds of the counted repairs
		logged string // part of the log
	}{
		{"one IPv4 rule", client, "ip rule del priority 9549", "rule",
			"add IPv4 rule 9549: not fwmark 0x80000000 lookup "},
		{"one IPv6 rule", client, "ip -6 rule del priority 9741", "rule", "add IPv6 rule 9741: "},
		{"address", client, "ip addr del 10.77.0.2/32 dev masque0", "address route",
			"add address 10.77.0.2/32 to masque0"},
		{"all addresses", client, "ip addr flush dev masque0", "address route",
			"add address fd77::2/128 to masque0"},
		{"IPv4 address expires", client,
			"ip addr change 10.77.0.2/32 dev masque0 valid_lft 1000 preferred_lft 0",
			"address route", "delete address 10.77.0.2/32 of masque0"},
		{"IPv6 address is deprecated", client,
			"ip addr change fd77::2/128 dev masque0 preferred_lft 0", "address",
			"add address fd77::2/128 to masque0"},
		{"link set down", client, "ip link set masque0 down", "address link route",
			"set masque0 up"},
		{"smaller MTU", client, "ip link set masque0 mtu 1290", "mtu",
			"set the MTU of masque0 from 1290 to 1400"},
		{"MTU too small for IPv6", client, "ip link set masque0 mtu 1000",
			"address link mtu route", "set the MTU of masque0 from 1000 to 1400"},
		{"routing table", client, "ip route flush table TABLE", "route",
			"add 2 IPv4 routes of table TABLE"},
		{"all routes of the interface", client, "ip route flush dev masque0 table all proto 94",
			"route", " IPv4 routes of table "},
		{"all IPv6 routes with protocol 94", client, "ip -6 route flush table all proto 94",
			"route",
			" IPv6 routes of table "},
		{"additional route", client, "ip route add 128.0.0.0/1 dev up0 table TABLE", "route",
			"delete a route of another program: 128.0.0.0/1 in table TABLE"},
		{"IPv6 route with a lower metric", client,
			"ip -6 route add default dev up0 metric 1 table TABLE", "route",
			"delete a route of another program: ::/0 in table TABLE"},
		{"replaced route", client,
			"ip route replace default dev up0 metric 9484 table TABLE", "route",
			"add 1 IPv4 routes of table TABLE"},
		{"replaced route with protocol 94", client,
			"ip route replace default dev up0 metric 9484 proto 94 table TABLE", "route",
			"add 1 IPv4 routes of table TABLE"},
		{"nftables ruleset", client, "nft flush ruleset", "table",
			"write nftables table inet masque-one"},
		{"nftables table", client, "nft delete table inet masque-one", "table", "masque-one"},
		{"ARP table", client, "nft delete table arp masque-one", "table",
			"masque-one"},
		{"rules of a chain", client, "nft flush chain inet masque-one restore", "table",
			"masque-one"},
		{"chain", client, "nft delete chain inet masque-one guard", "table", "masque-one"},
		{"dormant nftables table", client,
			"nft add table inet masque-one { flags dormant ; }", "table", "masque-one"},
		{"policy of a chain", client,
			"nft add chain inet masque-one restore { policy drop ; }", "table", "masque-one"},
		{"additional rule", client, "nft insert rule inet masque-one restore accept", "table",
			"masque-one"},
		{"sysctl", client, "sysctl net.ipv4.conf.all.src_valid_mark 0", "sysctl",
			"set net.ipv4.conf.all.src_valid_mark from 0 to 1"},
		{"IPv4 forwarding", proxy, "sysctl net.ipv4.ip_forward 0", "sysctl",
			"set net.ipv4.ip_forward from 0 to 1"},
		{"IPv6 forwarding", proxy, "sysctl net.ipv6.conf.all.forwarding 0", "sysctl",
			"set net.ipv6.conf.all.forwarding from 0 to 1"},
		{"address translation", proxy, "nft flush ruleset", "table", "masque-one"},
		{"address of a proxy", proxy, "ip addr flush dev masque0", "address route",
			"add address 10.77.0.1/24 to masque0"},
		{"route to a site", proxy, "ip route del 192.0.2.0/24", "route",
			"add 1 IPv4 routes of table 254"},
		{"link of a proxy set down", proxy, "ip link set masque0 down", "address link route",
			"set masque0 up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.log = new(logtest.Buffer)
			h.underlay()
			index, _ := h.tun("masque0")
			m, state := tt.open(h)
			h.apply(m, state)
			good := h.snapshot()
			k := h.maintain(m)
			table := fmt.Sprint(tableID(index, 0))
			args := strings.Fields(strings.ReplaceAll(tt.damage, "TABLE", table))
			if args[0] == "sysctl" {
				h.sysctl(strings.ReplaceAll(args[1], ".", "/"), args[2])
			} else {
				h.run(args[0], args[1:]...)
			}
			want := strings.Fields(tt.kinds)
			k.await("repairs", func(now Health) bool {
				return slices.Equal(slices.Sorted(maps.Keys(now.Repairs)), want) &&
					now.Problem == "" && len(now.Addresses) == 2
			})
			for object, now := range h.snapshot() {
				if now != good[object] && object != stableSecret {
					t.Errorf("%s is\n%s\nwant\n%s", object, now, good[object])
				}
			}
			logged := strings.ReplaceAll(tt.logged, "TABLE", table)
			if n := strings.Count(h.log.String(), "put right"); n != len(want) ||
				!strings.Contains(h.log.String(), logged) {
				t.Errorf("%d repairs in the log, want %d, with %q:\n%s", n, len(want), logged,
					h.log)
			}
		})
	}
}

// Maintain replaces an IPv6 address with another prefix length. An interface
// cannot have both.
func TestMaintainAddressLength(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	h.ip("-6 addr del fd77::2/128 dev masque0")
	h.ip("-6 addr add fd77::2/64 dev masque0 nodad")
	k := h.maintain(m)
	if now := k.await("the address", func(now Health) bool {
		return len(now.Addresses) == 2
	}); now.Problem != "" {
		t.Errorf("the problem is %q, want none", now.Problem)
	}
}

// Maintain and Apply replace an address with another scope. The kernel does not
// use such an address as source of packets that leave the host.
func TestMaintainAddressScope(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	h.ip("addr del 10.77.0.2/32 dev masque0")
	h.ip("addr add 10.77.0.2/32 dev masque0 scope host")
	k := h.maintain(m)
	k.await("the address", func(now Health) bool {
		return now.Repairs["address"] == 2 && len(now.Addresses) == 2
	})
	h.apply(m, State{})
	h.ip("addr add 10.77.0.2/32 dev masque0 scope link") // before Apply
	h.apply(m, fullState())
	if text := h.snapshot()["addr"]; strings.Contains(text, "10.77.0.2/32 scope link") {
		t.Errorf("the address still has scope link:\n%s", text)
	}
	if text := h.snapshot()["addr"]; strings.Contains(text, "10.77.0.2/32 scope host") {
		t.Errorf("the address still has scope host:\n%s", text)
	}
}

// Maintain reports rules and routes of other programs that take precedence over
// the tunnel, but does not delete them.
func TestMaintainReportsBypass(t *testing.T) {
	for _, tt := range []struct {
		name     string
		do, undo []string // arguments of ip(8)
		problem  string   // part of the problem
		routes   string   // the tunnel's routes; empty: full tunnel
	}{
		{"routes of the host first", []string{"rule add priority 100 lookup main"},
			[]string{"rule del priority 100"}, "rule 100", ""},
		{"IPv6", []string{"-6 rule add priority 100 lookup main"},
			[]string{"-6 rule del priority 100"}, "rule 100", ""},
		{
			"table that gets a route later",
			[]string{"rule add priority 5210 not fwmark 0x51 lookup 77",
				"route add default dev up0 table 77"},
			[]string{"route flush table 77"}, "rule 5210", "",
		},
		{"route in the local table", []string{"route add 0.0.0.0/1 dev up0 table local"},
			[]string{"route del 0.0.0.0/1 dev up0 table local"}, "ip route get 9.9.9.9", ""},
		{
			"split tunnel", []string{"rule add priority 100 lookup 77",
				"route add 198.18.0.0/15 dev up0 table 77"},
			[]string{"rule del priority 100"}, "packets to 198.18.5.1 leave by up0",
			"198.18.5.0/24",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			state := fullState()
			if tt.routes != "" {
				state.Routes, state.Exclude = prefixes(tt.routes), nil
			}
			h.apply(m, state)
			k := h.maintain(m)
			if now, _ := k.now(); now.Problem != "" {
				t.Errorf("the problem before is %q", now.Problem)
			}
			for _, change := range tt.do {
				h.ip(change)
			}
			k.await("the problem", func(now Health) bool {
				return strings.Contains(now.Problem, tt.problem)
			})
			for _, change := range tt.undo {
				h.ip(change)
			}
			if now := k.await("no problem", func(now Health) bool {
				return now.Problem == ""
			}); len(now.Repairs) != 0 {
				t.Errorf("repairs: %v, want none", now.Repairs)
			}
		})
	}
}

// Routes of the host that take precedence, and routes of other tunnels, are not
// reported as a problem.
func TestMaintainAcceptsHostRoutes(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	h.tun("masque1")
	split := State{MTU: 1400, Addresses: prefixes("10.77.0.2/32"),
		Routes: prefixes("192.168.5.0/24", "198.18.0.0/15", "198.18.0.0/16")}
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, split)
	k := h.maintain(m)
	other := split
	other.Addresses, other.Routes = prefixes("10.78.0.2/32"), prefixes("198.18.0.0/24")
	h.apply(h.open(Config{Instance: "two", Interface: "masque1", Mark: DefaultMark}), other)
	h.ip("route add 198.18.0.0/28 dev up0")
	h.ip("link set masque0 mtu 1300")
	if now := k.await("a repair", func(now Health) bool {
		return now.Repairs[kindMTU] == 1
	}); now.Problem != "" {
		t.Errorf("the problem is %q, want none", now.Problem)
	}
}

// Maintain does not count changes of Apply as repairs.
func TestMaintainIgnoresApply(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	k := h.maintain(m) // before the first Apply
	other := fullState()
	other.Addresses, other.MTU = prefixes("10.77.0.3/32", "fd77::3/128"), 1380
	for range 10 {
		h.apply(m, fullState())
		h.apply(m, other)
	}
	now := k.await("the last state", func(now Health) bool {
		return slices.Equal(now.Addresses, other.Addresses)
	})
	if now.Problem != "" || len(now.Repairs) != 0 {
		t.Errorf("got %+v, want no repairs", now)
	}
	h.close(m)
	if err := <-k.done; err != nil {
		t.Errorf("after Close, Maintain returns %v", err)
	}
}

// Maintain and Apply return ErrInterfaceGone if the interface was deleted.
func TestMaintainLostInterface(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	k := h.maintain(m)
	h.ip("link del masque0")
	if err := <-k.done; !errors.Is(err, ErrInterfaceGone) {
		t.Errorf("Maintain returns %v, want %v", err, ErrInterfaceGone)
	}
	if err := h.tryApply(m, fullState()); !errors.Is(err, ErrInterfaceGone) {
		t.Errorf("Apply returns %v, want %v", err, ErrInterfaceGone)
	}
}

// While another program has disabled IPv6 on the interface, IPv6 packets for
// the tunnel are unreachable instead of leaving outside it.
func TestMaintainHoldsIPv6(t *testing.T) {
	h := newHost(t)
	h.underlay()
	tunnel, _ := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	k := h.maintain(m)
	h.sysctl("net/ipv6/conf/masque0/disable_ipv6", "1")
	k.await("IPv6 to be unreachable", func(now Health) bool {
		return now.IPv6Held && strings.Contains(now.Problem,
			"net.ipv6.conf.masque0.disable_ipv6") && len(now.Addresses) == 1
	})
	h.wantInterfaces(map[string]int{"2a00::1": 0, "2001:db8:1::1": 0})
	h.sysctl("net/ipv6/conf/masque0/disable_ipv6", "0")
	k.await("IPv6 in the tunnel", func(now Health) bool {
		return !now.IPv6Held && now.Problem == "" && len(now.Addresses) == 2
	})
	h.wantInterfaces(map[string]int{"2a00::1": tunnel})
}

// Maintain notices that another program replaced a rule by one with the same
// comment.
func TestMaintainDetectsReplacedRule(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	k := h.maintain(m)
	h.do(func() {
		c, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		table := &nftables.Table{Name: m.tableName(), Family: nftables.TableFamilyINet}
		rules, err := c.GetRules(table, &nftables.Chain{Name: "guard", Table: table})
		if err != nil || len(rules) == 0 {
			t.Fatalf("%d rules, %v", len(rules), err)
		}
		r := rules[0]
		c.ReplaceRule(&nftables.Rule{Table: table, Chain: r.Chain, Handle: r.Handle,
			UserData: r.UserData, Exprs: []expr.Any{
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	})
	k.await("a repair", func(now Health) bool {
		return now.Repairs["table"] == 1 && now.Problem == ""
	})
	if rules := h.run("nft", "list", "chain", "inet", m.tableName(), "guard"); strings.Count(rules,
		"drop") != 3 {
		t.Errorf("the chain is\n%s", rules)
	}
}

// Maintain reports a failed repair as a problem until the repair succeeds.
func TestMaintainFailures(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	failing := false
	commit := m.commit
	m.commit = func(table string, replace bool, chains []chain) error {
		if failing {
			return unix.ENOMEM
		}
		return commit(table, replace, chains)
	}
	h.apply(m, fullState())
	m.mu.Lock()
	failing = true
	m.mu.Unlock()
	k := h.maintain(m)
	h.run("nft", "delete", "table", "inet", m.tableName())
	k.await("a problem", func(now Health) bool {
		return strings.Contains(now.Problem, "write nftables table inet masque-one") &&
			strings.Contains(now.Problem, "out of memory")
	})
	m.mu.Lock()
	failing = false
	m.mu.Unlock()
	k.await("a repair", func(now Health) bool {
		return now.Problem == "" && now.Repairs["table"] == 1
	})
}

// If another program undoes every repair, Maintain repairs less often and
// reports a problem.
func TestMaintainContested(t *testing.T) {
	h := newHost(t)
	h.log = new(logtest.Buffer)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
		Logger: h.log.Logger()})
	h.apply(m, fullState())
	k := h.maintain(m)
	for n := uint64(1); n <= immediateRepairs+1; n++ {
		h.ip("link set masque0 mtu 1300")
		k.await("the MTU", func(now Health) bool { return now.Repairs["mtu"] == n })
	}
	k.await("a problem", func(now Health) bool {
		return strings.Contains(now.Problem, "set the MTU of masque0")
	})
	h.ip("link set masque0 mtu 1300")
	h.ip("rule del priority 9549") // other objects are still repaired immediately
	now := k.await("the rule", func(now Health) bool { return now.Repairs["rule"] == 1 })
	if now.Repairs["mtu"] != immediateRepairs+1 {
		t.Errorf("the MTU was repaired %d times, want %d", now.Repairs["mtu"],
			immediateRepairs+1)
	}
	k.await("a later repair of the MTU", func(now Health) bool {
		return now.Repairs["mtu"] == immediateRepairs+2
	})
	if n := strings.Count(h.log.String(), "again and again: stop it"); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
}

// reconcileLoop spends at most a fifth of the time reconciling, however often
// the kernel's state changes and however long one run takes.
func TestReconcileLoopPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		changed := make(chan struct{}) // always ready
		go func() {
			for {
				select {
				case changed <- struct{}{}:
				case <-ctx.Done():
					return
				}
			}
		}()
		const duration = 100 * time.Millisecond
		runs := 0
		err := reconcileLoop(ctx, changed, func(bool) (time.Duration, error) {
			runs++
			time.Sleep(duration)
			return 0, nil
		})
		limit := int(time.Minute/(duration*(1+pauseFactor))) + 1
		if err != nil || runs < limit-2 || runs > limit {
			t.Errorf("%d runs, %v, want about %d", runs, err, limit)
		}
	})
}

// The kernel does not notify this process of changes to objects of other
// programs, because a host may change other routes thousands of times per
// second.
func TestNotificationsAreFiltered(t *testing.T) {
	h := newHost(t)
	h.underlay()
	index, _ := h.tun("masque0")
	h.ip("link set masque0 up")
	var n *notifications
	h.do(func() {
		var err error
		if n, err = subscribe(unix.NETLINK_ROUTE,
			slices.Concat(linkGroups, routeGroups, ruleGroups),
			notificationFilter(index)); err != nil {
			t.Fatal(err)
		}
	})
	defer n.file.Close()
	own := fmt.Sprintf("192.0.2.0/24 dev up0 proto static table %d", tableID(index, 24))
	foreign := "route add 192.0.2.0/24 dev up0 proto static\n" +
		"route del 192.0.2.0/24 dev up0 proto static\n" +
		"route add 2001:db8:9::/48 dev up0 proto static\n" +
		"route del 2001:db8:9::/48 dev up0 proto static\n"
	h.batch(strings.Repeat(foreign, 1000))
	h.ip("addr add 192.168.5.3/24 dev up0")
	h.ip("link add other type veth peer name another")
	for _, tt := range []struct {
		change string // arguments of ip(8)
		want   uint16 // type of the next message; 0: not checked
	}{
		{"rule add fwmark 7 lookup 7", unix.RTM_NEWRULE},
		{"rule del fwmark 7 lookup 7", unix.RTM_DELRULE},
		{"addr add 10.77.0.2/32 dev masque0", unix.RTM_NEWADDR},
		{"route add 192.0.2.0/24 dev masque0 proto 94", 0},
		{"route del 192.0.2.0/24 dev masque0 proto 94", unix.RTM_DELROUTE},
		{"route add " + own, unix.RTM_NEWROUTE},
		{"route del " + own, unix.RTM_DELROUTE},
		{fmt.Sprintf("route add 192.0.2.0/24 dev up0 proto static table %d",
			tableID(index+1, 24)), 0},
		{fmt.Sprintf("-6 route add default dev up0 proto static table %d", tableID(index, 0)),
			unix.RTM_NEWROUTE},
		{"link set masque0 mtu 1300", unix.RTM_NEWLINK},
	} {
		t.Run(tt.change, func(t *testing.T) {
			h.in(t).ip(tt.change)
			if tt.want == 0 {
				return
			}
			message := make([]byte, 1<<14)
			for {
				if _, err := n.file.Read(message); err != nil {
					t.Fatal(err)
				}
				got := binary.NativeEndian.Uint16(message[messageType:])
				if got == tt.want {
					break
				}
				// The kernel sends some messages about the interface with a
				// delay, such as about its carrier and link-local address.
				about := int(binary.NativeEndian.Uint32(message[interfaceIndex:]))
				if got != unix.RTM_NEWLINK && got != unix.RTM_NEWADDR && got != unix.RTM_DELADDR ||
					about != index {
					t.Fatalf("got a message of type %d, want %d", got, tt.want)
				}
			}
		})
	}
}

// batch runs ip(8) with one command per line.
func (h *host) batch(lines string) {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.run("ip", "-batch", file)
}

// maintainKillSwitch runs k.Maintain until the test ends.
func (h *host) maintainKillSwitch(k *KillSwitch) <-chan KillSwitchHealth {
	h.t.Helper()
	health := make(chan KillSwitchHealth, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.do(func() {
			if err := k.Maintain(ctx, func(h KillSwitchHealth) { health <- h }); err != nil {
				h.t.Error(err)
			}
		})
	}()
	h.t.Cleanup(func() {
		cancel()
		<-done
	})
	if now := <-health; !now.Closed || now.Problem != "" {
		h.t.Fatalf("the first KillSwitchHealth is %+v", now)
	}
	return health
}

// KillSwitch.Maintain closes a kill switch that another program opened, for the
// same interface and at a limited rate.
func TestKillSwitchMaintain(t *testing.T) {
	h, _ := connect(t)
	h.log = new(logtest.Buffer)
	h.tun("masque0")
	k := &KillSwitch{Instance: "one", Mark: DefaultMark, Logger: h.log.Logger()}
	h.closeKillSwitch(k, "masque0")
	ruleset := h.run("nft", "--stateless", "list", "ruleset")
	health := h.maintainKillSwitch(k)
	repairs := uint64(0)
	for _, damage := range []string{
		"nft flush ruleset",
		"nft delete table inet masquevpn-kill-one",
		"nft insert rule inet masquevpn-kill-one output accept",
		"nft flush table inet masquevpn-kill-one",
		"nft add table inet masquevpn-kill-one { flags dormant ; }",
	} {
		t.Run(damage, func(t *testing.T) {
			h := h.in(t)
			args := strings.Fields(damage)
			h.run(args[0], args[1:]...)
			repairs++
			if now := <-health; now != (KillSwitchHealth{Closed: true, Repairs: repairs}) {
				t.Errorf("got %+v, want closed with %d repairs", now, repairs)
			}
			if h.canSend("0.0.0.0:0", proxyAddr4+":443", 0) {
				t.Error("packets leave")
			}
			if got := h.run("nft", "--stateless", "list", "ruleset"); got != ruleset {
				t.Errorf("got\n%s\nwant\n%s", got, ruleset)
			}
		})
	}
	if n := strings.Count(h.log.String(), "closed again"); n != int(repairs) {
		t.Errorf("logged %d times, want %d:\n%s", n, repairs, h.log)
	}
	h.closeKillSwitch(k, "") // this process makes this change
	h.closeKillSwitch(k, "masque0")
	h.run("nft", "flush", "ruleset")
	repairs++
	if now := <-health; !now.Closed || now.Problem == "" || now.Repairs != repairs {
		t.Errorf("after the last immediate repair: %+v, want a problem", now)
	}
	h.run("nft", "flush", "ruleset")
	if now := <-health; now.Closed || now.Problem == "" {
		t.Errorf("after the next flush: %+v, want open", now)
	}
	if now := <-health; !now.Closed || now.Repairs != repairs+1 {
		t.Errorf("after the delayed repair: %+v, want closed", now)
	}
}
