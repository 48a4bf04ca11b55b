package routing

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

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
// in Allow. It holds for packets of the host and for those that it forwards.
// What does not pass is refused with Administratively Prohibited, so that
// programs need not wait. Packets that reach this host are none of its
// business.
//
// Programs that write to an interface below IP, as some DHCP clients do, are
// not held.
type KillSwitch struct {
	Instance string         // as of Config
	Mark     uint32         // mark of the sockets that carry the tunnel, not 0
	Allow    []netip.Prefix // destinations outside the tunnel
	Logger   *slog.Logger   // nil: nothing is logged

	mu       sync.Mutex
	want     []chain       // chains of the last Close, nil before the first
	verified []kernelChain // the table when it was as it shall be; nil: not known
	backoff  backoff
	count    uint64 // number of repairs
}

// KillSwitchHealth says whether a KillSwitch holds.
type KillSwitchHealth struct {
	Closed  bool
	Problem string // what keeps it from lasting and what to do, "" when nothing does
	Repairs uint64 // how often another program opened it and Maintain closed it again
}

func (k *KillSwitch) table() string { return "masquevpn-kill-" + k.Instance }

// Close closes the kill switch but for the interface of that name, which must
// exist; "" for none. One that is closed already is changed in one step: there
// is no moment without it. If it is as it shall be, nothing is changed. Errors:
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
	k.mu.Lock()
	defer k.mu.Unlock()
	k.want = k.chains(uint32(index))
	found, changed, err := k.write()
	if err == nil && changed {
		k.logger().Info("kill switch closed", "table", k.table(), "interface", iface, "allow",
			k.Allow, "was_closed", found)
	}
	return err
}

// write makes the table what the last Close wanted. It says whether there was
// one, and whether it had to be changed. k.mu is held.
func (k *KillSwitch) write() (found, changed bool, err error) {
	have, found, err := readTable(k.table())
	if err != nil {
		return found, false, fmt.Errorf("routing: kill switch: %w", err)
	}
	if found && sameTable(k.want, have) && sameContents(have, k.verified) {
		k.verified = have
		return found, false, nil
	}
	k.verified = nil
	if err := commitTable(k.table(), found, k.want); err != nil {
		return found, false, fmt.Errorf("routing: kill switch: write nftables table inet %s: %w",
			k.table(), explain(err))
	}
	return found, true, nil
}

// Maintain closes the kill switch again when another program opens or changes it,
// as the last Close had it, until ctx ends. It logs that, and calls report at
// the start and after every change of the KillSwitchHealth. What is opened
// again and again is closed at once a few times, and then four times a second.
func (k *KillSwitch) Maintain(ctx context.Context, report func(KillSwitchHealth)) error {
	changed := make(chan struct{}, 1)
	tables, err := subscribe(unix.NETLINK_NETFILTER, []uint{nftablesGroup}, nil)
	if err != nil {
		return fmt.Errorf("routing: kill switch: notifications of changes: %w", explain(err))
	}
	go tables.follow(changed, 0, maxSettleDelay)
	defer tables.close()
	var last *KillSwitchHealth
	return reconcileLoop(ctx, changed, func(ticked bool) (again time.Duration, err error) {
		if ticked {
			return 0, nil
		}
		now := time.Now()
		h, next := k.reconcile(now)
		if last == nil || h != *last {
			report(h)
			last = &h
		}
		if !next.IsZero() {
			again = max(next.Sub(now), time.Millisecond)
		}
		return again, nil
	})
}

// look closes the kill switch if it is open and if that is due. It returns when
// to look again, zero for when something changes.
func (k *KillSwitch) reconcile(now time.Time) (h KillSwitchHealth, again time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.want == nil {
		return h, again
	}
	if due := k.backoff.due(now); due.After(now) {
		have, found, err := readTable(k.table())
		h.Closed = err == nil && found && sameTable(k.want, have) && sameContents(have, k.verified)
		again = due
	} else {
		found, changed, err := k.write()
		h.Closed = err == nil
		if changed || err != nil {
			k.note(now, found, err)
		} else {
			k.backoff.resolved()
		}
		if err != nil {
			again = k.backoff.due(now)
		}
	}
	h.Problem, h.Repairs = k.backoff.problem(now), k.count
	if until := k.backoff.clearsAt(now); again.IsZero() {
		again = until
	}
	return h, again
}

