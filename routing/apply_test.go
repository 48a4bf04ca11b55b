package routing

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"masquevpn/internal/logtest"
)

// fullState returns the State of a client with a full tunnel, further routes
// and exclusions.
func fullState() State {
	return State{
		MTU:       1400,
		Addresses: prefixes("10.77.0.2/32", "fd77::2/128"),
		Routes:    prefixes("0.0.0.0/0", "::/0", "10.0.0.0/8", "172.16.0.0/12", "2001:db8:1::/48"),
		Exclude:   prefixes("10.9.0.0/16", "2001:db8:1:9::/64"),
	}
}

func TestCloseRestoresTheHost(t *testing.T) {
	for _, tt := range []struct {
		name  string
		mark  uint32
		state State
	}{
		{"client", DefaultMark, fullState()},
		{"proxy", 0, State{
			MTU:        1380,
			Addresses:  prefixes("10.77.0.1/24", "fd77::1/64"),
			Routes:     prefixes("10.77.0.0/24", "192.0.2.0/24", "fd77::/64"),
			Forward:    true,
			Masquerade: prefixes("10.77.0.0/24", "fd77::/64"),
		}},
		{"gateway", DefaultMark, State{
			Addresses:  prefixes("10.77.0.2/32"),
			Routes:     prefixes("192.0.2.0/24"),
			Forward:    true,
			Masquerade: prefixes("198.51.100.0/24"),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			before := h.snapshot()
			journal := filepath.Join(t.TempDir(), "state", "one.json")
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: tt.mark,
				Journal: journal})
			h.apply(m, tt.state)
			during := h.snapshot()
			for _, object := range []string{"addr", "route", "ruleset"} {
				if during[object] == before[object] {
					t.Errorf("Apply did not change %s", object)
				}
			}
			if info, err := os.Stat(journal); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("journal while open: %v, %v; want mode 0600", info, err)
			}
			h.close(m)
			h.wantSnapshot(before)
			if _, err := os.Stat(journal); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("journal after Close: %v, want none", err)
			}
			h.close(m) // does nothing
			if err := h.tryApply(m, tt.state); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Apply after Close: %v, want os.ErrClosed", err)
			}
		})
	}
}

func TestCloseAfterInterfaceRemoval(t *testing.T) {
	h := newHost(t)
	h.underlay()
	before := h.snapshot()
	_, closeTUN := h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	closeTUN()
	h.close(m)
	h.wantSnapshot(before)
}

// Objects that the administrator created, such as an address of the interface,
// stay after Close.
func TestForeignObjectsStay(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	h.ip("link set masque0 mtu 1300 up")
	h.ip("addr add 10.77.0.2/32 dev masque0")
	h.ip("rule add fwmark 7 lookup 100 priority 9548 protocol static")
	h.run("nft", "add table inet masque-other")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	h.apply(m, State{})
	h.close(m)
	h.wantSnapshot(before)
}

// changes returns the number of netlink notifications that f causes.
func (h *host) changes(f func()) (n int) {
	h.t.Helper()
	h.do(func() {
		groups := []uint{
			unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE,
			unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
			unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
		}
		route, err := nl.Subscribe(unix.NETLINK_ROUTE, groups...)
		if err != nil {
			h.t.Fatal(err)
		}
		defer route.Close()
		filter, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		if err != nil {
			h.t.Fatal(err)
		}
		defer filter.Close()
		f()
		// Notifications are queued before the request that causes them returns.
		buf := make([]byte, 1<<16)
		for _, s := range []*nl.NetlinkSocket{route, filter} {
			for {
				size, _, err := unix.Recvfrom(s.GetFd(), buf, unix.MSG_DONTWAIT)
				if errors.Is(err, unix.EAGAIN) {
					break
				}
				if err != nil {
					h.t.Fatal(err)
				}
				msgs, err := syscall.ParseNetlinkMessage(buf[:size])
				if err != nil {
					h.t.Fatal(err)
				}
				n += len(msgs)
			}
		}
	})
	return n
}

