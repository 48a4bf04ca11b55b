// Package routing configures the Linux kernel for a tunnel and restores it
// afterwards: the addresses and MTU of an interface, routes and policy rules,
// an nftables table, and the sysctls that these need.
//
// # Managing an interface
//
// A [Manager] configures one interface, which another package creates, such as
// a TUN device. It has three states:
//
//	state     entered by        the kernel
//	open      Open              as found
//	applied   Manager.Apply     as the State describes
//	closed    Manager.Close     as found
//
// [Open] undoes the changes of a dead process and makes no others.
// [Manager.Apply] takes the desired [State] as a whole, compares it with the
// kernel, and makes the changes: it adds objects first, then removes others.
// Objects that need no change are not touched. If Apply fails, it restores the
// previous State. [Manager.Close] restores the host as Open found it.
//
// Apply can be called again with another State at any time. In between, two
// methods keep the State in effect. [Manager.Maintain] restores the changes of
// other programs when the kernel notifies it, and sysctls within a second. It
// reports the [Health]. If another program undoes each repair, Maintain repairs
// less often and reports a problem. [Manager.FollowHost] adapts the State to
// changed networks of the host; a [Watcher] reports when to call it.
//
// All functions work in the network namespace of the calling thread, through
// netlink and /proc/sys. They need CAP_NET_ADMIN.
//
// # Objects of a Manager
//
// A Manager changes or creates only these objects:
//
//   - addresses, MTU, group, flags and address generation mode of its interface
//   - routes with protocol 94
//   - policy rules whose table or mark is a number with bit 30 set that holds
//     the index of the interface
//   - the nftables table "masque-INSTANCE", in the families inet and arp
//   - sysctls: forwarding and those that depend on it, src_valid_mark,
//     send_redirects, accept_local, and rp_filter of some interfaces
//
// It also deletes routes of other programs from its own tables. It never
// changes other nftables tables, routes in other tables, rules of other
// programs, or the host's addresses. A [KillSwitch] has a table of its own,
// "masquevpn-kill-INSTANCE", which stays until [KillSwitch.Lift] or a restart.
//
// # Crash recovery
//
// Routes, rules and the table are recognised by their numbers and names, so the
// next process finds them without records. Settings of the interface and
// sysctls cannot be marked, and the kernel does not keep their previous values.
// These are in the journal: a file that exists while a Manager is open, and
// lists the changes to undo. It is written before each of these changes. The
// next Open of the instance, or [Clean], undoes the listed changes. A journal
// of an earlier boot or of another network namespace is ignored.
//
// The journal is locked while its process lives, so that two processes cannot
// manage one instance. A sysctl that several instances need is restored by the
// last of them, if their journals are in one directory.
//
// # Client: policy routing
//
// With a Config.Mark, routes of the tunnel and of the host compete by longest
// prefix match, and the host wins a tie. The kernel makes this decision for
// each packet, so routes of the host may change at any time. For each prefix
// length L of State.Routes in a family there is a table T(L) with the routes of
// that length, and two kinds of rules, in descending order of L (W is 32 or
// 128):
//
//	9484+2(W-L):   to P fwmark T(L)/0 lookup main suppress_prefixlength max(L, 1)-1
//	9485+2(W-L):   not from all fwmark HIGH/HIGH lookup T(L)
//
// The first accepts any route of the host with at least L bits, but no default
// route. Its mark has mask 0 and matches every packet; it only holds the number
// of the table. The second sends the remaining packets into the tunnel, except
// packets with HIGH, the higher bit of the mark. Outer sockets ([MarkSocket])
// have both bits, so their packets never enter a tunnel. Priorities depend on L
// alone, so that the rules of several tunnels interleave in the right order.
//
// State.HostRoutes selects the prefixes P. With [HostPrivate] and a tunnel for
// most addresses of a family, P are the private and link-local networks, and a
// route of the host must lie within P: the operator of the host's network can
// hand out routes to public addresses (CVE-2024-3661) and can claim public
// addresses for the network itself (CVE-2023-36672). Multicast and limited
// broadcast packets use the host's default route, except with [HostNone].
//
// State.Exclude becomes "throw" routes, which end the lookup in the table: an
// excluded prefix is routed as if there were no tunnel. State.Unreachable
// becomes "unreachable" routes. So do IPv6 routes if
// net.ipv6.conf.*.disable_ipv6 turns IPv6 off on the interface. Throw and
// unreachable routes belong to no interface, so that after a crash they remain
// until the next Open or Clean.
//
// # Client: firewall
//
// The chains are listed in docs/firewall.md. They have these tasks:
//
//   - A reply to an outer socket must pass strict reverse path filters. The
//     mark is saved in the connection and restored for replies, and
//     src_valid_mark makes the filter use it. rp_filter becomes 2 on interfaces
//     whose network is routed into the tunnel.
//   - Packets for a tunnel address must come from the tunnel (CVE-2019-14899),
//     and packets from the tunnel must not have a source address of this host.
//   - A connection to this host from outside the tunnel is answered outside,
//     even if the tunnel has a route to the peer. Its packets get the bit HIGH.
//   - With State.HoldDNS, DNS queries do not leave outside the tunnel.
//   - A new connection from the tunnel is forwarded to State.Reach only.
//
// # Proxy: routes in the main table
//
// Without a mark, routes are in the main table with metric 9484, and each
// address has the on-link route of its prefix. State.Forward turns forwarding
// on and keeps this host from forwarding between its other interfaces.
// State.Masquerade translates addresses, to ports on which no server of this
// host listens (CVE-2021-3773).
//
// # Limits
//
// A State needs at most [MaxRoutes] routes. A blackhole, unreachable or
// prohibit route of any length in the host's main table takes precedence over
// the tunnel, because the kernel does not apply suppress_prefixlength to it. A
// rule of another program with a lower priority number takes precedence too;
// Maintain reports it as a problem. A kernel that lacks an optional nftables
// expression works without the chains that need it; the log names the
// consequence.
package routing
