package routing

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Passage is a kind of packets that a firewall should let through.
type Passage struct {
	Hook    Hook
	In, Out string // names of interfaces, "" for any but the loopback
	Port    uint16 // UDP to this port, 0 for all protocols
	Reply   bool   // packets that answer, instead of those that begin a connection
	// Untracked packets have no connection: neither do they begin one.
	Untracked bool
}

// Hook is where in the kernel's path a packet is looked at.
type Hook string

// The hooks that a Passage can be about.
const (
	HookInput   Hook = "input"
	HookForward Hook = "forward"
	HookOutput  Hook = "output"
)

// Obstacle is a chain of nftables that does not let a Passage through, as far
// as its rules could be followed.
type Obstacle struct {
	Family string // ip, ip6 or inet
	Table  string
	Chain  string
	// Maybe says that some rule accepts packets on conditions that were not
	// followed, such as an address.
	Maybe bool
}

func (o Obstacle) String() string {
	return fmt.Sprintf("nftables table %s %s, chain %s", o.Family, o.Table, o.Chain)
}

// Obstacles looks for chains in nftables that drop packets of p. It follows
// policies, jumps, and conditions on interfaces, the family, the protocol, the
// port and the state of the connection; of other conditions it only knows that
// they may hold or not. Rules of iptables are seen where they are kept in
// nftables, as iptables-nft does. Errors: os.ErrPermission without
// CAP_NET_ADMIN. A kernel without nftables has no obstacles, and tables of ours
// are none.
func Obstacles(p Passage) ([]Obstacle, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	var found []Obstacle
	for _, family := range []struct {
		name   string
		family nftables.TableFamily
		proto  byte // protocol of the packets, 0 for both
	}{
		{"inet", nftables.TableFamilyINet, 0}, {"ip", nftables.TableFamilyIPv4, unix.NFPROTO_IPV4},
		{"ip6", nftables.TableFamilyIPv6, unix.NFPROTO_IPV6},
	} {
		chains, err := c.ListChainsOfTableFamily(family.family)
		if hasNoTables(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("routing: list nftables chains: %w", explain(err))
		}
		for _, base := range chains {
			if base.Type != nftables.ChainTypeFilter || base.Hooknum == nil ||
				*base.Hooknum != *p.Hook.number() ||
				strings.HasPrefix(base.Table.Name, tablePrefix) {
				continue
			}
			w := walk{conn: c, passage: p, proto: family.proto, chains: chains}
			switch o := (Obstacle{Family: family.name, Table: base.Table.Name,
				Chain: base.Name}); w.base(base) {
			case fateDropped:
				found = append(found, o)
			case fateUnknown:
				o.Maybe = true
				found = append(found, o)
			}
			if w.err != nil {
				return nil, fmt.Errorf("routing: list nftables rules: %w", explain(w.err))
			}
		}
	}
	return found, nil
}

func (h Hook) number() *nftables.ChainHook {
	switch h {
	case HookInput:
		return nftables.ChainHookInput
	case HookOutput:
		return nftables.ChainHookOutput
	}
	return nftables.ChainHookForward
}

// fate is what becomes of a packet.
type fate int

const (
	fateGoesOn  fate = iota // the next rule decides
	fatePasses              // the base chain
	fateDropped             // or rejected
	fateUnknown             // some rule may let it pass, and otherwise it is dropped
)

// maxJumps is how deep chains are followed; the kernel's limit is 16.
const maxJumps = 16

// walk follows a packet through the chains of a table.
type walk struct {
	conn    *nftables.Conn
	passage Passage
	proto   byte
	chains  []*nftables.Chain
	err     error
	maybe   bool // a rule on conditions that were not followed accepts
}

// base returns what becomes of the packet in a base chain.
func (w *walk) base(chain *nftables.Chain) fate {
	f := w.chain(chain, yes, 0)
	if f == fateGoesOn {
		f = fatePasses
		if chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop {
			f = fateDropped
		}
	}
	if f == fateDropped && w.maybe {
		return fateUnknown
	}
	return f
}

// chain follows the rules of a chain that the packet comes to for certain, or
// maybe. In the latter case it goes on.
func (w *walk) chain(chain *nftables.Chain, comes truth, depth int) fate {
	rules, err := w.conn.GetRules(chain.Table, chain)
	if err != nil {
		w.err = err
		return fateGoesOn
	}
	for _, r := range rules {
		matches, verdict := w.rule(r)
		if matches == no || verdict == nil {
			continue
		}
		if comes == maybe {
			matches = maybe
		}
		switch verdict.Kind {
		case expr.VerdictAccept:
			if matches == yes {
				return fatePasses
			}
			w.maybe = true
		case expr.VerdictDrop:
			if matches == yes {
				return fateDropped
			}
		case expr.VerdictReturn:
			if matches == yes {
				return fateGoesOn
			}
		case expr.VerdictJump, expr.VerdictGoto:
			i := slices.IndexFunc(w.chains, func(c *nftables.Chain) bool {
				return c.Table.Name == chain.Table.Name && c.Name == verdict.Chain
			})
			if i < 0 || depth == maxJumps {
				continue
			}
			f := w.chain(w.chains[i], matches, depth+1)
			if matches == yes && (f != fateGoesOn || verdict.Kind == expr.VerdictGoto) {
				return f
			}
		}
	}
	return fateGoesOn
}