// fewestChanges returns the minimum of changes(f(0)), changes(f(1)) and so on,
// because the kernel sends notifications of unrelated changes, such as the
// state of links, with a delay.
func (h *host) fewestChanges(f func(try int) func()) int {
	h.t.Helper()
	n := h.changes(f(0))
	for try := range 5 {
		n = min(n, h.changes(f(1+try)))
	}
	return n
}

func TestApplyAgainChangesNothing(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	apply := func(s State) func() {
		return func() {
			if err := m.Apply(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := fullState()
	s.Forward, s.Masquerade = true, prefixes("192.0.2.0/24")
	if n := h.changes(apply(s)); n == 0 {
		t.Fatal("no notification of the first Apply: changes does not work")
	}
	slices.Reverse(s.Routes)
	slices.Reverse(s.Addresses)
	s.Routes = append(s.Routes, s.Routes[0])
	if n := h.fewestChanges(func(int) func() { return apply(s) }); n != 0 {
		t.Errorf("the same state again: %d notifications, want none", n)
	}
	more := func(i int) func() {
		s.Routes = append(s.Routes,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(32 + 16*i), 0, 0}), 12))
		return apply(s)
	}
	if n := h.fewestChanges(more); n != 1 {
		t.Errorf("one more route of a known length: %d notifications, want 1", n)
	}
}

// stableSecret is a secret for addresses of the interface. The kernel creates
// it when a larger MTU turns IPv6 on again.
const stableSecret = "/proc/sys/net/ipv6/conf/masque0/stable_secret"

func TestApplySequence(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	fresh := h.snapshot()
	delete(before, stableSecret)
	delete(fresh, stableSecret)
	for _, tt := range []struct {
		name  string
		state State
	}{
		{"other address", State{MTU: 1300, Addresses: prefixes("10.77.0.3/32"),
			Routes: prefixes("10.0.0.0/8")}},
		{"IPv6 address", State{Addresses: prefixes("10.77.0.3/32", "fd77::9/128"),
			Routes: prefixes("::/0")}},
		{"other prefix lengths", State{Addresses: prefixes("10.77.0.3/24", "fd77::9/64"),
			Routes: prefixes("::/0")}},
		{"MTU for IPv4 only, no address", State{MTU: 1200, Routes: prefixes("198.51.100.0/24")}},
		{"nothing", State{}},
		{"secondary addresses", State{MTU: 1000,
			Addresses: prefixes("10.77.0.3/24", "10.77.0.4/24", "10.77.0.5/24"),
			Routes:    prefixes("0.0.0.0/1")}},
		{"without the primary address", State{MTU: 1000,
			Addresses: prefixes("10.77.0.4/24", "10.77.0.5/24"), Routes: prefixes("0.0.0.0/1")}},
		{"forwarding", State{Forward: true, Masquerade: prefixes("10.0.0.0/8")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			h.apply(m, tt.state)
			addrs := h.ip("-o addr show dev masque0")
			if got := strings.Count(addrs, "inet"); got != len(tt.state.Addresses) {
				t.Errorf("%d addresses of the interface, want %d:\n%s", got,
					len(tt.state.Addresses), addrs)
			}
			for _, a := range tt.state.Addresses {
				if !strings.Contains(addrs, a.String()) {
					t.Errorf("address %v is missing:\n%s", a, addrs)
				}
			}
		})
	}
	h.apply(m, fullState())
	h.wantSnapshot(fresh)
	h.close(m)
	h.wantSnapshot(before)
}

