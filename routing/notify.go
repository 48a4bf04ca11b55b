package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// notifications is a netlink socket on which the kernel tells of changes. What
// the messages say is not read: they are a reason to look.
type notifications struct {
	file *os.File
	done chan struct{}
}

// subscribe opens a socket for notifications of the groups, in the network
// namespace of the calling thread. Those that the filter refuses do not reach
// it; nil: all do.
func subscribe(protocol int, groups []uint, filter []unix.SockFilter) (*notifications, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK,
		protocol)
	if err != nil {
		return nil, err
	}
	if filter != nil {
		program := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			program); err != nil {
			_ = unix.Close(fd)
			return nil, fmt.Errorf("filter notifications: %w", err)
		}
	}
	address := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for _, g := range groups {
		address.Groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, address); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &notifications{file: os.NewFile(uintptr(fd), "netlink"), done: make(chan struct{})}, nil
}

// follow puts a value into changed, unless there is one, after notifications:
// when none has come for settle, and at the latest maxSettle after the first.
// It returns when the socket is closed.
func (n *notifications) follow(changed chan<- struct{}, settle, maxSettle time.Duration) {
	defer close(n.done)
	var message [1 << 14]byte
	for {
		_ = n.file.SetReadDeadline(time.Time{})
		if _, err := n.file.Read(message[:]); errors.Is(err, os.ErrClosed) {
			return
		} // else there was a message, or there were more than the socket had room for
		for end := time.Now().Add(maxSettle); time.Now().Before(end); {
			_ = n.file.SetReadDeadline(time.Now().Add(settle))
			_, err := n.file.Read(message[:])
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}

// close ends follow and waits for it.
func (n *notifications) close() error {
	err := n.file.Close()
	<-n.done
	return err
}

// The groups of notifications, and where a message of rtnetlink has what the
// filter looks at.
var (
	ruleGroups  = []uint{unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE}
	routeGroups = []uint{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}
	linkGroups  = []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}
)

const (
	messageType    = 4                       // offset in struct nlmsghdr
	interfaceIndex = unix.SizeofNlMsghdr + 4 // offset in struct ifinfomsg and struct ifaddrmsg
	routeProtocol  = unix.SizeofNlMsghdr + 5 // offset in struct rtmsg
	nftablesGroup  = 7                       // NFNLGRP_NFTABLES

	// findAttribute is SKF_AD_OFF + SKF_AD_NLATTR: in place of a byte of the
	// message, it loads the offset of the attribute of the type in X, 0 for
	// none. Attributes begin at the offset in A, for a route at
	// routeAttributes.
	findAttribute   = 1<<32 - 0x1000 + 12
	routeAttributes = unix.SizeofNlMsghdr + unix.SizeofRtMsg
	loadHalf        = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
	loadByte        = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
	loadWord        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpIfEqual     = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	verdict         = unix.BPF_RET | unix.BPF_K
	whole           = 1<<32 - 1 // bytes of the message
)

// notificationFilter lets the kernel send notifications of all rules, of deleted routes
// of ours, of other programs' in the tables of one interface, and of that
// interface: a host that changes other routes thousands of times a second then
// costs us nothing.
func notificationFilter(index int) []unix.SockFilter {
	// The filter loads in network byte order what is in that of the host.
	kind := func(k uint16) uint32 {
		return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, k)))
	}
	word := func(v uint32) uint32 {
		return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, v))
	}
	own := word(uint32(index))
	return []unix.SockFilter{
		{Code: loadHalf, K: messageType},
		{Code: jumpIfEqual, K: kind(unix.RTM_NEWRULE), Jt: 18},
		{Code: jumpIfEqual, K: kind(unix.RTM_DELRULE), Jt: 17},
		{Code: jumpIfEqual, K: kind(unix.RTM_NEWROUTE), Jt: 3},
		{Code: jumpIfEqual, K: kind(unix.RTM_DELROUTE), Jt: 4},
		{Code: loadWord, K: interfaceIndex},
		{Code: jumpIfEqual, K: own, Jt: 13, Jf: 12},
		{Code: loadByte, K: routeProtocol}, // a new route: ours are no news
		{Code: jumpIfEqual, K: protocol, Jt: 10, Jf: 2},
		{Code: loadByte, K: routeProtocol}, // a deleted one
		{Code: jumpIfEqual, K: protocol, Jt: 9},
		{Code: unix.BPF_LD | unix.BPF_IMM, K: routeAttributes},
		{Code: unix.BPF_LDX | unix.BPF_IMM, K: unix.RTA_TABLE},
		{Code: loadByte, K: findAttribute},
		{Code: jumpIfEqual, K: 0, Jt: 4}, // there is none
		{Code: unix.BPF_MISC | unix.BPF_TAX},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: unix.SizeofRtAttr},
		// whatever the prefix length
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: word(^uint32(0xff))},
		{Code: jumpIfEqual, K: word(uint32(tableID(index, 0))), Jt: 1},
		{Code: verdict, K: 0},
		{Code: verdict, K: whole},
	}
}
