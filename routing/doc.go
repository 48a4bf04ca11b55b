// Package routing puts a tunnel into the Linux kernel and takes it out again:
// addresses and MTU of the interface, routes and policy rules, forwarding, NAT
// and the few sysctls that go with them.
//
// A [Manager] looks after one interface. It is told the state that is wanted,
// as a whole, with [Manager.Apply]; it looks at what the kernel has, and makes
// the difference. What stays is not touched, what is new comes before what is
// old goes, and when something fails the state before is put back.
// [Manager.Close] leaves the host as [Open] found it. What a killed process
// left behind is removed by the next [Open] of the same instance.
//
// Everything goes through netlink (rtnetlink and nf_tables) and /proc/sys, in
// the network namespace of the calling thread.
//
// # Client: routes into a tunnel
//
// With a Config.Mark, routes of the tunnel compete with those of the host by
// longest prefix match, and the kernel alone decides, so that nothing has to be
// followed when the host's own routes change. For every prefix length L among
// the tunnel's routes of a family there is a table T(L) with the routes of that
// length, and rules, L descending:
//
//	9484+2(W-L):   to P fwmark T(L)/0 lookup main suppress_prefixlength max(L, 1)-1
//	9485+2(W-L):   not from all fwmark HIGH/HIGH lookup T(L)
//
// where W is 32 or 128. The first lets any route of the host win that is at
// least as long as L (longer than 0 where L is 0: the tunnel's default route
// beats the host's). The second sends what is left into the tunnel, except
// packets of our own outer socket, which carry MARK and so never enter the
// tunnel, whatever its routes cover. The host's LAN keeps working, and a tie
// goes to the host.
//
// State.HostRoutes says to which prefixes P there is such a first rule. With
// HostAll these are the routes of length L themselves, or everything if they
// are many. With HostPrivate, and a tunnel for most addresses of the family,
// they are the private and link-local networks alone, and a route of the host
// counts only if it lies within P: whoever runs the host's network can hand out
// routes to public addresses, and to everything in two halves (CVE-2024-3661),
// and can claim that the network itself has such addresses (CVE-2023-36672).
// With HostNone there are none. But with that, multicast and limited broadcasts
// have rules that let the host's default route count too: they are for the
// link.
//
// A network of the host that is in the tunnel is at odds with strict reverse
// path filters of IPv4, which then drop ARP requests of the gateway too. Their
// interfaces get loose ones (rp_filter 2).
//
// HIGH is the higher of the two bits of MARK. It alone is for connections that
// came in from outside the tunnel, from where its routes lead to: they are
// marked as they come in, and a chain in the output hook gives the mark to
// their answers, which the kernel then routes again.
//
// As priorities depend on L alone, the rules of several tunnels interleave in
// the right order. A table's number holds the index of the interface and L. The
// mask of 0 makes the fwmark of the first rule match every packet: it is there
// to say whose rule it is. Routes carry protocol 94, and rules that of the
// kernel, because systemd-networkd deletes those of others. So whatever is ours
// is recognised without other records, and so is what belongs to an interface
// that is gone.
//
// One limit: a route of the host's main table that is an error (blackhole,
// unreachable, prohibit), and matches where the host's are asked, wins over
// shorter and longer ones of the tunnel, as the kernel does not apply
// suppress_prefixlength to it.
//
// What is excluded goes around the tunnel as if there were no tunnel: routes
// that an excluded prefix covers are left out, and excluded prefixes inside a
// route are "throw" routes in its table, which send the lookup on to the next
// rule. This costs nothing per packet however many there are; and where the
// host has no route to it either, an excluded prefix is unreachable, while a
// rule "to PREFIX lookup main" would let it fall back into the tunnel.
//
// Where the interface cannot have IPv6, because of
// net.ipv6.conf.*.disable_ipv6, its routes are "unreachable" routes in the same
// tables, with a metric behind those into the tunnel. They are not of the
// interface: after a crash they stay, as throw routes do, until the next start
// or [Clean].
//
// Queries for names outside the tunnel, such as to the router of the LAN, are
// refused by chains in the same nftables table, with State.HoldDNS.
//
// # Strict reverse path filtering
//
// A reply to the outer socket comes in through the uplink, while the way back
// to its source leads, for a packet without mark, into the tunnel: with
// rp_filter 1 the kernel drops it. So the mark is saved in the connection when
// a packet leaves and restored when a reply or an ICMP error comes in, and
// net.ipv4.conf.all.src_valid_mark makes the filter look at it. The same
// nftables table drops packets to a tunnel address that come in through another
// interface (CVE-2019-14899), and packets out of the tunnel that claim to come
// from another address of this host. Packets for the outer socket, which the
// first chain finds by the mark of their socket, pass: another network may give
// this host the address that it has in the tunnel. Kernels without the
// expressions needed do without, with a line in the log.
//
// # Proxy: an ordinary interface
//
// Without a mark, routes go into the main table, with metric 9484, and
// addresses bring the on-link route of their prefix along.
//
// # Other programs
//
// [Manager.Maintain] puts back what other programs change, and [KillSwitch.Maintain]
// closes a kill switch again. Both hear from the kernel when there may be
// something to do, compare as Apply does, and report a health: what is not in
// effect, and how much was put back so far. When the interface itself is gone,
// Maintain ends with [ErrInterfaceGone].
//
// # Ownership and crashes
//
// Addresses, MTU and flags of the interface cannot be marked, and sysctls do
// not say what they were: these are in the journal, a file that exists while an
// instance runs and tells the next one what to put back. It counts only within
// the same boot and network namespace. Sysctls that several instances need (all
// with their journals in one directory) are put back by the last of them.
package routing