func TestApplyRepairs(t *testing.T) {
	h := newHost(t)
	h.underlay()
	index, _ := h.tun("masque0")
	h.sysctl("net/ipv4/conf/all/src_valid_mark", "0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, fullState())
	good := h.snapshot()
	for _, damage := range []string{
		"ip route flush table all proto 94",
		"ip -6 route flush table all proto 94",
		"ip rule del priority 9548",
		"ip -6 rule del priority 9741",
		"ip addr del 10.77.0.2/32 dev masque0",
		"ip addr flush dev masque0",
		"ip link set masque0 down",
		"ip link set masque0 mtu 1280",
		"ip link set masque0 mtu 1000",
		"nft flush ruleset",
		"nft flush chain inet masque-one restore",
		"nft delete chain inet masque-one guard",
		"sysctl -w net.ipv4.conf.all.src_valid_mark=0",
	} {
		t.Run(damage, func(t *testing.T) {
			h := h.in(t)
			args := strings.Fields(damage)
			if args[0] == "sysctl" {
				h.sysctl("net/ipv4/conf/all/src_valid_mark", "0")
			} else {
				h.run(args[0], args[1:]...)
			}
			h.apply(m, fullState())
			now := h.snapshot()
			for object := range good {
				if now[object] != good[object] && object != stableSecret {
					t.Errorf("%s is\n%s\nwant\n%s", object, now[object], good[object])
				}
			}
		})
	}
	if got := h.lookup("203.0.113.9", 0); got != index {
		t.Errorf("203.0.113.9 is routed to interface %d, want %d", got, index)
	}
}

func TestRollback(t *testing.T) {
	first := State{MTU: 1400, Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("10.0.0.0/8")}
	for _, tt := range []struct {
		name   string
		before State
	}{{"from nothing", State{}}, {"from a state", first}} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			// A route of another program in the main table that prevents Apply
			// from adding its own. Apply fails after it configured the
			// interface, the nftables table and other routes.
			h.ip("-6 route add 2001:db8:1::/48 dev up0 metric 9484 proto static")
			pristine := h.snapshot()
			m := h.open(Config{Instance: "one", Interface: "masque0",
				Journal: filepath.Join(t.TempDir(), "j.json")})
			if tt.before.MTU != 0 {
				h.apply(m, tt.before)
			}
			before := h.snapshot()
			wanted := fullState()
			wanted.Exclude = nil
			err := h.tryApply(m, wanted)
			if !errors.Is(err, syscall.EEXIST) ||
				!strings.Contains(err.Error(), "2001:db8:1::/48") ||
				!strings.Contains(err.Error(), "remove it") {
				t.Errorf("Apply: %v; want file exists, with the route and a remedy", err)
			}
			h.wantSnapshot(before)
			h.apply(m, first)
			h.close(m)
			h.wantSnapshot(pristine)
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	many := make([]netip.Prefix, MaxRoutes+1)
	for i := range many {
		many[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8),
			byte(i)}), 32)
	}
	for _, tt := range []struct {
		name  string
		state State
		is    error  // matched by the error; nil: not checked
		text  string // part of the error
	}{
		{"too many routes", State{Routes: many}, ErrTooManyRoutes, "16385"},
		{"host bits", State{Routes: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}}, nil,
			"10.0.0.0/8"},
		{"no prefix", State{Exclude: []netip.Prefix{{}}}, nil, "exclude"},
		{"mapped", State{Masquerade: prefixes("::ffff:10.0.0.0/104")}, nil, "masquerade"},
		{"no address", State{Addresses: prefixes("0.0.0.0/0")}, nil, "0.0.0.0/0"},
		{"MTU", State{MTU: 67}, nil, "68"},
		{"MTU for IPv6", State{MTU: 1279, Routes: prefixes("::/0")}, nil, "1280"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := h.in(t).tryApply(m, tt.state)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) ||
				!strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q, %v", err, tt.text, tt.is)
			}
		})
	}
	h.wantSnapshot(before)
	proxy := h.open(Config{Instance: "two", Interface: "masque0"})
	if err := h.tryApply(proxy, State{Exclude: prefixes("10.0.0.0/8")}); err == nil ||
		!strings.Contains(err.Error(), "mark") {
		t.Errorf("exclude without mark: %v", err)
	}
}