// truth is whether a condition holds.
type truth int

const (
	yes truth = iota
	maybe
	no
)

// rule says whether the packet matches a rule, and what happens then; nil is
// nothing that matters.
func (w *walk) rule(r *nftables.Rule) (matches truth, verdict *expr.Verdict) {
	var regs [64]value // what is loaded; unknown again when it was looked at
	for _, e := range r.Exprs {
		holds := yes
		switch e := e.(type) {
		case *expr.Meta:
			if !e.SourceRegister {
				regs[e.Register%64] = w.meta(e.Key)
			}
		case *expr.Payload:
			regs[e.DestRegister%64] = w.payload(e)
		case *expr.Ct:
			if e.Key == expr.CtKeySTATE && !e.SourceRegister {
				regs[e.Register%64] = value{known: true, state: true,
					data: binary.NativeEndian.AppendUint32(nil, w.state())}
			} else {
				regs[e.Register%64] = value{}
			}
		case *expr.Bitwise:
			regs[e.DestRegister%64] = regs[e.SourceRegister%64].masked(e)
		case *expr.Cmp:
			holds = regs[e.Register%64].compare(e)
			if e.Op != expr.CmpOpGte { // the other end of a range follows
				regs[e.Register%64] = value{}
			}
		case *expr.Lookup:
			holds, verdict = w.lookup(r.Table, regs[e.SourceRegister%64], e)
			if holds == maybe && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
				w.maybe = true
			}
			regs[e.SourceRegister%64], regs[e.DestRegister%64] = value{}, value{}
		case *expr.Match:
			holds = w.xtables(e)
		case *expr.Target: // an iptables target; those that decide have names
			switch e.Name {
			case "REJECT":
				verdict = &expr.Verdict{Kind: expr.VerdictDrop}
			}
		case *expr.Verdict:
			verdict = e
		case *expr.Reject:
			verdict = &expr.Verdict{Kind: expr.VerdictDrop}
		case *expr.Counter, *expr.Log, *expr.Notrack:
		default:
			holds = maybe
			regs = [64]value{}
		}
		matches = max(matches, holds)
		if matches == no {
			return no, nil
		}
	}
	return matches, verdict
}

// value is what a rule loads of the packet.
type value struct {
	known bool
	data  []byte
	name  bool // an interface name: 16 bytes with zeros behind
	any   bool // an interface that could be any but the loopback
	state bool // a connection state: a bit
}

// state is that of the connection.
func (w *walk) state() uint32 {
	switch {
	case w.passage.Untracked:
		return expr.CtStateBitUNTRACKED
	case w.passage.Reply:
		return expr.CtStateBitESTABLISHED
	}
	return expr.CtStateBitNEW
}

func (w *walk) meta(key expr.MetaKey) value {
	name := func(name string) value {
		data := make([]byte, unix.IFNAMSIZ)
		copy(data, name)
		return value{known: true, name: true, any: name == "", data: data}
	}
	index := func(name string) value {
		i := 0 // which no interface has
		if iface, err := net.InterfaceByName(name); err == nil {
			i = iface.Index
		}
		return value{known: true, any: name == "",
			data: binary.NativeEndian.AppendUint32(nil, uint32(i))}
	}
	switch key {
	case expr.MetaKeyIIFNAME:
		return name(w.passage.In)
	case expr.MetaKeyOIFNAME:
		return name(w.passage.Out)
	case expr.MetaKeyIIF:
		return index(w.passage.In)
	case expr.MetaKeyOIF:
		return index(w.passage.Out)
	case expr.MetaKeyNFPROTO:
		if w.proto != 0 {
			return value{known: true, data: []byte{w.proto}}
		}
	case expr.MetaKeyL4PROTO:
		if w.passage.Port != 0 {
			return value{known: true, data: []byte{unix.IPPROTO_UDP}}
		}
	}
	return value{}
}

// payload knows the protocol in a header of IPv4, and the destination port.
func (w *walk) payload(e *expr.Payload) value {
	const protocolOffset, portOffset = 9, 2
	switch {
	case e.Base == expr.PayloadBaseNetworkHeader && w.proto == unix.NFPROTO_IPV4 &&
		e.Offset == protocolOffset && e.Len == 1 && w.passage.Port != 0:
		return value{known: true, data: []byte{unix.IPPROTO_UDP}}
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == portOffset && e.Len == 2 &&
		w.passage.Port != 0:
		return value{known: true, data: binary.BigEndian.AppendUint16(nil, w.passage.Port)}
	}
	return value{}
}

