package hostfirewall

import (
	"bytes"
	"encoding/binary"
	"net"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// loopback is the index of lo in every network namespace.
const loopback = 1

// value is the content of a register: a property of the packet. The zero value
// is unknown.
type value struct {
	known bool
	data  []byte

	// interfaceName means that data is an interface name, padded with zeros to
	// 16 bytes.
	interfaceName bool

	// anyInterface means that the value is the name or index of an interface
	// other than the loopback. data is not used.
	anyInterface bool
}

// state returns the state bit of the packet's connection.
func (w *walk) state() uint32 {
	switch {
	case w.flow.Untracked:
		return expr.CtStateBitUNTRACKED
	case w.flow.Reply:
		return expr.CtStateBitESTABLISHED
	}
	return expr.CtStateBitNEW
}

// meta returns a property that is not in the packet itself.
func (w *walk) meta(key expr.MetaKey) value {
	name := func(name string) value {
		data := make([]byte, unix.IFNAMSIZ)
		copy(data, name)
		return value{known: true, interfaceName: true, anyInterface: name == "", data: data}
	}
	index := func(name string) value {
		i := 0 // the index of no interface
		if iface, err := net.InterfaceByName(name); err == nil {
			i = iface.Index
		}
		return value{known: true, anyInterface: name == "",
			data: binary.NativeEndian.AppendUint32(nil, uint32(i))}
	}
	switch key {
	case expr.MetaKeyIIFNAME:
		return name(w.flow.In)
	case expr.MetaKeyOIFNAME:
		return name(w.flow.Out)
	case expr.MetaKeyIIF:
		return index(w.flow.In)
	case expr.MetaKeyOIF:
		return index(w.flow.Out)
	case expr.MetaKeyNFPROTO:
		if w.protocol != 0 {
			return value{known: true, data: []byte{w.protocol}}
		}
	case expr.MetaKeyL4PROTO:
		if w.flow.Port != 0 {
			return value{known: true, data: []byte{unix.IPPROTO_UDP}}
		}
	}
	return value{}
}

// payload returns a field of the packet's headers: the protocol of IPv4 and the
// destination port are known.
func (w *walk) payload(e *expr.Payload) value {
	const protocolOffset, portOffset = 9, 2
	switch {
	case e.Base == expr.PayloadBaseNetworkHeader && w.protocol == unix.NFPROTO_IPV4 &&
		e.Offset == protocolOffset && e.Len == 1 && w.flow.Port != 0:
		return value{known: true, data: []byte{unix.IPPROTO_UDP}}
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == portOffset && e.Len == 2 &&
		w.flow.Port != 0:
		return value{known: true, data: binary.BigEndian.AppendUint16(nil, w.flow.Port)}
	}
	return value{}
}

// masked returns v & mask ^ xor.
func (v value) masked(e *expr.Bitwise) value {
	if !v.known || v.anyInterface || len(e.Mask) != len(v.data) || len(e.Xor) != len(v.data) {
		return value{}
	}
	out := value{known: true, data: make([]byte, len(v.data))}
	for i := range v.data {
		out.data[i] = v.data[i]&e.Mask[i] ^ e.Xor[i]
	}
	return out
}

// compare evaluates a comparison of v with a constant.
func (v value) compare(e *expr.Cmp) truth {
	if !v.known {
		return maybe
	}
	if v.anyInterface {
		isLoopback := bytes.HasPrefix(e.Data, []byte("lo\x00")) ||
			!v.interfaceName && bytes.Equal(e.Data, binary.NativeEndian.AppendUint32(nil, loopback))
		switch {
		case isLoopback && e.Op == expr.CmpOpEq:
			return no
		case isLoopback && e.Op == expr.CmpOpNeq:
			return yes
		}
		return maybe
	}
	data := v.data
	if len(e.Data) < len(data) && v.interfaceName { // a wildcard such as "eth*"
		data = data[:len(e.Data)]
	}
	if len(data) != len(e.Data) {
		return maybe
	}
	order := bytes.Compare(data, e.Data)
	var holds bool
	switch e.Op {
	case expr.CmpOpEq:
		holds = order == 0
	case expr.CmpOpNeq:
		holds = order != 0
	case expr.CmpOpLt:
		holds = order < 0
	case expr.CmpOpLte:
		holds = order <= 0
	case expr.CmpOpGt:
		holds = order > 0
	case expr.CmpOpGte:
		holds = order >= 0
	default:
		return maybe
	}
	if holds {
		return yes
	}
	return no
}

// xtables evaluates a match of iptables. Matches of connection states, ports
// and comments are known.
func (w *walk) xtables(m *expr.Match) truth {
	switch info := m.Info.(type) {
	case *xt.ConntrackMtinfo1:
		return w.conntrack(info.ConntrackMtinfoBase, uint16(info.StateMask))
	case *xt.ConntrackMtinfo2:
		return w.conntrack(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.ConntrackMtinfo3:
		return w.conntrack(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.Udp:
		p := w.flow.Port
		switch {
		case p == 0 || info.InvFlags != 0 || info.SrcPorts != [2]uint16{0, 0xffff}:
			return maybe
		case p < info.DstPorts[0] || p > info.DstPorts[1]:
			return no
		}
		return yes
	case *xt.Tcp:
		if w.flow.Port != 0 {
			return no
		}
		return maybe
	case *xt.Comment:
		return yes
	}
	return maybe
}

// conntrack evaluates the conntrack match of iptables. The result is maybe
// unless the match looks at the state alone.
func (w *walk) conntrack(base xt.ConntrackMtinfoBase, mask uint16) truth {
	states := uint16(1 << 3) // XT_CONNTRACK_STATE_BIT(IP_CT_NEW)
	switch {
	case w.flow.Untracked:
		states = 1 << 6 // XT_CONNTRACK_STATE_UNTRACKED
	case w.flow.Reply:
		states = 1 << 1 // IP_CT_ESTABLISHED
	}
	switch {
	case xt.ConntrackFlags(base.MatchFlags)&^xt.ConntrackStateAlias != xt.ConntrackState ||
		base.InvertFlags != 0:
		return maybe
	case mask&states == 0:
		return no
	}
	return yes
}

// lookup looks for v in a set or a verdict map. It returns the verdict if v is
// in a map.
func (w *walk) lookup(table *nftables.Table, v value, e *expr.Lookup) (truth, *expr.Verdict) {
	if !v.known || v.anyInterface {
		return maybe, nil
	}
	set, err := w.conn.GetSetByName(table, e.SetName)
	if err != nil {
		w.err = err
		return maybe, nil
	}
	elements, err := w.conn.GetSetElements(set)
	if err != nil {
		w.err = err
		return maybe, nil
	}
	slices.SortStableFunc(elements, func(a, b nftables.SetElement) int {
		return bytes.Compare(a.Key, b.Key)
	})
	// last is the greatest element that is not greater than v. The elements of
	// a set of intervals are the starts and ends of the intervals.
	var last *nftables.SetElement
	for i, x := range elements {
		if len(x.Key) != len(v.data) || len(x.KeyEnd) > 0 {
			return maybe, nil
		}
		if bytes.Compare(x.Key, v.data) <= 0 {
			last = &elements[i]
		}
	}
	found := last != nil && !last.IntervalEnd && (set.Interval || bytes.Equal(last.Key, v.data))
	if found == e.Invert {
		return no, nil
	}
	if found && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
		return yes, parseVerdict(last.Val)
	}
	return yes, nil
}

// parseVerdict decodes the verdict of a map element, which the nftables library
// returns as raw attributes.
func parseVerdict(b []byte) *expr.Verdict {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil
	}
	v := &expr.Verdict{Kind: expr.VerdictContinue}
	for _, a := range attrs {
		switch {
		case a.Attr.Type == unix.NFTA_VERDICT_CODE && len(a.Value) == 4:
			v.Kind = expr.VerdictKind(int32(binary.BigEndian.Uint32(a.Value)))
		case a.Attr.Type == unix.NFTA_VERDICT_CHAIN:
			v.Chain = unix.ByteSliceToString(a.Value)
		}
	}
	return v
}
