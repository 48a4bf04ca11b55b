package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Snapshot describes everything that a VPN may change in a host: links,
// addresses, routes of all tables, rules, nftables, kernel parameters, and
// /etc/resolv.conf with its backups. It omits counters and timers and sorts
// unordered lists, so that two snapshots of a restored host are equal.
func (h *Host) Snapshot() (string, error) {
	var text string
	var err error
	for range 10 { // retry lists that change during the dump
		text, err = h.takeSnapshot()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("lab: snapshot of %s: %w", h.name, err)
	}
	return text, nil
}

func (h *Host) takeSnapshot() (string, error) {
	var s snapshot
	err := h.Do(func() error {
		for _, f := range []func(*Host) error{s.links, s.routes, s.rules, s.nftables, s.sysctls, s.resolver} {
			if err := f(h); err != nil {
				return err
			}
		}
		return nil
	})
	return s.b.String(), err
}

// Diff compares two snapshots. Lines only in a begin with "- ", lines only in b
// with "+ ". Diff returns "" for equal snapshots.
func Diff(a, b string) string {
	if a == b {
		return ""
	}
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	var out strings.Builder
	only := func(mark string, lines, others []string) {
		count := make(map[string]int)
		for _, l := range others {
			count[l]++
		}
		for _, l := range lines {
			if count[l]--; count[l] < 0 {
				fmt.Fprintf(&out, "%s %s\n", mark, l)
			}
		}
	}
	only("-", as, bs)
	only("+", bs, as)
	if out.Len() == 0 {
		return "the order of lines differs\n"
	}
	return out.String()
}

type snapshot struct {
	b     strings.Builder
	names map[int]string // links by index
}

func (s *snapshot) section(name string, lines []string) {
	fmt.Fprintf(&s.b, "# %s\n", name)
	for _, l := range lines {
		s.b.WriteString(l)
		s.b.WriteByte('\n')
	}
}

func (s *snapshot) sorted(name string, lines []string) {
	slices.Sort(lines)
	s.section(name, lines)
}

func (s *snapshot) links(h *Host) error {
	links, err := h.nl.LinkList()
	if err != nil {
		return fmt.Errorf("links: %w", err)
	}
	s.names = make(map[int]string)
	for _, l := range links {
		s.names[l.Attrs().Index] = l.Attrs().Name
	}
	var lines, addrs []string
	for _, l := range links {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("%d: %s type %s flags %#x mtu %d state %s master %q mac %s txqlen %d alias %q",
			a.Index, a.Name, l.Type(), a.RawFlags, a.MTU, a.OperState, s.names[a.MasterIndex],
			a.HardwareAddr, a.TxQLen, a.Alias))
		list, err := h.nl.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("addresses of %s: %w", a.Name, err)
		}
		for _, addr := range list {
			addrs = append(addrs, fmt.Sprintf("%s %s peer %v broadcast %v scope %d flags %#x",
				a.Name, addr.IPNet, addr.Peer, addr.Broadcast, addr.Scope, addr.Flags))
		}
	}
	s.section("links", lines)
	s.sorted("addresses", addrs)
	return nil
}

func (s *snapshot) routes(h *Host) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC},
			netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("routes: %w", err)
		}
		lines := make([]string, 0, len(routes))
		for _, r := range routes {
			// Routes learned from neighbours and carriers come and go.
			flags := r.Flags &^ (unix.RTNH_F_LINKDOWN | unix.RTNH_F_DEAD | unix.RTM_F_CLONED)
			lines = append(lines, fmt.Sprintf("table %d type %d %v via %v %v dev %q src %v proto %d scope %d priority %d tos %d flags %#x mtu %d lock %t advmss %d encap %v nexthops %v",
				r.Table, r.Type, r.Dst, r.Gw, r.Via, s.names[r.LinkIndex], r.Src, r.Protocol,
				r.Scope, r.Priority, r.Tos, flags, r.MTU, r.MTULock, r.AdvMSS, r.Encap,
				r.MultiPath))
		}
		s.sorted("routes "+familyName(family), lines)
	}
	return nil
}

func (s *snapshot) rules(h *Host) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := h.nl.RuleList(family)
		if err != nil {
			return fmt.Errorf("rules: %w", err)
		}
		lines := make([]string, 0, len(rules))
		for _, r := range rules {
			mask := "none"
			if r.Mask != nil {
				mask = fmt.Sprintf("%#x", *r.Mask)
			}
			lines = append(lines, fmt.Sprintf("%d: not %t from %v to %v iif %q oif %q mark %#x/%s tos %d ipproto %d sport %v dport %v uid %v table %d goto %d suppress %d/%d type %d proto %d",
				r.Priority, r.Invert, r.Src, r.Dst, r.IifName, r.OifName, r.Mark, mask, r.Tos,
				r.IPProto, r.Sport, r.Dport, r.UIDRange, r.Table, r.Goto, r.SuppressPrefixlen,
				r.SuppressIfgroup, r.Type, r.Protocol))
		}
		s.section("rules "+familyName(family), lines)
	}
	return nil
}

func familyName(family int) string {
	if family == netlink.FAMILY_V4 {
		return "IPv4"
	}
	return "IPv6"
}

// sysctls are the parameters that snapshots compare, as globs below
// /proc/sys/net.
var sysctls = []string{
	"ipv4/ip_forward",
	"ipv4/conf/*/forwarding",
	"ipv4/conf/*/rp_filter",
	"ipv4/conf/*/src_valid_mark",
	"ipv4/conf/*/accept_local",
	"ipv4/conf/*/arp_ignore",
	"ipv4/conf/*/send_redirects",
	"ipv4/fwmark_reflect",
	"ipv4/tcp_fwmark_accept",
	"ipv6/conf/*/forwarding",
	"ipv6/conf/*/accept_ra",
	"ipv6/conf/*/disable_ipv6",
	"ipv6/conf/*/addr_gen_mode",
	"ipv6/fwmark_reflect",
}

func (s *snapshot) sysctls(*Host) error {
	const root = "/proc/sys/net/"
	var lines []string
	for _, pattern := range sysctls {
		files, err := filepath.Glob(root + pattern)
		if err != nil {
			return err
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			lines = append(lines, strings.TrimPrefix(f, root)+" = "+strings.TrimSpace(string(b)))
		}
	}
	s.sorted("kernel parameters", lines)
	return nil
}

// resolver adds /etc/resolv.conf and the files whose names begin so: mode, link
// target and content.
func (s *snapshot) resolver(*Host) error {
	const file = "/etc/resolv.conf"
	names, err := filepath.Glob(file + "*")
	if err != nil {
		return err
	}
	var lines []string
	for _, name := range names {
		info, err := os.Lstat(name)
		if err != nil {
			return err
		}
		to, _ := os.Readlink(name) // "" unless a link
		b, err := os.ReadFile(name)
		if err != nil && (to == "" || !errors.Is(err, os.ErrNotExist)) { // the link may dangle
			return err
		}
		lines = append(lines, fmt.Sprintf("%s %s %q", name, info.Mode(), to))
		for line := range strings.Lines(string(b)) {
			lines = append(lines, fmt.Sprintf("%s %q", name, line))
		}
	}
	s.section("resolver", lines)
	return nil
}