func TestManyRoutes(t *testing.T) {
	h := newHost(t)
	h.underlay()
	index, _ := h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := State{Addresses: prefixes("10.77.0.2/32")}
	for i := range MaxRoutes {
		s.Routes = append(s.Routes,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
	}
	h.apply(m, s)
	if got := h.lookup("10.63.255.1", 0); got != index {
		t.Errorf("10.63.255.1 is routed to interface %d, want %d", got, index)
	}
	h.close(m)
	h.wantSnapshot(before)
}

// If IPv6 is disabled on the interface, IPv4 packets enter the tunnel, and IPv6
// packets for the tunnel are unreachable instead of leaving outside it.
func TestIPv6Disabled(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	h.ip("addr add fd05::2/64 dev up0 nodad")
	h.sysctl("net/ipv6/conf/default/disable_ipv6", "1")
	index, _ := h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	all, lan := prefixes("0.0.0.0/0", "::/0"),
		map[string]int{"203.0.113.9": index, "2a00::1": 0, "2001:db8:5::77": 0, "fd05::77": up,
			"::1": loopback}
	for _, tt := range []struct {
		name  string
		state State
		want  map[string]int // interface by destination; 0: unreachable
	}{
		{"full", State{Routes: all}, lan},
		{"full with the LAN", State{Routes: all, HostRoutes: HostNone},
			map[string]int{"203.0.113.9": index, "2a00::1": 0, "fd05::77": 0}},
		{
			"full with an exclusion", State{Routes: all, Exclude: prefixes("2a00:1::/32")},
			map[string]int{"203.0.113.9": index, "2a00::1": 0, "2a00:1::1": up, "fd05::77": up},
		},
		{"split", State{Routes: prefixes("10.0.0.0/8", "2a00::/16")},
			map[string]int{"10.1.2.3": index, "2a00::1": 0, "2a01::1": up}},
		{"unreachable in State", State{Routes: all[:1], Unreachable: all[1:]}, lan},
		{"full again", State{Routes: all}, lan},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			tt.state.Addresses = prefixes("10.77.0.2/32", "fd77::2/128")
			h.apply(m, tt.state)
			if err := m.Held(); !errors.Is(err, ErrIPv6Disabled) ||
				!strings.Contains(err.Error(), "net.ipv6.conf.masque0.disable_ipv6") {
				t.Errorf("Held: %v, want ErrIPv6Disabled with the sysctl", err)
			}
			h.wantInterfaces(tt.want)
			if got := h.lookup("2a00::1", DefaultMark); got != up {
				t.Errorf("2a00::1 with the mark is routed to interface %d, want %d", got, up)
			}
		})
	}
	h.close(m)
	h.wantSnapshot(before)
}

// IPv6 may be disabled and enabled while the tunnel is up. While it is
// disabled, IPv6 packets are unreachable; otherwise they enter the tunnel.
func TestIPv6DisabledLater(t *testing.T) {
	h := newHost(t)
	h.underlay()
	index, _ := h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	state := State{Addresses: prefixes("10.77.0.2/32", "fd77::2/128"),
		Routes: prefixes("0.0.0.0/0", "::/0")}
	for _, tt := range []struct {
		name, sysctl, value string
		want                int // interface of 2a00::1; 0: unreachable
	}{
		{"on", "masque0", "0", index},
		{"off on the interface", "masque0", "1", 0},
		{"on again", "masque0", "0", index},
		{"off everywhere", "all", "1", 0},
		{"on everywhere", "all", "0", index},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			h.sysctl("net/ipv6/conf/"+tt.sysctl+"/disable_ipv6", tt.value)
			h.apply(m, state)
			h.wantInterfaces(map[string]int{"203.0.113.9": index, "2a00::1": tt.want})
			if held := m.Held(); (held != nil) != (tt.want == 0) {
				t.Errorf("Held: %v", held)
			}
		})
	}
	h.close(m)
	// up0 has lost its IPv6 addresses and routes, so compare only other
	// objects.
	after := h.snapshot()
	for _, object := range []string{"rule", "rule6", "ruleset"} {
		if after[object] != before[object] {
			t.Errorf("%s before:\n%safter:\n%s", object, before[object], after[object])
		}
	}
	if strings.Contains(after["route6"], "proto 94") {
		t.Errorf("routes after:\n%s", after["route6"])
	}
}

