package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// docs/firewall.md explains the chains, one item for each rule.

// Priorities that no other program uses. The order of chains with the same
// priority would depend on which of them was created first.
var (
	// priorityMarks is after connection tracking (-200) and before the chains
	// at -150 in which other programs filter by reverse path or use marks.
	priorityMarks = nftables.ChainPriorityRef(-175)

	// priorityLeave is after source translation (100).
	priorityLeave = nftables.ChainPriorityRef(110)
)

// newChains returns the chains of a State.
func newChains(s State, k *kernel, policyRouting bool) (chains []chain) {
	if len(s.Masquerade) != 0 && len(s.Listen) != 0 {
		chains = append(chains, newUntrackedChains(s)...)
	}
	if k.Mark != 0 && len(s.Addresses) != 0 {
		chains = append(chains, newOuterChain(k))
	}
	if len(s.Addresses) != 0 {
		chains = append(chains, newGuardChain(s, k))
	}
	if policyRouting {
		chains = append(chains, newMarkChains(k)...)
		chains = append(chains, newInboundChains(s, k)...)
	}
	if s.HoldDNS && k.Mark != 0 {
		chains = append(chains, newDNSChains(k)...)
	}
	if s.Forward || k.Mark != 0 {
		chains = append(chains, newForwardChain(s, k))
	}
	if len(s.Masquerade) != 0 {
		chains = append(chains, newTranslationChains(s, k)...)
	}
	if arp := newARPChain(s, k); k.Mark != 0 && len(arp.rules) != 0 {
		chains = append(chains, arp)
	}
	return chains
}

// newUntrackedChains returns the chains that keep packets of our servers out of
// connection tracking. A user of the tunnel, who chooses ports that may be
// translated, then cannot receive these packets.
func newUntrackedChains(s State) []chain {
	const lost = "a user whose packets are translated to a port of the proxy may receive packets for the proxy"
	in := chain{
		name: "untracked", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw,
		needs: needsGuard, without: lost,
	}
	out := chain{
		name: "untracked-output", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw,
		needs: needsGuard, without: lost,
	}
	for _, port := range slices.Compact(slices.Sorted(slices.Values(s.Listen))) {
		in.rules = append(in.rules, chainRule{
			fmt.Sprintf("UDP to port %d of this host is not tracked", port),
			slices.Concat(udp(2, port), destinationType(unix.RTN_LOCAL),
				[]expr.Any{&expr.Notrack{}}),
		})
		out.rules = append(out.rules, chainRule{
			fmt.Sprintf("UDP from port %d of this host is not tracked", port),
			slices.Concat(udp(0, port), []expr.Any{&expr.Notrack{}}),
		})
	}
	return []chain{in, out}
}

// newGuardChain returns the chain that drops packets for the tunnel's addresses
// from other interfaces, and packets from the tunnel with a source address of
// this host.
func newGuardChain(s State, k *kernel) chain {
	guard := chain{
		name: "guard", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw,
		needs: needsGuard, without: "packets for tunnel addresses from other interfaces, and packets from the tunnel with a source address of this host, are accepted",
	}
	if k.Mark != 0 {
		guard.rules = append(guard.rules, guardExceptions(k)...)
	}
	inside := meta(expr.MetaKeyIIF, expr.CmpOpEq, uint32(k.index))
	for _, p := range s.Addresses {
		own := netip.PrefixFrom(p.Addr(), p.Addr().BitLen())
		if k.Mark != 0 {
			guard.rules = append(guard.rules, chainRule{
				fmt.Sprintf("%v is reached through interface %d or from this host only", p.Addr(),
					k.index),
				slices.Concat(
					meta(expr.MetaKeyIIF, expr.CmpOpNeq, uint32(k.index)),
					meta(expr.MetaKeyIIF, expr.CmpOpNeq, loopback),
					address(own, false), drop(),
				),
			})
		}
		guard.rules = append(guard.rules, chainRule{
			fmt.Sprintf("packets from the tunnel's own address %v are accepted", p.Addr()),
			slices.Concat(inside, address(own, true), accept()),
		})
	}
	guard.rules = append(guard.rules, chainRule{
		fmt.Sprintf("packets from interface %d do not have a source address of this host", k.index),
		slices.Concat(inside, sourceType(expr.CmpOpEq, unix.RTN_LOCAL), drop()),
	})
	if k.Mark == 0 {
		guard.rules = append(guard.rules, k.hostAddressRules(s, inside)...)
	}
	return guard
}

