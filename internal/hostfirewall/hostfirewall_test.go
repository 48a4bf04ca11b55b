package hostfirewall

import (
	"context"
	"os"
	"strings"
	"testing"

	"masquevpn/internal/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}

// ours is the prefix of the tables that are not obstacles.
const ours = "masque-"

var (
	toProxy   = Flow{Hook: HookInput, Port: 443}
	untracked = Flow{Hook: HookInput, Port: 443, Untracked: true}
	toWorld   = Flow{Hook: HookForward, In: "masque0", Out: "up0"}
	answers   = Flow{Hook: HookForward, In: "up0", Out: "masque0", Reply: true}
	leaves    = Flow{Hook: HookOutput, Port: 443}
)

// host is a network namespace.
type host struct {
	t   *testing.T
	lab *lab.Host
}

// newHost returns a host with the interfaces up0 and docker0.
func newHost(t *testing.T) *host {
	t.Helper()
	l, err := lab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := l.Host("host")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"up", "docker"} {
		(&host{t, h}).run("ip", "link", "add", name+"0", "type", "veth", "peer", "name", name+"1")
	}
	return &host{t, h}
}

// run runs a program on the host.
func (h *host) run(name string, args ...string) {
	h.t.Helper()
	out, err := h.lab.Command(context.Background(), name, args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// find returns the obstacles of f on the host.
func (h *host) find(f Flow) (found []Obstacle) {
	h.t.Helper()
	err := h.lab.Do(func() (err error) {
		found, err = Obstacles(f, ours)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return found
}

// obstacles returns the obstacles of f as text. A question mark is for Maybe.
func (h *host) obstacles(f Flow) string {
	h.t.Helper()
	var list []string
	for _, o := range h.find(f) {
		s := o.Family + " " + o.Table + " " + o.Chain
		if o.Maybe {
			s += "?"
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}

// Obstacles evaluates the chains of every table.
func TestObstacles(t *testing.T) {
	h := newHost(t)
	lines := strings.NewReplacer("} } table", "}\n}\ntable", "} }", "}\n}", "} chain", "}\nchain",
		"} table", "}\ntable")
	const input, forward = "chain input { type filter hook input priority 0; policy drop; ",
		"chain forward { type filter hook forward priority 0; policy drop; "
	for _, tt := range []struct {
		name, rules string
		flow        Flow
		want        string
	}{
		{"no table", "", toProxy, ""},
		{"only a policy", "table inet f { " + input + "} }", toProxy, "inet f input"},
		{"another hook", "table inet f { " + input + "} }", toWorld, ""},
		{"policy accept", "table inet f { chain input { type filter hook input priority 0; } }",
			toProxy, ""},
		{"a chain without a hook", "table inet f { chain input { drop; } }", toProxy, ""},
		{"the port", "table inet f { " + input + "udp dport 443 accept; } }", toProxy, ""},
		{"another port", "table inet f { " + input + "udp dport 444 accept; } }", toProxy,
			"inet f input"},
		{"TCP", "table inet f { " + input + "tcp dport 443 accept; } }", toProxy, "inet f input"},
		{"a range", "table inet f { " + input + "udp dport 400-500 accept; } }", toProxy, ""},
		{"a set", "table inet f { " + input + "udp dport { 53, 443 } accept; } }", toProxy, ""},
		{"a set without it", "table inet f { " + input + "udp dport { 53, 444 } accept; } }",
			toProxy, "inet f input"},
		{"a set of ranges", "table inet f { " + input + "udp dport { 53, 440-450 } accept; } }",
			toProxy, ""},
		{"a set of ranges beside it",
			"table inet f { " + input + "udp dport { 53, 440-442, 444-500 } accept; } }", toProxy,
			"inet f input"},
		{"a named set", "table inet f { set s { type inet_service; elements = { 443 }; } " + input +
			"udp dport @s accept; } }", toProxy, ""},
		{"not in a set", "table inet f { " + input + "udp dport != { 53, 443 } accept; } }",
			toProxy, "inet f input"},
		{"the usual", `table inet f { ` + input +
			`iif lo accept; iifname "lo" accept; ct state established,related accept; ct state invalid drop; meta l4proto icmp accept; tcp dport 22 accept; } }`,
			toProxy, "inet f input"},
		{"the usual with a map", "table inet f { " + input +
			"ct state vmap { established : accept, related : accept, invalid : drop }; } }",
			toProxy, "inet f input"},
		{"a map with new ones", "table inet f { " + input +
			"ct state vmap { established : accept, new : accept }; } }", toProxy, ""},
		{"a map with jumps", "table inet f { chain in { accept; } " + input +
			"udp dport vmap { 53 : drop, 443 : jump in }; } }", toProxy, ""},
		{"a map with devices", `table inet f { chain out { accept; } ` + forward +
			`iifname vmap { "up0" : drop, "masque0" : goto out }; } }`, toWorld, ""},
		{"a map on something else",
			"table inet f { " + input + "ip saddr vmap { 192.0.2.1 : accept }; } }", toProxy,
			"inet f input?"},
		{"new ones", "table inet f { " + input + "ct state new udp dport 443 accept; } }",
			toProxy, ""},
		{"some addresses", "table inet f { " + input +
			"ip saddr 192.0.2.0/24 udp dport 443 accept; } }", toProxy, "inet f input?"},
		{"a limit", "table inet f { " + input + "udp dport 443 limit rate 10/second accept; } }",
			toProxy, "inet f input?"},
		{"another interface may be where they come from",
			`table inet f { ` + input + `iifname "up0" udp dport 443 accept; } }`, toProxy,
			"inet f input?"},
		{"dropped first", "table inet f { " + input +
			"udp dport 443 drop; udp dport 443 accept; } }", toProxy, "inet f input"},
		{"rejected under policy accept",
			"table inet f { chain input { type filter hook input priority 0; tcp dport 22 accept; reject; } }", toProxy, "inet f input"},
		{"rejected maybe", "table inet f { chain input { type filter hook input priority 0; ip saddr 192.0.2.0/24 reject; } }", toProxy, ""},
		{"a jump", "table inet f { chain in { udp dport 443 accept; } " + input + "jump in; } }",
			toProxy, ""},
		{"a jump on a condition that fails",
			"table inet f { chain in { accept; } " + input + "tcp dport 443 jump in; } }", toProxy,
			"inet f input"},
		{"a jump on an address", "table inet f { chain in { accept; } " + input +
			"ip saddr 192.0.2.1 jump in; } }", toProxy, "inet f input?"},
		{"a jump that returns", "table inet f { chain in { return; accept; } " + input +
			"jump in; udp dport 443 accept; } }", toProxy, ""},
		{"goto does not return", "table inet f { chain in { tcp dport 1 accept; } " + input +
			"goto in; udp dport 443 accept; } }", toProxy, "inet f input"},
		{"a chain of the same name elsewhere",
			"table inet e { chain in { accept; } } table inet f { chain in { tcp dport 1 accept; } " + input + "jump in; } }", toProxy, "inet f input"},
		{"of one family", "table ip f { " + input + "} } table ip6 f { " + input +
			"udp dport 443 accept; } }", toProxy, "ip f input"},
		{"two tables", "table inet e { " + input + "udp dport 443 accept; } } table inet f { " +
			input + "} }", toProxy, "inet f input"},

		{"untracked", "table inet f { " + input + "udp dport 443 accept; } }", untracked, ""},
		{"untracked, accepted as new alone",
			"table inet f { " + input + "ct state new udp dport 443 accept; } }", untracked,
			"inet f input"},
		{"untracked, accepted by its state",
			"table inet f { " + input + "ct state new,untracked udp dport 443 accept; } }",
			untracked, ""},
		{"a table of ours", "table inet masque-one { " + forward + "} }", toWorld, ""},

		{"forwarding", "table inet f { " + forward + "} }", toWorld, "inet f forward"},
		{"of the device", `table inet f { ` + forward + `iifname "masque0" accept; } }`,
			toWorld, ""},
		{"of devices like it", `table inet f { ` + forward + `iifname "masque*" accept; } }`,
			toWorld, ""},
		{"of a set of devices", `table inet f { ` + forward +
			`iifname { "wg0", "masque0" } accept; } }`, toWorld, ""},
		{"of another device", `table inet f { ` + forward +
			`iifname "masque1" accept; iif docker0 accept; } }`, toWorld, "inet f forward"},
		{"of the uplink", `table inet f { ` + forward + `oif up0 accept; } }`, toWorld, ""},
		{"not of the other device", `table inet f { ` + forward + `oif != docker0 accept; } }`,
			toWorld, ""},
		{"established alone", "table inet f { " + forward +
			"ct state established,related accept; } }", toWorld, "inet f forward"},
		{"answers", "table inet f { " + forward + "ct state established,related accept; } }",
			answers, ""},
		{"answers that are dropped", `table inet f { ` + forward + `iifname "masque0" accept; } }`,
			answers, "inet f forward"},
		{"containers", `table ip filter { chain USER { return; } chain DOCKER { ip daddr 172.17.0.2 iifname != "docker0" oifname "docker0" tcp dport 80 accept; }
			chain FORWARD { type filter hook forward priority 0; policy drop; jump USER; oifname "docker0" ct state established,related accept;
			oifname "docker0" jump DOCKER; iifname "docker0" oifname != "docker0" accept; } }`, toWorld, "ip filter FORWARD"},

		{"output", "table inet f { chain output { type filter hook output priority 0; policy drop; tcp dport 443 accept; } }", leaves, "inet f output"},
		{"output to the port", "table inet f { chain output { type filter hook output priority 0; policy drop; oif lo accept; udp dport 443 accept; } }", leaves, ""},
		{"output by its mark", "table inet f { chain output { type filter hook output priority 0; policy drop; meta mark 9484 accept; } }", leaves, "inet f output?"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := &host{t, h.lab}
			h.run("nft", "flush ruleset\n"+lines.Replace(tt.rules))
			if got := h.obstacles(tt.flow); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// A command of Allow removes the obstacle.
func TestAllowedFlowHasNoObstacle(t *testing.T) {
	h := newHost(t)
	h.run("nft", "table inet f { chain input { type filter hook input priority 0; policy drop; }; chain forward { type filter hook forward priority 0; policy drop; }; }")
	for _, tt := range []struct {
		name string
		flow Flow
	}{{"input", toProxy}, {"forward", toWorld}, {"forwarded answers", answers}} {
		t.Run(tt.name, func(t *testing.T) {
			h := &host{t, h.lab}
			found := h.find(tt.flow)
			if len(found) != 1 {
				t.Fatalf("got %v, want one obstacle", found)
			}
			command := found[0].Allow(tt.flow, "masque0")
			if !strings.HasPrefix(command, "nft insert rule inet f "+string(tt.flow.Hook)+" ") {
				t.Errorf("got command %s", command)
			}
			h.run("sh", "-c", command)
			if got := h.obstacles(tt.flow); got != "" {
				t.Errorf("after the command: got %q, want none", got)
			}
		})
	}
}

// Allow uses the program that made the chain.
func TestAllow(t *testing.T) {
	for _, tt := range []struct {
		name     string
		obstacle Obstacle
		flow     Flow
		want     string
	}{
		{"iptables", Obstacle{Family: "ip", Table: "filter", Chain: "INPUT"}, toProxy,
			"iptables -I INPUT -p udp --dport 443 -j ACCEPT"},
		{"ip6tables", Obstacle{Family: "ip6", Table: "filter", Chain: "FORWARD"}, toWorld,
			"ip6tables -I FORWARD -i masque0 -j ACCEPT"},
		{"iptables into the tunnel", Obstacle{Family: "ip", Table: "filter", Chain: "FORWARD"},
			answers, "iptables -I FORWARD -o masque0 -j ACCEPT"},
		{"firewalld, a port", Obstacle{Family: "inet", Table: "firewalld", Chain: "filter_INPUT"},
			toProxy, "firewall-cmd --permanent --add-port=443/udp && firewall-cmd --reload"},
		{"firewalld, an interface",
			Obstacle{Family: "inet", Table: "firewalld", Chain: "filter_FORWARD"}, toWorld,
			"firewall-cmd --permanent --zone=trusted --add-interface=masque0 && firewall-cmd --reload"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.obstacle.Allow(tt.flow, "masque0"); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