// Clean removes the unreachable routes of a killed process.
func TestIPv6DisabledAndKilled(t *testing.T) {
	h := newHost(t)
	up := h.underlay()
	h.sysctl("net/ipv6/conf/default/disable_ipv6", "1")
	before := h.snapshot()
	_, closeTUN := h.tun("masque0")
	c := Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
		Journal: filepath.Join(t.TempDir(), "one.journal")}
	m := h.open(c)
	h.apply(m, State{Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("0.0.0.0/0", "::/0")})
	h.abandon(m)
	closeTUN()
	h.wantInterfaces(map[string]int{"2a00::1": 0})
	h.do(func() {
		if found, err := Clean(c); err != nil || !found {
			t.Errorf("Clean: %t, %v", found, err)
		}
	})
	h.wantInterfaces(map[string]int{"2a00::1": up})
	h.wantSnapshot(before)
}

// A kernel without IPv6 has no net/ipv6 in /proc/sys.
func TestNoIPv6InTheKernel(t *testing.T) {
	h := newHost(t)
	index, _ := h.tun("masque0")
	h.underlay()
	procSys := t.TempDir()
	if err := os.MkdirAll(filepath.Join(procSys, "net"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/sys/net/ipv4", filepath.Join(procSys, "net/ipv4")); err != nil {
		t.Fatal(err)
	}
	var log logtest.Buffer
	h.do(func() {
		m, err := open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
			Logger: log.Logger()}, procSys)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.do(func() { m.Close() }) })
		for range 2 {
			if err := m.Apply(fullState()); err != nil {
				t.Fatal(err)
			}
		}
	})
	if got := strings.Count(log.String(), "no IPv6"); got != 1 {
		t.Errorf("%d log lines about IPv6, want 1:\n%s", got, log.String())
	}
	if got := h.lookup("203.0.113.9", 0); got != index {
		t.Errorf("203.0.113.9 is routed to interface %d, want %d", got, index)
	}
}

func TestOpenRefuses(t *testing.T) {
	h := newHost(t)
	h.tun("masque0")
	for name, c := range map[string]Config{
		"no instance":       {Instance: "", Interface: "masque0"},
		"space":             {Instance: "a b", Interface: "masque0"},
		"long instance":     {Instance: strings.Repeat("x", 65), Interface: "masque0"},
		"missing interface": {Instance: "one", Interface: "nosuch0"},
		"missing directory": {Instance: "one", Interface: "masque0",
			Journal: "/proc/nowhere/j.json"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := h.in(t).tryOpen(c); err == nil {
				t.Errorf("Open(%+v) succeeded", c)
			}
		})
	}
}

// Concurrent calls of Apply do not mix their states, and Close ends them.
func TestConcurrentCalls(t *testing.T) {
	h := newHost(t)
	h.underlay()
	h.tun("masque0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark,
		Journal: filepath.Join(t.TempDir(), "j.json")})
	var wg sync.WaitGroup
	for _, s := range []State{fullState(), {}, {MTU: 1300, Routes: prefixes("10.0.0.0/8")}} {
		wg.Go(func() {
			for range 4 {
				if err := h.tryApply(m, s); err != nil && !errors.Is(err, os.ErrClosed) {
					t.Errorf("Apply: %v", err)
				}
			}
		})
	}
	wg.Go(func() { h.do(func() { _ = m.Apply(fullState()); _ = m.Close() }) })
	wg.Wait()
	h.close(m)
	h.wantSnapshot(before)
}