// masked is v & mask ^ xor.
func (v value) masked(e *expr.Bitwise) value {
	if !v.known || v.any || len(e.Mask) != len(v.data) || len(e.Xor) != len(v.data) {
		return value{}
	}
	out := value{known: true, state: v.state, data: make([]byte, len(v.data))}
	for i := range v.data {
		out.data[i] = v.data[i]&e.Mask[i] ^ e.Xor[i]
	}
	return out
}

func (v value) compare(e *expr.Cmp) truth {
	if !v.known {
		return maybe
	}
	if v.any { // a rule about the loopback is not about others; one about another may be
		loopback := bytes.HasPrefix(e.Data, []byte("lo\x00")) ||
			!v.name && bytes.Equal(e.Data, binary.NativeEndian.AppendUint32(nil, loopback))
		switch {
		case loopback && e.Op == expr.CmpOpEq:
			return no
		case loopback && e.Op == expr.CmpOpNeq:
			return yes
		}
		return maybe
	}
	data := v.data
	if len(e.Data) < len(data) && v.name { // such as "eth*"
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

// xtables knows the matches of iptables that look at the state of a connection
// and at ports.
func (w *walk) xtables(m *expr.Match) truth {
	switch info := m.Info.(type) {
	case *xt.ConntrackMtinfo1:
		return w.conntrack(info.ConntrackMtinfoBase, uint16(info.StateMask))
	case *xt.ConntrackMtinfo2:
		return w.conntrack(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.ConntrackMtinfo3:
		return w.conntrack(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.Udp:
		p := w.passage.Port
		switch {
		case p == 0 || info.InvFlags != 0 || info.SrcPorts != [2]uint16{0, 0xffff}:
			return maybe
		case p < info.DstPorts[0] || p > info.DstPorts[1]:
			return no
		}
		return yes
	case *xt.Tcp:
		if w.passage.Port != 0 {
			return no
		}
		return maybe
	case *xt.Comment:
		return yes
	}
	return maybe
}

// conntrack is about the state alone or not followed.
func (w *walk) conntrack(base xt.ConntrackMtinfoBase, mask uint16) truth {
	states := uint16(1 << 3) // XT_CONNTRACK_STATE_BIT(IP_CT_NEW)
	switch {
	case w.passage.Untracked:
		states = 1 << 6 // XT_CONNTRACK_STATE_UNTRACKED
	case w.passage.Reply:
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

// lookup looks for v in a set, or in a map of verdicts.
func (w *walk) lookup(table *nftables.Table, v value, e *expr.Lookup) (truth, *expr.Verdict) {
	if !v.known || v.any {
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
	// the last that does not come after v: in a set of intervals, where they
	// begin and end
	var in *nftables.SetElement
	for i, x := range elements {
		if len(x.Key) != len(v.data) || len(x.KeyEnd) > 0 {
			return maybe, nil
		}
		if bytes.Compare(x.Key, v.data) <= 0 {
			in = &elements[i]
		}
	}
	found := in != nil && !in.IntervalEnd && (set.Interval || bytes.Equal(in.Key, v.data))
	if found == e.Invert {
		return no, nil
	}
	if found && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
		return yes, parseVerdict(in.Val)
	}
	return yes, nil
}

// parseVerdict reads the attributes of a verdict in a map, which the library
// leaves as they are.
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

// Allow returns the command that lets p through o, where p goes through the
// interface called device if it is forwarded. It is in the words of who made
// the chain, where that shows.
func (o Obstacle) Allow(p Passage, device string) string {
	option, match, iptables := "--add-port="+fmt.Sprint(p.Port)+"/udp",
		fmt.Sprintf("udp dport %d", p.Port), fmt.Sprintf("-p udp --dport %d", p.Port)
	if p.Port == 0 {
		option, match, iptables = "--zone=trusted --add-interface="+device, "iifname "+device,
			"-i "+device
		if p.Out == device {
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

// PolicyRouting returns why the kernel has no policy routing, which tunnels of
// clients need, and nil if it has.
func PolicyRouting() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return explain(err)
	}
	defer h.Close()
	_, err = h.RuleList(unix.AF_INET)
	return explain(err)
}

// Uplink returns the name of the interface by which the kernel would send into
// the internet, beside all tunnels; "" where it has no route for the family.
func Uplink(ipv6 bool) string {
	to := netip.MustParseAddr("203.0.113.1") // for documentation, RFC 5737
	if ipv6 {
		to = netip.MustParseAddr("2001:db8::1") // RFC 3849
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ""
	}
	defer h.Close()
	routes, err := h.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: DefaultMark})
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := h.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}