// hostAddressRules returns the rules that let clients of a proxy reach this
// host by the tunnel's addresses only. The kernel evaluates the type of the
// destination for each packet, so that the rules apply to new addresses too,
// and to broadcast, multicast and subnet-router anycast addresses.
func (k *kernel) hostAddressRules(want State, inside []expr.Any) (rules []chainRule) {
	for _, p := range want.Addresses {
		rules = append(rules, chainRule{
			fmt.Sprintf("%v is reached through interface %d", p.Addr(), k.index),
			slices.Concat(inside, address(netip.PrefixFrom(p.Addr(), p.Addr().BitLen()), false),
				accept()),
		})
	}
	for _, kind := range []struct {
		name string
		kind uint32
	}{{"local", unix.RTN_LOCAL}, {"broadcast", unix.RTN_BROADCAST}, {"anycast", unix.RTN_ANYCAST},
		{"multicast", unix.RTN_MULTICAST}} {
		rules = append(rules, chainRule{
			fmt.Sprintf("other %s addresses of this host are not reached through interface %d",
				kind.name, k.index),
			slices.Concat(inside, destinationType(kind.kind), drop()),
		})
	}
	return rules
}

// newMarkChains returns the chains that save the mark of outer sockets in the
// connection and restore it for replies.
func newMarkChains(k *kernel) []chain {
	const lost = "strict reverse path filters may drop replies of the proxy"
	return []chain{{
		name: "save", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPostrouting, priority: priorityMarks,
		needs: needsMark, without: lost,
		rules: []chainRule{{
			fmt.Sprintf("bits %#x of the mark of outer sockets are saved for replies", k.Mark),
			slices.Concat(packetMarked(k.Mark, k.Mark), markConnection(k.Mark, k.Mark)),
		}},
	}, {
		name: "restore", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: priorityMarks,
		needs: needsMark, without: lost,
		rules: []chainRule{{
			fmt.Sprintf("bits %#x of the mark of outer sockets are restored in replies", k.Mark),
			slices.Concat(connectionMarked(k.Mark, k.Mark), markPacket(k.Mark, k.Mark)),
		}},
	}}
}

// newForwardChain returns the chain that limits forwarding from and to the
// tunnel, and keeps this host from forwarding other packets that it did not
// forward before.
func newForwardChain(s State, k *kernel) chain {
	forward := chain{
		name: "forward", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter,
		needs: needsState, without: "forwarding from and to the tunnel is not limited, and this host is a router for its neighbours",
	}
	in := meta(expr.MetaKeyIIF, expr.CmpOpEq, uint32(k.index))
	out := meta(expr.MetaKeyOIF, expr.CmpOpEq, uint32(k.index))
	notIn := meta(expr.MetaKeyIIF, expr.CmpOpNeq, uint32(k.index))
	notOut := meta(expr.MetaKeyOIF, expr.CmpOpNeq, uint32(k.index))
	add := func(comment string, exprs ...[]expr.Any) {
		forward.rules = append(forward.rules, chainRule{comment, slices.Concat(exprs...)})
	}
	for _, p := range s.Masquerade {
		add(fmt.Sprintf("invalid packets from %v leave through interface %d only", p, k.index),
			in, notOut, address(p, true), connectionState(expr.CtStateBitINVALID), drop())
	}
	if len(s.Masquerade) != 0 || k.Mark != 0 {
		add("packets of existing connections are accepted",
			connectionState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
		add("packets with a translated destination are accepted", dnat(), accept())
	}
	for _, p := range s.Masquerade {
		add(fmt.Sprintf("nobody begins a connection to %v except through interface %d", p,
			k.index),
			out, notIn, address(p, false), drop())
	}
	if k.Mark != 0 {
		for _, p := range sorted(s.Reach) {
			add(fmt.Sprintf("interface %d reaches %v", k.index, p), in, address(p, false),
				accept())
		}
		add(fmt.Sprintf("interface %d reaches nothing else", k.index), in, drop())
	}
	if s.Forward {
		forward.rules = append(forward.rules, k.neighbourRules(s)...)
	}
	return forward
}

// neighbourRules returns the rules that keep this host from becoming a router
// for its neighbours when forwarding is turned on. Packets neither from nor to
// a tunnel are dropped, as they were before.
func (k *kernel) neighbourRules(want State) (rules []chainRule) {
	add := func(comment string, exprs ...[]expr.Any) {
		rules = append(rules, chainRule{comment, slices.Concat(exprs...)})
	}
	for _, f := range []struct {
		sysctl, name string
		proto        byte
	}{{ipForward4, "IPv4", unix.NFPROTO_IPV4}, {ipForward6, "IPv6", unix.NFPROTO_IPV6}} {
		if !want.forwards(f.sysctl) {
			continue
		}
		before, off := k.beforeForwarding(f.sysctl)
		if !off {
			continue
		}
		family := metaByte(expr.MetaKeyNFPROTO, f.proto)
		if len(rules) == 0 {
			add("packets from tunnels, the interfaces of one group, are accepted",
				meta(expr.MetaKeyIIFGROUP, expr.CmpOpEq, tunnelGroup), accept())
			add("packets to tunnels are accepted",
				meta(expr.MetaKeyOIFGROUP, expr.CmpOpEq, tunnelGroup), accept())
		}
		for _, name := range before.forwarding() {
			add(fmt.Sprintf("%s of %s was forwarded before", f.name, name), family,
				metaName(expr.MetaKeyIIFNAME, expr.CmpOpEq, name), accept())
		}
		var from, to []expr.Any
		for _, name := range before.Links {
			from = append(from, metaName(expr.MetaKeyIIFNAME, expr.CmpOpNeq, name)...)
			to = append(to, metaName(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name)...)
		}
		add(fmt.Sprintf("%s from a virtual interface that is newer than %v", f.name,
			before.Links), family, from, metaName(iifKind, expr.CmpOpNeq, ""), accept())
		add(fmt.Sprintf("%s to a virtual interface that is newer than %v", f.name,
			before.Links), family, to, metaName(oifKind, expr.CmpOpNeq, ""), accept())
		add(f.name+" was not forwarded before", family, drop())
	}
	return rules
}

// Keys for the kind of an interface, such as "bridge". Interfaces without a
// kind, such as network cards, do not match.
const (
	iifKind expr.MetaKey = 26 // NFT_META_IIFKIND
	oifKind expr.MetaKey = 27
)

// newTranslationChains returns the chains that translate source addresses of
// the tunnel to this host's address, and drop untranslated packets.
func newTranslationChains(s State, k *kernel) []chain {
	low, high := k.translationPorts(s)
	translate := chain{name: "translate"}
	for _, protocol := range []struct {
		name   string
		number byte
	}{
		{"TCP", unix.IPPROTO_TCP}, {"UDP", unix.IPPROTO_UDP}, {"UDP-Lite", unix.IPPROTO_UDPLITE},
		{"SCTP", unix.IPPROTO_SCTP}, {"DCCP", unix.IPPROTO_DCCP},
	} {
		translate.rules = append(translate.rules, chainRule{
			fmt.Sprintf("%s is translated to ports %d to %d, on which this host does not listen",
				protocol.name, low, high),
			slices.Concat(metaByte(expr.MetaKeyL4PROTO, protocol.number), []expr.Any{
				&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(low)},
				&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(high)},
				&expr.Masq{ToPorts: true, RegProtoMin: 1, RegProtoMax: 2},
			}),
		})
	}
	translate.rules = append(translate.rules,
		chainRule{"protocols without ports", []expr.Any{&expr.Masq{}}})
	nat := chain{
		name: "nat", kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource,
	}
	leave := chain{
		name: "leave", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPostrouting, priority: priorityLeave,
	}
	for _, p := range s.Masquerade {
		leaves := slices.Concat(
			address(p, true), meta(expr.MetaKeyOIF, expr.CmpOpNeq, uint32(k.index)),
			meta(expr.MetaKeyOIF, expr.CmpOpNeq, loopback),
		)
		nat.rules = append(nat.rules, chainRule{
			fmt.Sprintf("%v is masqueraded except through interface %d", p, k.index),
			slices.Concat(leaves, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump,
				Chain: translate.name}}),
		})
		leave.rules = append(leave.rules, chainRule{
			fmt.Sprintf("%v does not leave untranslated except through interface %d", p, k.index),
			append(leaves, drop()...),
		})
	}
	return []chain{translate, nat, leave}
}

