package routing

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// newOuterChain returns the chain that marks packets to outer sockets before
// the other chains see them. Another network may give this host the address
// that it has in the tunnel. Without the mark, the guard chain would drop
// replies of the proxy to that address.
func newOuterChain(k *kernel) chain {
	return chain{
		name: "outer", kind: nftables.ChainTypeFilter,
		hook:     nftables.ChainHookPrerouting,
		priority: nftables.ChainPriorityRef(*nftables.ChainPriorityRaw - 1),
		needs:    needsReply, without: "the tunnel is lost in networks that give this host the tunnel's address",
		rules: []chainRule{{
			fmt.Sprintf("packets for sockets with mark %#x get the mark", k.Mark),
			slices.Concat(meta(expr.MetaKeyIIF, expr.CmpOpNeq, uint32(k.index)),
				marked(&expr.Socket{Key: expr.SocketKeyMark, Register: 1}, k.Mark, k.Mark),
				markPacket(k.Mark, k.Mark)),
		}},
	}
}

// ndSolicitation is the ICMPv6 type of a neighbour solicitation (RFC 4861).
const ndSolicitation = 135

// guardExceptions returns the rules of the guard chain that accept packets to
// outer sockets, and neighbour discovery, which IPv6 needs to deliver them.
func guardExceptions(k *kernel) []chainRule {
	outside, pass := meta(expr.MetaKeyIIF, expr.CmpOpNeq, uint32(k.index)),
		&expr.Verdict{Kind: expr.VerdictAccept}
	return []chainRule{{
		fmt.Sprintf("packets for sockets with mark %#x are accepted", k.Mark),
		slices.Concat(outside, packetMarked(k.Mark, k.Mark), []expr.Any{pass}),
	}, {
		"neighbour discovery is accepted",
		slices.Concat(outside, icmp6(ndHopLimit, ndSolicitation, ndNeighbor), []expr.Any{pass}),
	}}
}
