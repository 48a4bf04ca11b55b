package doctor

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// NFTables checks that this process can use nftables. feature is the feature
// that needs it. lost describes how the feature works without; empty: it does
// not.
func (c *Report) NFTables(feature, lost string) {
	const remedy = "sudo modprobe nf_tables, or run this with sudo"
	switch err := probeNFTables(); {
	case err == nil:
		c.OK("%s: nftables answers", feature)
	case lost == "":
		c.Fail(fmt.Sprintf("%s: nftables cannot be used (%v)", feature, err), remedy)
	default:
		c.Warn(fmt.Sprintf("%s: nftables cannot be used (%v), and %s", feature, err, lost), remedy)
	}
}

// probeNFTables requests the generation ID of nftables, which changes nothing.
// The kernel loads the module if it has one.
func probeNFTables() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO,
		&unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	// A struct nlmsghdr and a struct nfgenmsg of zeros, in the host's byte
	// order.
	request := make([]byte, unix.NLMSG_HDRLEN+4)
	binary.NativeEndian.PutUint32(request, uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST)
	if err := unix.Sendto(fd, request, 0,
		&unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 {
		return fmt.Errorf("an answer of %d bytes", n)
	}
	if binary.NativeEndian.Uint16(answer[4:]) == unix.NLMSG_ERROR {
		code := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:]))
		return unix.Errno(-code)
	}
	return nil
}
