package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// notifications is a netlink socket that receives notifications of changes. The
// content of the messages is ignored; the reader compares the whole state.
type notifications struct {
	file *os.File
	done chan struct{}
}

// subscribe opens a socket for notifications of the groups, in the network
// namespace of the calling thread. A filter drops some of them; it may be nil.
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
	addr := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for _, g := range groups {
		addr.Groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, addr); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &notifications{file: os.NewFile(uintptr(fd), "netlink"), done: make(chan struct{})}, nil
}

// follow sends a value to changed after a burst of notifications, unless the
// channel is full: when no notification has come for settle, and at the latest
// maxSettle after the first one. It returns when the socket is closed.
func (n *notifications) follow(changed chan<- struct{}, settle, maxSettle time.Duration) {
	defer close(n.done)
	var message [1 << 14]byte
	for {
		_ = n.file.SetReadDeadline(time.Time{})
		if _, err := n.file.Read(message[:]); errors.Is(err, os.ErrClosed) {
			return
		} // otherwise there is a message, or the socket has lost some
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

// Groups of notifications.
var (
	ruleGroups  = []uint{unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE}
	routeGroups = []uint{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}
	linkGroups  = []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}
)

const (
	// Offsets in messages of rtnetlink.

	messageType    = 4                       // in struct nlmsghdr
	interfaceIndex = unix.SizeofNlMsghdr + 4 // in struct ifinfomsg and struct ifaddrmsg
	routeProtocol  = unix.SizeofNlMsghdr + 5 // in struct rtmsg

	nftablesGroup = 7 // NFNLGRP_NFTABLES

	// findAttribute is SKF_AD_OFF + SKF_AD_NLATTR. A load from this offset
	// finds the attribute whose type is in X, and returns its offset or 0. A is
	// the offset of the first attribute, which is routeAttributes for a route.
	findAttribute   = 1<<32 - 0x1000 + 12
	routeAttributes = unix.SizeofNlMsghdr + unix.SizeofRtMsg
	loadHalf        = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
	loadByte        = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
	loadWord        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpIfEqual     = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	verdict         = unix.BPF_RET | unix.BPF_K
	wholeMessage    = 1<<32 - 1 // bytes
)

// notificationFilter passes notifications of all rules, of the interface, of
// our deleted routes, and of new routes of other programs in the tables of the
// interface. The kernel drops all others, so that a host may change other
// routes thousands of times a second without cost for this process.
func notificationFilter(index int) []unix.SockFilter {
	// The filter loads fields in network byte order, but they are in the byte
	// order of the host.
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
		{Code: loadByte, K: routeProtocol}, // a new route: drop it if it is ours
		{Code: jumpIfEqual, K: protocol, Jt: 10, Jf: 2},
		{Code: loadByte, K: routeProtocol}, // a deleted route
		{Code: jumpIfEqual, K: protocol, Jt: 9},
		{Code: unix.BPF_LD | unix.BPF_IMM, K: routeAttributes},
		{Code: unix.BPF_LDX | unix.BPF_IMM, K: unix.RTA_TABLE},
		{Code: loadByte, K: findAttribute},
		{Code: jumpIfEqual, K: 0, Jt: 4}, // the attribute is missing
		{Code: unix.BPF_MISC | unix.BPF_TAX},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: unix.SizeofRtAttr},
		// any prefix length
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: word(^uint32(0xff))},
		{Code: jumpIfEqual, K: word(uint32(tableID(index, 0))), Jt: 1},
		{Code: verdict, K: 0},
		{Code: verdict, K: wholeMessage},
	}
}
