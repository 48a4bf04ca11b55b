// Package hostfirewall finds the chains with which other programs' firewalls
// drop packets that the tunnel needs.
//
// A [Flow] describes the packets. [Obstacles] follows them through the nftables
// chains of the calling thread's network namespace, and [Obstacle.Allow] gives
// the command that lets them through. Nothing is changed.
package hostfirewall

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Flow is a kind of packets that a firewall should accept.
type Flow struct {
	// Name describes the packets to a reader, such as "UDP 443 from clients".
	Name string

	Hook Hook

	// In and Out are names of interfaces. Empty means any but the loopback
	// interface.
	In, Out string

	// Port is the UDP destination port. 0 means packets of all protocols.
	Port uint16

	// Reply selects packets that answer. The others begin a connection.
	Reply bool

	// Untracked means that connection tracking does not see the packets.
	Untracked bool
}

// Hook is a place in the kernel's packet path where chains are called.
type Hook string

// The hooks of a Flow.
const (
	HookInput   Hook = "input"
	HookForward Hook = "forward"
	HookOutput  Hook = "output"
)

func (h Hook) number() nftables.ChainHook {
	switch h {
	case HookInput:
		return *nftables.ChainHookInput
	case HookOutput:
		return *nftables.ChainHookOutput
	}
	return *nftables.ChainHookForward
}

// Obstacle is a base chain of nftables that drops packets of a Flow.
type Obstacle struct {
	Family string // ip, ip6 or inet
	Table  string
	Chain  string

	// Maybe means that a rule accepts packets under a condition that Obstacles
	// cannot evaluate, such as an address.
	Maybe bool
}

func (o Obstacle) String() string {
	return fmt.Sprintf("nftables table %s %s, chain %s", o.Family, o.Table, o.Chain)
}

// Obstacles returns the chains that drop packets of f, except those in tables
// whose names begin with skip. It evaluates policies, jumps, and conditions on
// interface, family, protocol, port and connection state. Any other condition
// may hold or not. Rules of iptables-nft are nftables rules and are evaluated
// too; rules of iptables-legacy are not visible.
//
// A kernel without nftables has no obstacles. The error matches
// os.ErrPermission if CAP_NET_ADMIN is missing.
func Obstacles(f Flow, skip string) ([]Obstacle, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	var found []Obstacle
	for _, family := range []struct {
		name     string
		family   nftables.TableFamily
		protocol byte // NFPROTO of the packets, 0: both
	}{
		{"inet", nftables.TableFamilyINet, 0}, {"ip", nftables.TableFamilyIPv4, unix.NFPROTO_IPV4},
		{"ip6", nftables.TableFamilyIPv6, unix.NFPROTO_IPV6},
	} {
		chains, err := c.ListChainsOfTableFamily(family.family)
		if noNFTables(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list nftables chains: %w", explain(err))
		}
		for _, base := range chains {
			if base.Type != nftables.ChainTypeFilter || base.Hooknum == nil ||
				*base.Hooknum != f.Hook.number() || strings.HasPrefix(base.Table.Name, skip) {
				continue
			}
			w := walk{conn: c, flow: f, protocol: family.protocol, chains: chains}
			switch o := (Obstacle{Family: family.name, Table: base.Table.Name,
				Chain: base.Name}); w.base(base) {
			case fateDropped:
				found = append(found, o)
			case fateUnknown:
				o.Maybe = true
				found = append(found, o)
			}
			if w.err != nil {
				return nil, fmt.Errorf("list nftables rules: %w", explain(w.err))
			}
		}
	}
	return found, nil
}

// noNFTables reports whether err means that the kernel lacks nf_tables.
func noNFTables(err error) bool {
	for _, e := range []error{unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT,
		unix.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// explain adds the remedy to a missing privilege.
func explain(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w (run as root or with CAP_NET_ADMIN)", err)
	}
	return err
}

// Allow returns a command that lets packets of f pass o. If f is forwarded,
// device is the tunnel's interface. The command is one of firewall-cmd,
// iptables or nft, for the program that made the chain.
func (o Obstacle) Allow(f Flow, device string) string {
	option, match, iptables := "--add-port="+fmt.Sprint(f.Port)+"/udp",
		fmt.Sprintf("udp dport %d", f.Port), fmt.Sprintf("-p udp --dport %d", f.Port)
	if f.Port == 0 {
		option, match, iptables = "--zone=trusted --add-interface="+device, "iifname "+device,
			"-i "+device
		if f.Out == device {
			match, iptables = "oifname "+device, "-o "+device
		}
	}
	switch {
	case o.Table == "firewalld":
		return "firewall-cmd --permanent " + option + " && firewall-cmd --reload"
	case o.Table == "filter" && o.Chain == strings.ToUpper(o.Chain) && o.Family != "inet":
		program := "iptables"
		if o.Family == "ip6" {
			program = "ip6tables"
		}
		return fmt.Sprintf("%s -I %s %s -j ACCEPT", program, o.Chain, iptables)
	}
	return fmt.Sprintf("nft insert rule %s %s %s %s accept", o.Family, o.Table, o.Chain, match)
}
