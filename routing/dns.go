package routing

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	dnsPort    = 53
	dnsTLSPort = 853 // DNS over TLS and QUIC, RFC 7858 and RFC 9250
)

// newDNSChains returns the chains that refuse DNS queries outside the tunnel.
func newDNSChains(k *kernel) []chain {
	inside := []chainRule{
		{fmt.Sprintf("interface %d is the tunnel", k.index),
			append(meta(expr.MetaKeyOIF, expr.CmpOpEq, uint32(k.index)), accept()...)},
		{"loopback", append(meta(expr.MetaKeyOIF, expr.CmpOpEq, loopback), accept()...)},
	}
	own := chainRule{fmt.Sprintf("sockets with the bits %#x in their mark are accepted",
		k.Mark),
		append(packetMarked(k.Mark, k.Mark), accept()...)}
	var refuse []chainRule
	for _, p := range []struct {
		name     string
		protocol byte
	}{{"UDP", unix.IPPROTO_UDP}, {"TCP", unix.IPPROTO_TCP}} {
		for _, port := range []uint16{dnsPort, dnsTLSPort} {
			refuse = append(refuse, chainRule{
				fmt.Sprintf("queries to %s port %d do not leave outside the tunnel", p.name, port),
				slices.Concat(metaByte(expr.MetaKeyL4PROTO, p.protocol), []expr.Any{
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2,
						Len: 2},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1,
						Data: binaryutil.BigEndian.PutUint16(port)},
					&expr.Counter{},
					&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH,
						Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED},
				}),
			})
		}
	}
	return []chain{{
		name: "dns", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput,
		priority: nftables.ChainPriorityFilter,
		rules:    slices.Concat([]chainRule{own}, inside, refuse),
	}, {
		name: "dns-forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward,
		priority: nftables.ChainPriorityFilter,
		rules:    slices.Concat(inside, refuse),
	}}
}
