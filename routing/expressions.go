package routing

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The functions of this file return parts of nftables rules: conditions, which
// end the rule if the packet does not match, and actions. All of them use
// register 1.

// meta compares a property of the packet, which stays in register 1.
func meta(key expr.MetaKey, op expr.CmpOp, value uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
	}
}

// metaByte compares a one-byte property of the packet.
func metaByte(key expr.MetaKey, value byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}}}
}

// metaName compares the name or the kind of an interface.
func metaName(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

// sourceType compares the type of the source address in the routing tables.
func sourceType(op expr.CmpOp, kind uint32) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Register: 1, Op: op, Data: binaryutil.NativeEndian.PutUint32(kind)},
	}
}

// destinationType matches packets by the type of the destination in the routing
// tables.
func destinationType(kind uint32) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: binaryutil.NativeEndian.PutUint32(kind)},
	}
}

// address matches packets with a source or destination in p.
func address(p netip.Prefix, source bool) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if isIPv6(p) {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16
	}
	if source {
		offset -= size
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset,
			Len: size},
	}
	if !p.IsSingleIP() {
		exprs = append(exprs, &expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: size,
			Mask: ipNet(p).Mask, Xor: make([]byte, size),
		})
	}
	return append(exprs, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()})
}

// udp matches UDP packets by a port. offset is 0 for the source port and 2 for
// the destination port.
func udp(offset uint32, port uint16) []expr.Any {
	return slices.Concat(metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset,
			Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	})
}

// udpPorts matches UDP packets of a family by both ports.
func udpPorts(family byte, from, to uint16) []expr.Any {
	return slices.Concat(metaByte(expr.MetaKeyNFPROTO, family),
		metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP),
		[]expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1,
				Data: slices.Concat(binaryutil.BigEndian.PutUint16(from),
					binaryutil.BigEndian.PutUint16(to))},
		})
}

// tcp matches TCP packets by a port, except the first packet of a connection.
// offset is 0 for the source port and 2 for the destination port.
func tcp(offset uint32, op expr.CmpOp, port []byte) []expr.Any {
	const flags, syn = 13, 2
	return slices.Concat(metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_TCP), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags,
			Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn},
			Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset,
			Len: 2},
		&expr.Cmp{Op: op, Register: 1, Data: port},
	})
}

// icmp6 matches ICMPv6 messages with a hop limit and a type from low to high.
func icmp6(hopLimit, low, high byte) []expr.Any {
	return slices.Concat(metaByte(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6),
		metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMPV6), []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{hopLimit}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1},
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{low}, ToData: []byte{high}},
		})
}

// connection compares a property of the connection of a packet.
func connection(key expr.CtKey, value []byte) []expr.Any {
	return []expr.Any{&expr.Ct{Register: 1, Key: key},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
}

// connectionState matches packets whose connection has one of the state bits.
func connectionState(bits uint32) []expr.Any { return ctBits(expr.CtKeySTATE, bits) }

// dnat matches packets of connections with a translated destination.
func dnat() []expr.Any {
	const ipsDstNAT = 1 << 5 // IPS_DST_NAT
	return ctBits(expr.CtKeySTATUS, ipsDstNAT)
}

// ctBits matches packets whose connection has one of the bits.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: key},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// marked matches packets or connections whose mark has value in the bits of
// mask.
func marked(load expr.Any, mask, value uint32) []expr.Any {
	return []expr.Any{
		load,
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
	}
}

// setBits sets the bits of mask to value, and does not change other bits.
func setBits(load, store expr.Any, mask, value uint32) []expr.Any {
	return []expr.Any{
		load,
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^mask),
			Xor:  binaryutil.NativeEndian.PutUint32(value),
		},
		store,
	}
}

// packetMarked matches packets by their mark, see marked.
func packetMarked(mask, value uint32) []expr.Any {
	return marked(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, mask, value)
}

// connectionMarked matches packets by the mark of their connection, see marked.
func connectionMarked(mask, value uint32) []expr.Any {
	return marked(&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, mask, value)
}

// markPacket changes the mark of the packet, see setBits.
func markPacket(mask, value uint32) []expr.Any {
	return setBits(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true}, mask, value)
}

// markConnection changes the mark of the connection, see setBits.
func markConnection(mask, value uint32) []expr.Any {
	return setBits(&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}, mask, value)
}

// accept ends the chain and accepts the packet.
func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

// drop counts and drops the packet.
func drop() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

// jump continues with another chain.
func jump(to chain) chainRule {
	return chainRule{"to chain " + to.name,
		[]expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to.name}}}
}