// note takes note of an attempt to close the kill switch, which was found open
// or changed.
func (k *KillSwitch) note(now time.Time, found bool, err error) {
	k.backoff.maxDelay = leakDelay // what leaves meanwhile cannot be taken back
	before := k.backoff.problem(now)
	k.backoff.record(now, "close the kill switch", err)
	logger := k.logger().With("table", k.table())
	switch problem := k.backoff.problem(now); {
	case err != nil:
		if problem != before {
			logger.Error("another program opened the kill switch, and it cannot be closed",
				"error", err)
		}
		return
	case problem == "":
		logger.Warn("another program opened the kill switch: closed again", "was_closed", found)
	case before == "":
		logger.Error("another program opens the kill switch again and again: stop it", "retry_in",
			k.backoff.delay().String())
	}
	k.count++
}

func (k *KillSwitch) logger() *slog.Logger {
	if k.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return k.Logger
}

// Closed says whether the kill switch is closed, by this process or another.
func (k *KillSwitch) Closed() (bool, error) {
	_, found, err := readTable(k.table())
	if err != nil && !noNFTables(err) {
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
		return true, fmt.Errorf("routing: kill switch: delete nftables table inet %s: %w",
			k.table(), explain(err))
	}
	k.logger().Info("kill switch lifted", "table", k.table())
	return true, nil
}

const (
	mldReport      = 131 // first type of a range that ends with mldDone, RFC 2710
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
// host, sees where packets really go: a packet that another program's mark
// turns around within the output hook keeps its old interface there.
func (k *KillSwitch) chains(index uint32) []chain {
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	own := chain{name: "own", rules: []chainRule{
		{fmt.Sprintf("sockets with the bits %#x in their mark carry the tunnel", k.Mark),
			append(packetMarked(k.Mark, k.Mark), accept...)},
		{"DHCP", slices.Concat(ports(unix.NFPROTO_IPV4, dhcpClientPort, dhcpServerPort), accept)},
		{"DHCPv6", slices.Concat(ports(unix.NFPROTO_IPV6, dhcp6Client, dhcp6Server), accept)},
		{"neighbour and router discovery",
			slices.Concat(icmp6(ndHopLimit, ndRouter, ndNeighbor), accept)},
		{"multicast listener reports, for switches that look at them",
			slices.Concat(icmp6(mldHopLimit, mldReport, mldDone), accept)},
		{"multicast listener reports, version 2",
			slices.Concat(icmp6(mldHopLimit, mld2Report, mld2Report), accept)},
	}}
	all := chain{name: "all", rules: []chainRule{
		{"loopback", append(meta(expr.MetaKeyOIF, expr.CmpOpEq, loopback), accept...)},
	}}
	if index != 0 {
		all.rules = append(all.rules, chainRule{
			fmt.Sprintf("interface %d is the tunnel", index),
			append(meta(expr.MetaKeyOIF, expr.CmpOpEq, index), accept...),
		})
	}
	for _, p := range sorted(k.Allow) {
		all.rules = append(all.rules,
			chainRule{fmt.Sprintf("%v is allowed", p), slices.Concat(address(p, false), accept)})
	}
	refuse := chainRule{"everything else is refused", []expr.Any{
		&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH,
			Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED},
	}}
	closed := nftables.ChainPolicyDrop
	return []chain{own, all, {
		name: "output", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityFilter, policy: &closed,
		rules: []chainRule{jump(own), jump(all), refuse},
	}, {
		name: "forward", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, policy: &closed,
		rules: []chainRule{jump(all), refuse},
	}, {
		name: "leave", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityLast, policy: &closed,
		rules: []chainRule{jump(own), jump(all), {"everything else is dropped", drop()}},
	}}
}

func jump(to chain) chainRule {
	return chainRule{"to chain " + to.name,
		[]expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to.name}}}
}

// is compares a property of the packet that is one byte.
func metaByte(key expr.MetaKey, value byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}}}
}

// ports matches UDP packets of a family by both ports.
func ports(family byte, from, to uint16) []expr.Any {
	return slices.Concat(metaByte(expr.MetaKeyNFPROTO, family), metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP),
		[]expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1,
				Data: slices.Concat(binaryutil.BigEndian.PutUint16(from),
					binaryutil.BigEndian.PutUint16(to))},
		})
}

// icmp6 matches ICMPv6 messages of the types from low to high with a hop limit.
func icmp6(hopLimit, low, high byte) []expr.Any {
	return slices.Concat(metaByte(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6),
		metaByte(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMPV6), []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{hopLimit}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1},
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{low}, ToData: []byte{high}},
		})
}
