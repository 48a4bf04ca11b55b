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
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// KillSwitch is a firewall that lets packets leave this host through one tunnel
// only. It is an nftables table, "masquevpn-kill-INSTANCE", which stays after
// the process ends, until Lift or a restart of the machine.
//
// The kill switch applies to packets that this host sends or forwards, not to
// packets that it receives. It refuses them with the ICMP code Administratively
// Prohibited, so that programs need not wait. It accepts packets
//
//   - into the tunnel and to the loopback interface
//   - of sockets with the mark (see MarkSocket)
//   - of DHCP, DHCPv6, neighbour discovery, and the multicast listener reports
//     that switches need for it
//   - to destinations in Allow
//
// Programs that write to an interface below IP, such as some DHCP clients, are
// not affected.
type KillSwitch struct {
	Instance string         // as in Config
	Mark     uint32         // mark of the outer sockets, not 0
	Allow    []netip.Prefix // destinations outside the tunnel
	Logger   *slog.Logger   // nil: nothing is logged

	mu       sync.Mutex    // guards the fields below
	want     []chain       // chains of the last Close, nil before the first
	verified []kernelChain // the table when it last matched want, nil if unknown
	backoff  backoff
	count    uint64 // number of repairs
}

// KillSwitchHealth is the state of a KillSwitch.
type KillSwitchHealth struct {
	Closed  bool
	Problem string // why it does not stay closed, and the remedy; empty: no problem
	Repairs uint64 // number of times that Maintain closed it again
}

func (k *KillSwitch) table() string { return "masquevpn-kill-" + k.Instance }

// Close closes the kill switch except for the interface with the name iface,
// which must exist. An empty name means no exception. If the kill switch is
// closed already, Close changes it in one transaction, so that it is never
// open. The error matches os.ErrPermission if CAP_NET_ADMIN is missing.
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

// write makes the table match k.want. It reports whether the table existed and
// whether it was changed. k.mu is held.
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

// Maintain closes the kill switch again, as the last Close did, when another
// program opens or changes it. It returns nil when ctx is done. It logs each
// repair, and calls report at the start and after each change of the
// KillSwitchHealth. If another program opens it each time, Maintain closes it
// at once a few times, and then four times a second.
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

// reconcile closes the kill switch if it is open and the repair is due. It
// returns the time of the next call, zero if none is needed before the next
// change.
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
			k.record(now, found, err)
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

// record records and logs an attempt to close the kill switch.
func (k *KillSwitch) record(now time.Time, found bool, err error) {
	k.backoff.maxDelay = leakDelay // packets leave meanwhile
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

// Closed reports whether the kill switch is closed, by any process.
func (k *KillSwitch) Closed() (bool, error) {
	_, found, err := readTable(k.table())
	if err != nil && !noNFTables(err) {
		return false, fmt.Errorf("routing: kill switch: %w", err)
	}
	return found, nil
}

// Lift removes the kill switch and reports whether it was closed.
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
	mldReport      = 131 // RFC 2710
	mldDone        = 132 // RFC 2710
	mld2Report     = 143 // RFC 3810
	ndRouter       = 133 // router solicitation, RFC 4861
	ndNeighbor     = 136 // neighbour advertisement, RFC 4861
	ndHopLimit     = 255
	mldHopLimit    = 1
	dhcpClientPort = 68
	dhcpServerPort = 67
	dhcp6Client    = 546
	dhcp6Server    = 547
)

// chains returns the chains of the table. The last one, after all other chains
// of the host, sees the interface through which a packet leaves. In the output
// hook a packet still has its old interface if another program has marked it to
// be rerouted.
func (k *KillSwitch) chains(index uint32) []chain {
	own := chain{name: "own", rules: []chainRule{
		{fmt.Sprintf("sockets with the bits %#x in their mark carry the tunnel", k.Mark),
			append(packetMarked(k.Mark, k.Mark), accept()...)},
		{"DHCP", slices.Concat(udpPorts(unix.NFPROTO_IPV4, dhcpClientPort, dhcpServerPort),
			accept())},
		{"DHCPv6", slices.Concat(udpPorts(unix.NFPROTO_IPV6, dhcp6Client, dhcp6Server), accept())},
		{"neighbour and router discovery",
			slices.Concat(icmp6(ndHopLimit, ndRouter, ndNeighbor), accept())},
		{"multicast listener reports, version 1",
			slices.Concat(icmp6(mldHopLimit, mldReport, mldDone), accept())},
		{"multicast listener reports, version 2",
			slices.Concat(icmp6(mldHopLimit, mld2Report, mld2Report), accept())},
	}}
	all := chain{name: "all", rules: []chainRule{
		{"loopback", append(meta(expr.MetaKeyOIF, expr.CmpOpEq, loopback), accept()...)},
	}}
	if index != 0 {
		all.rules = append(all.rules, chainRule{
			fmt.Sprintf("interface %d is the tunnel", index),
			append(meta(expr.MetaKeyOIF, expr.CmpOpEq, index), accept()...),
		})
	}
	for _, p := range sorted(k.Allow) {
		all.rules = append(all.rules,
			chainRule{fmt.Sprintf("%v is allowed", p), slices.Concat(address(p, false), accept())})
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
