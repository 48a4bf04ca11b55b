package routing

import (
	"slices"
	"strings"
	"testing"
)

// FollowHost reports routes of the tunnel and the host that overlap, and which
// of them takes precedence.
func TestConflicts(t *testing.T) {
	h := newHost(t)
	h.underlay() // 192.168.5.2/24, 2001:db8:5::2/64
	h.tun("masque0")
	all := prefixes("0.0.0.0/0", "::/0")
	for _, tt := range []struct {
		name  string
		route string // the host's route
		state State
		want  []string // beginnings of the reported conflicts
	}{
		{"none", "", State{Addresses: prefixes("10.77.0.2/32"),
			Routes: prefixes("0.0.0.0/0", "10.0.0.0/8", "::/0")}, nil},
		{"tunnel's route contains the LAN", "", State{Routes: prefixes("192.168.0.0/16")}, []string{
			"the tunnel's route 192.168.0.0/16 holds 192.168.5.0/24, the network of up0, which goes first",
		}},
		{"same network", "", State{Routes: prefixes("2001:db8:5::/64")}, []string{
			"the tunnel's route 2001:db8:5::/64 holds 2001:db8:5::/64, the network of up0, which goes first",
		}},
		{"LAN in the tunnel", "",
			State{Routes: prefixes("192.168.0.0/16"), HostRoutes: HostNone}, nil},
		{"part of the LAN", "", State{Routes: prefixes("192.168.5.128/25")}, []string{
			"the tunnel's route 192.168.5.128/25 takes addresses out of 192.168.5.0/24, the network of up0: put them into routes.exclude",
		}},
		{"part of the LAN, excluded", "",
			State{Routes: prefixes("192.168.5.128/25"), Exclude: prefixes("192.168.5.0/24")}, nil},
		{"route from DHCP", "0.0.0.0/1 via 192.168.5.1 dev up0", State{Routes: all}, []string{
			"the host's route 0.0.0.0/1 via 192.168.5.1 on up0 leads to public addresses, which stay in the tunnel: put it into routes.exclude",
		}},
		{"route from a router advertisement", "2a00::/16 via 2001:db8:5::1 proto ra",
			State{Routes: all}, []string{
				"the host's route 2a00::/16 via 2001:db8:5::1 on up0 leads to public addresses, which stay in the tunnel",
			}},
		{"network with public addresses", "8.8.8.0/24 dev up0", State{Routes: all},
			[]string{
				"the host's route 8.8.8.0/24 on up0 leads to public addresses, which stay in the tunnel",
			}},
		{"with all routes of the host", "0.0.0.0/1 via 192.168.5.1 dev up0",
			State{Routes: all, HostRoutes: HostAll}, []string{
				"the host's route 0.0.0.0/1 via 192.168.5.1 on up0 takes public addresses out of the tunnel: delete it",
			}},
		{"with no routes of the host", "0.0.0.0/1 via 192.168.5.1 dev up0",
			State{Routes: all, HostRoutes: HostNone}, nil},
		{"excluded route", "8.8.8.0/24 via 192.168.5.1 dev up0",
			State{Routes: all, Exclude: prefixes("8.8.0.0/16")}, nil},
		{"route to a private network", "10.0.0.0/8 via 192.168.5.1", State{Routes: all}, nil},
		{"route to a network behind this host", "8.8.8.0/24 via 192.168.5.1 dev up0",
			State{Routes: all, Private: prefixes("8.8.8.0/24")}, nil},
		{"split tunnel", "0.0.0.0/1 via 192.168.5.1 dev up0",
			State{Routes: prefixes("10.0.0.0/8", "::/0")}, nil},
		{"route with several next hops",
			"8.8.8.0/24 nexthop via 192.168.5.1 nexthop via 192.168.5.3", State{Routes: all},
			[]string{
				"the host's route 8.8.8.0/24 via 192.168.5.1 on up0 leads to public addresses, which stay in the tunnel",
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := h.in(t)
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			h.apply(m, tt.state)
			if tt.route != "" {
				if got := h.conflicts(m); len(got) != 0 {
					t.Errorf("before the route: %q", got)
				}
				h.ip("route add " + tt.route) // later than the tunnel
				defer h.ip("route del " + tt.route)
			}
			got := h.conflicts(m)
			if !slices.EqualFunc(got, tt.want, strings.HasPrefix) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			h.close(m)
		})
	}
	if _, err := h.tryOpen(Config{Instance: "one", Interface: "masque0", Mark: 7}); err == nil ||
		!strings.Contains(err.Error(), "want two bits") {
		t.Errorf("mark of three bits: %v", err)
	}
}

// FollowHost reports policy rules of other programs that exempt some packets
// from a full tunnel.
func TestSelectiveRules(t *testing.T) {
	for _, tt := range []struct {
		name, rule string
		want       string // beginning of the warning; empty: none
	}{
		{"mark", "rule add priority 2001 fwmark 0x100/0x3f00 lookup 77",
			"the host's rule 2001 takes packets with mark 0x100 out of the tunnel, to up0"},
		{"user", "rule add priority 1500 uidrange 0-0 lookup main",
			"the host's rule 1500 takes packets of users 0 to 0 out of the tunnel, to up0"},
		{"IPv6", "-6 rule add priority 2001 fwmark 0x100 lookup main",
			"the host's rule 2001 takes packets with mark 0x100 out of the tunnel, to up0"},
		{"table without a route", "rule add priority 2001 fwmark 0x100 lookup 78", ""},
		{"after the tunnel's rules", "rule add priority 20000 fwmark 0x100 lookup main", ""},
		{"incoming interface",
			"rule add priority 2001 fwmark 0x100 iif up0 lookup main", ""},
		{"source address of the host", "rule add priority 2001 from 192.168.5.2 lookup main", ""},
		{"mark of outer packets",
			"rule add priority 2001 fwmark 0x80000000/0x80000000 lookup main", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.underlay()
			h.tun("masque0")
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			h.apply(m, fullState())
			h.ip("route add default dev up0 table 77")
			h.ip(tt.rule)
			switch got := h.conflicts(m); {
			case tt.want == "" && len(got) > 0, tt.want != "" &&
				(len(got) != 1 || !strings.HasPrefix(got[0], tt.want)):
				t.Errorf("got %q, want %q", got, tt.want)
			}
			h.close(m)
		})
	}
}

// conflicts returns the conflicts that FollowHost reports.
func (h *host) conflicts(m *Manager) (list []string) {
	h.t.Helper()
	h.do(func() {
		var err error
		if list, err = m.FollowHost(); err != nil {
			h.t.Error(err)
		}
	})
	return list
}