// arpIn is the hook of incoming ARP packets, NF_ARP_IN.
const arpIn = 0

// newARPChain returns the chain that drops ARP requests for the tunnel's
// addresses. The kernel would answer them on every network, which it does not
// for IPv6. Requests for an address that another interface has too are
// answered.
func newARPChain(s State, k *kernel) chain {
	arp := chain{
		name: "arp", family: nftables.TableFamilyARP, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookRef(arpIn), priority: nftables.ChainPriorityFilter,
		needs: needsARP, without: "hosts on other networks can find out the tunnel's address by ARP",
	}
	const (
		// Ethernet and IPv4, with addresses of 6 and 4 bytes (RFC 826).
		kind   = "\x00\x01\x08\x00\x06\x04"
		target = 24 // offset of the target protocol address
	)
	for _, p := range s.Addresses {
		if p.Addr().Is6() || k.onOtherInterface(p.Addr()) {
			continue
		}
		arp.rules = append(arp.rules, chainRule{
			fmt.Sprintf("%v is on no network with ARP", p.Addr()),
			slices.Concat([]expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader,
					Len: uint32(len(kind))},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(kind)},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: target,
					Len: 4},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
			}, drop()),
		})
	}
	return arp
}

// onOtherInterface reports whether another interface has the address.
func (k *kernel) onOtherInterface(a netip.Addr) bool {
	addrs, err := repeat(func() ([]netlink.Addr, error) {
		return k.nl.AddrList(nil, netlink.FAMILY_V4)
	})
	return err == nil && slices.ContainsFunc(addrs, func(have netlink.Addr) bool {
		return have.LinkIndex != k.index && prefixOf(have.IPNet).Addr() == a
	})
}
