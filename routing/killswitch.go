package routing

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A KillSwitch is a filter in the kernel that lets packets leave this host
// through one tunnel only. It is an nftables table of its own,
// "masquevpn-kill-INSTANCE", apart from that of the Manager, and stays as it is
// until Lift, whatever becomes of the process: it does not outlive a restart of
// the machine. Besides the tunnel, these pass: the loopback interface; sockets
// with the mark (see MarkSocket); the host's DHCP and DHCPv6, neighbour
// discovery and what multicast snooping switches need for it; and destinations
// in Allow. It holds for packets of the host and for those that it forwards. What
// does not pass is refused with Administratively Prohibited, so that programs
// need not wait. Packets that reach this host are none of its business.
//
// Programs that write to an interface below IP, as some DHCP clients do, are not
// held.
type KillSwitch struct {
	Instance string         // as of Config
	Mark     uint32         // of the sockets that carry the tunnel, not 0
	Allow    []netip.Prefix // destinations outside the tunnel
	Logger   *slog.Logger   // nil: nothing is logged
}

func (k *KillSwitch) table() string { return "masquevpn-kill-" + k.Instance }

// Close closes the kill switch but for the interface of that name, which must
// exist; "" for none. One that is closed already is changed in one step: there is
// no moment without it. If it is as it shall be, nothing is changed. Errors:
// os.ErrPermission without CAP_NET_ADMIN, and those of the kernel.
func (k *KillSwitch) Close(iface string) error {
	if !validInstance.MatchString(k.Instance) {
		return fmt.Errorf("routing: kill switch: %w", errInstance(k.Instance))
	}
	index := 0
	if iface != "" {
		link, err := netlink.LinkByName(iface)
		if err != nil {
			return fmt.Errorf("routing: kill switch: interface %q: %w", iface, explain(err))
		}
		index = link.Attrs().Index
	}
	want := k.chains(uint32(index))
	have, found, err := readTable(k.table())
	if err != nil {
		return fmt.Errorf("routing: kill switch: %w", err)
	}
	if found && sameTable(want, have) {
		return nil
	}
	if err := commitTable(k.table(), found, want); err != nil {
		return fmt.Errorf("routing: kill switch: write nftables table inet %s: %w", k.table(), explain(err))
	}
	if k.Logger != nil {
		k.Logger.Info("kill switch closed", "table", k.table(), "interface", iface, "allow", k.Allow, "was_closed", found)
	}
	return nil
}

// Closed says whether the kill switch is closed, by this process or another.
func (k *KillSwitch) Closed() (bool, error) {
	_, found, err := readTable(k.table())
	if err != nil && !hasNoTables(err) {
		return false, fmt.Errorf("routing: kill switch: %w", err)
	}
	return found, nil
}

// Lift removes the kill switch, and says whether it was closed.
func (k *KillSwitch) Lift() (found bool, err error) {
	if found, err = k.Closed(); err != nil || !found {
		return false, err
	}
	if err := commitTable(k.table(), true, nil); err != nil {
		return true, fmt.Errorf("routing: kill switch: delete nftables table inet %s: %w", k.table(), explain(err))
	}
	if k.Logger != nil {
		k.Logger.Info("kill switch lifted", "table", k.table())
	}
	return true, nil
}

const (
	mldReport      = 131 // to mldDone, RFC 2710
	mldDone        = 132
	mld2Report     = 143 // RFC 3810
	ndRouter       = 133 // solicitation, to ndNeighbor, RFC 4861
	ndNeighbor     = 136 // advertisement
	ndHopLimit     = 255
	mldHopLimit    = 1
	dhcpClientPort = 68
	dhcpServerPort = 67
	dhcp6Client    = 546
	dhcp6Server    = 547
)

// chains returns the table's chains. The last one, behind all others of the
// host, sees where packets really go: a packet that another program's mark turns
// around within the output hook keeps its old interface there.
func (k *KillSwitch) chains(index uint32) []chain {
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	own := chain{name: "own", rules: []filter{
		{fmt.Sprintf("sockets with mark %#x carry the tunnel", k.Mark), append(meta(expr.MetaKeyMARK, expr.CmpOpEq, k.Mark), accept...)},
		{"DHCP", slices.Concat(ports(unix.NFPROTO_IPV4, dhcpClientPort, dhcpServerPort), accept)},
		{"DHCPv6", slices.Concat(ports(unix.NFPROTO_IPV6, dhcp6Client, dhcp6Server), accept)},
		{"neighbour and router discovery", slices.Concat(icmp6(ndHopLimit, ndRouter, ndNeighbor), accept)},
		{"multicast listener reports, for switches that look at them", slices.Concat(icmp6(mldHopLimit, mldReport, mldDone), accept)},
		{"multicast listener reports, version 2", slices.Concat(icmp6(mldHopLimit, mld2Report, mld2Report), accept)},
	}}
	all := chain{name: "all", rules: []filter{
		{"loopback", append(meta(expr.MetaKeyOIF, expr.CmpOpEq, loopback), accept...)},
	}}
	if index != 0 {
		all.rules = append(all.rules, filter{
			fmt.Sprintf("interface %d is the tunnel", index), append(meta(expr.MetaKeyOIF, expr.CmpOpEq, index), accept...),
		})
	}
	for _, p := range sorted(k.Allow) {
		all.rules = append(all.rules, filter{fmt.Sprintf("%v is allowed", p), slices.Concat(address(p, false), accept)})
	}
	refuse := filter{"everything else is refused", []expr.Any{
		&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED},
	}}
	closed := nftables.ChainPolicyDrop
	return []chain{own, all, {
		name: "output", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityFilter, policy: &closed,
		rules: []filter{jump(own), jump(all), refuse},
	}, {
		name: "forward", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, policy: &closed,
		rules: []filter{jump(all), refuse},
	}, {
		name: "leave", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityLast, policy: &closed,
		rules: []filter{jump(own), jump(all), {"everything else is dropped", drop()}},
	}}
}

func jump(to chain) filter {
	return filter{"to chain " + to.name, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to.name}}}
}

// is compares a property of the packet that is one byte.
func is(key expr.MetaKey, value byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}}}
}

// ports matches UDP packets of a family by both ports.
func ports(family byte, from, to uint16) []expr.Any {
	return slices.Concat(is(expr.MetaKeyNFPROTO, family), is(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: slices.Concat(binaryutil.BigEndian.PutUint16(from), binaryutil.BigEndian.PutUint16(to))},
	})
}

// icmp6 matches ICMPv6 messages of the types from low to high with a hop limit.
func icmp6(hopLimit, low, high byte) []expr.Any {
	return slices.Concat(is(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6), is(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMPV6), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{hopLimit}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{low}, ToData: []byte{high}},
	})
}
