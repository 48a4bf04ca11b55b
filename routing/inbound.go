package routing

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// newInboundChains returns the chains that send replies to a connection from
// outside the tunnel, to an address of this host, outside too.
//
// Connection tracking knows the direction of a connection, unless it is older
// than the tracking: then the first packet seen may be from either side. In
// that case, a TCP connection counts as incoming if the kernel does not choose
// its local port for connections of this host, and a connected UDP socket
// counts as outgoing.
func newInboundChains(s State, k *kernel) []chain {
	const lost = "connections from outside the tunnel are not answered if the tunnel has a route to their source"
	mask, outside := k.Mark, outsideMark(k.Mark)
	index := uint32(k.index)
	port := binaryutil.BigEndian.PutUint16(k.firstLocalPort)
	set := slices.Concat(markConnection(mask, outside), markPacket(mask, outside))
	known := slices.Concat(connectionMarked(mask, outside), markPacket(mask, outside))
	fresh := slices.Concat(connectionMarked(mask, 0), connection(expr.CtKeyDIRECTION, []byte{0}))
	fromTunnel := []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq,
			Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		&expr.Fib{Register: 1, FlagSADDR: true, ResultOIF: true},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: binaryutil.NativeEndian.PutUint32(index)},
	}
	inbound := chain{
		name: "inbound", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: priorityMarks,
		needs: needsReply, without: lost,
		rules: []chainRule{{
			fmt.Sprintf("packets from interface %d are not marked", k.index),
			append(meta(expr.MetaKeyIIF, expr.CmpOpEq, index), accept()...),
		}, {
			fmt.Sprintf("mark %#x/%#x of incoming connections is restored in their packets",
				outside, mask), known,
		}, {
			fmt.Sprintf("TCP ports from %d: connections of this host older than their tracking are not marked", k.firstLocalPort),
			slices.Concat(fresh, tcp(2, expr.CmpOpGte, port), accept()),
		}, {
			fmt.Sprintf("UDP ports from %d: packets for connected sockets are not marked",
				k.firstLocalPort),
			slices.Concat(fresh, metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP), []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2,
					Len: 2},
				&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: port},
				&expr.Socket{Key: expr.SocketKeyWildcard, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
			}, accept()),
		}, {
			fmt.Sprintf("connections from addresses behind interface %d are answered outside",
				k.index),
			slices.Concat(fresh, fromTunnel, set),
		}, {
			fmt.Sprintf("untracked packets from addresses behind interface %d get mark %#x/%#x",
				k.index, outside, mask),
			slices.Concat(connectionState(expr.CtStateBitUNTRACKED), fromTunnel,
				markPacket(mask, outside)),
		}},
	}
	reply := chain{
		name: "reply", kind: nftables.ChainTypeRoute,
		hook: nftables.ChainHookOutput, priority: priorityMarks,
		needs: needsReply, without: lost,
		rules: []chainRule{{
			fmt.Sprintf("mark %#x/%#x of incoming connections is restored in replies",
				outside, mask),
			slices.Concat(packetMarked(mask, 0), known),
		}},
	}
	for _, p := range s.Addresses {
		own := netip.PrefixFrom(p.Addr(), p.Addr().BitLen())
		reply.rules = append(reply.rules, chainRule{
			fmt.Sprintf("packets from the tunnel's own address %v are not marked", p.Addr()),
			slices.Concat(address(own, true), accept()),
		})
	}
	reply.rules = append(reply.rules, chainRule{
		fmt.Sprintf("TCP ports below %d: connections to this host older than their tracking, routed to interface %d, are answered outside", k.firstLocalPort, k.index),
		slices.Concat(meta(expr.MetaKeyOIF, expr.CmpOpEq, index), fresh, tcp(0, expr.CmpOpLt, port),
			sourceType(expr.CmpOpEq, unix.RTN_LOCAL), set),
	}, chainRule{
		fmt.Sprintf("untracked replies routed to interface %d get mark %#x/%#x",
			k.index, outside, mask),
		slices.Concat(meta(expr.MetaKeyOIF, expr.CmpOpEq, index),
			connectionState(expr.CtStateBitUNTRACKED),
			packetMarked(mask, 0),
			sourceType(expr.CmpOpEq, unix.RTN_LOCAL), markPacket(mask, outside)),
	})
	return []chain{inbound, reply}
}
