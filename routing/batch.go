package routing

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// batch is a transaction of nf_tables. The transactions of the nftables library
// cannot limit masquerading to a range of ports: they lack the flag that makes
// the kernel use the range.
type batch struct {
	messages []netlink.Message
	err      error // first error of encoding an attribute
}

// add appends a message about an object of a family.
func (b *batch) add(kind uint8, flags netlink.HeaderFlags, family nftables.TableFamily,
	attrs []netlink.Attribute) {
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(kind)),
			Flags: netlink.Request | netlink.Acknowledge | flags,
		},
		Data: append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, b.marshal(attrs)...),
	})
}

func (b *batch) marshal(attrs []netlink.Attribute) []byte {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil && b.err == nil {
		b.err = err
	}
	return data
}

func text(kind uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(s), 0)}
}

func integer(kind uint16, n uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binaryutil.BigEndian.PutUint32(n)}
}

func (b *batch) nested(kind uint16, attrs ...netlink.Attribute) netlink.Attribute {
	return netlink.Attribute{Type: kind | unix.NLA_F_NESTED, Data: b.marshal(attrs)}
}

func (b *batch) addTable(name string, family nftables.TableFamily) {
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create, family,
		[]netlink.Attribute{text(unix.NFTA_TABLE_NAME, name)})
}

func (b *batch) deleteTable(name string, family nftables.TableFamily) {
	b.add(unix.NFT_MSG_DELTABLE, 0, family, []netlink.Attribute{text(unix.NFTA_TABLE_NAME, name)})
}

func (b *batch) addChain(table string, family nftables.TableFamily, c chain) {
	attrs := []netlink.Attribute{text(unix.NFTA_CHAIN_TABLE, table),
		text(unix.NFTA_CHAIN_NAME, c.name)}
	if c.hook != nil {
		attrs = append(attrs,
			b.nested(unix.NFTA_CHAIN_HOOK,
				integer(unix.NFTA_HOOK_HOOKNUM, uint32(*c.hook)),
				integer(unix.NFTA_HOOK_PRIORITY, uint32(*c.priority))),
			text(unix.NFTA_CHAIN_TYPE, string(c.kind)),
		)
	}
	if c.policy != nil {
		attrs = append(attrs, integer(unix.NFTA_CHAIN_POLICY, uint32(*c.policy)))
	}
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create, family, attrs)
}

func (b *batch) addRule(table string, family nftables.TableFamily, chainName string, r chainRule) {
	exprs := make([]netlink.Attribute, len(r.exprs))
	for i, e := range r.exprs {
		data, err := b.expression(family, e)
		if err != nil && b.err == nil {
			b.err = err
		}
		exprs[i] = netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data}
	}
	b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, family, []netlink.Attribute{
		text(unix.NFTA_RULE_TABLE, table), text(unix.NFTA_RULE_CHAIN, chainName),
		b.nested(unix.NFTA_RULE_EXPRESSIONS, exprs...),
		{Type: unix.NFTA_RULE_USERDATA, Data: r.userData()},
	})
}

func (b *batch) expression(family nftables.TableFamily, e expr.Any) ([]byte, error) {
	masq, ok := e.(*expr.Masq)
	if !ok || !masq.ToPorts {
		return expr.Marshal(byte(family), e)
	}
	const protoSpecified = 2 // NF_NAT_RANGE_PROTO_SPECIFIED
	return b.marshal([]netlink.Attribute{
		text(unix.NFTA_EXPR_NAME, "masq"),
		b.nested(unix.NFTA_EXPR_DATA,
			integer(unix.NFTA_MASQ_FLAGS, protoSpecified),
			integer(unix.NFTA_MASQ_REG_PROTO_MIN, masq.RegProtoMin),
			integer(unix.NFTA_MASQ_REG_PROTO_MAX, masq.RegProtoMax)),
	}), nil
}

// commit sends the batch to the kernel, which carries out all of it or nothing.
func (b *batch) commit() error {
	if b.err != nil || len(b.messages) == 0 {
		return b.err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := makeRoom(conn, b.messages); err != nil {
		return fmt.Errorf("buffer: %w", err)
	}
	edge := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data:   []byte{0, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	all := append([]netlink.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}, b.messages...)
	all = append(all, edge(unix.NFNL_MSG_BATCH_END))
	if _, err := conn.SendMessages(all); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	var errs []error
	for range b.messages { // the kernel acknowledges each message
		if _, err := conn.Receive(); err != nil {
			errs = append(errs, err)
			if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.ENOBUFS) {
				break // the kernel answers once for the whole batch
			}
		}
	}
	return errors.Join(errs...)
}

// Sizes of buffers of netlink sockets, in bytes. The kernel counts its
// allocations, which are larger than the messages.
const (
	defaultBuffer = 208 << 10 // default of Linux
	perAnswer     = 1 << 10
	perMessage    = 64
)

// makeRoom enlarges the buffers of conn for all messages and an answer to each.
// The kernel sends all answers before the first is read, and drops those that
// do not fit.
func makeRoom(conn *netlink.Conn, messages []netlink.Message) error {
	size := 0
	for _, m := range messages {
		size += len(m.Data) + perMessage
	}
	if size > defaultBuffer/2 {
		if err := conn.SetWriteBuffer(2 * size); err != nil {
			return err
		}
	}
	if answers := len(messages) * perAnswer; answers > defaultBuffer/2 {
		return conn.SetReadBuffer(2 * answers)
	}
	return nil
}
