// Package udpconn provides the UDP socket for a quic.Transport.
//
// A [Conn] receives many packets with one system call (UDP GRO), has large
// buffers, and counts the packets that the kernel dropped because the receive
// buffer was full. quic-go itself sends many packets with one system call (UDP
// GSO). The kernel returns EIO if a network path does not support that; Conn
// logs it once, and quic-go then sends packets one by one.
//
// A client that changes networks calls [Conn.IgnoreSendErrors], so that QUIC
// survives the time without a route.
package udpconn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

const (
	// bufferSize is the requested size in bytes of each socket buffer. It holds
	// the packets that arrive on a fast path while the scheduler lets this
	// process wait.
	bufferSize = 8 << 20

	// enoughBuffer is the size in bytes of a socket buffer that needs no
	// warning. quic-go requests this size.
	enoughBuffer = 7 << 20

	// maxReceive is the most bytes that the kernel returns at once.
	maxReceive = 1 << 16

	// oobSize is the room in bytes for the control data of received packets:
	// addresses, ECN, segment size and drops.
	oobSize = 256
)

// Conn is a UDP socket for a quic.Transport. All methods except ReadBatch may
// be called concurrently.
type Conn struct {
	*net.UDPConn
	logger  *slog.Logger
	dropped func(packets int)

	// logNoGSO logs once that a network path does not support GSO.
	logNoGSO sync.Once

	// offloadDisabled is set by DisableOffload, before the Conn is used.
	offloadDisabled bool

	// ignoreSendErrors is set by IgnoreSendErrors.
	ignoreSendErrors atomic.Bool

	// unsentErrno is the unix.Errno for which the last packet did not leave
	// this host, or 0 if it left.
	unsentErrno atomic.Uint32

	// The fields below belong to ReadBatch.

	buf []byte // received from the kernel
	oob []byte // control data of buf

	// unread is the part of buf that ReadBatch has not returned yet. It
	// consists of segments of segmentSize bytes, the last of which may be
	// shorter.
	unread      []byte
	segmentSize int

	// control is the part of oob that QUIC needs. It belongs to each segment of
	// unread.
	control []byte

	// from is the source of unread. addr is the same address for QUIC, which
	// retains it without changing it.
	from netip.AddrPort
	addr *net.UDPAddr

	drops uint32 // the kernel's counter of dropped packets
}

// New returns a Conn that owns c. It enables the offloads and buffers that the
// kernel supports and logs a remedy for missing ones. An error means that c
// itself failed.
//
// ReadBatch calls dropped with the number of packets that the kernel dropped
// since the previous call because the receive buffer was full. The kernel
// reports this number with the next packet that arrives. dropped may be nil.
func New(c *net.UDPConn, logger *slog.Logger, dropped func(packets int)) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var f features
	if err := raw.Control(func(fd uintptr) { f = setUp(int(fd)) }); err != nil {
		return nil, err
	}
	if dropped == nil {
		dropped = func(int) {}
	}
	conn := &Conn{UDPConn: c, logger: logger, dropped: dropped, buf: make([]byte, maxReceive),
		oob: make([]byte, oobSize)}
	conn.report(f)
	return conn, nil
}

// features are the offloads and buffers that the kernel granted a socket.
type features struct {
	gso, gro                  bool
	receiveBuffer, sendBuffer int // bytes
}

// setUp enables all features of the socket that the kernel supports and returns
// them.
func setUp(fd int) features {
	var f features
	for _, b := range []struct {
		force, plain int
		size         *int
	}{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, &f.receiveBuffer},
		{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, &f.sendBuffer}} {
		// Without CAP_NET_ADMIN the limit is net.core.rmem_max and wmem_max.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.force, bufferSize) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.plain, bufferSize)
		}
		size, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, b.plain)
		// The kernel doubles the requested size, because it counts its overhead
		// too.
		*b.size = size / 2
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	f.gso = err == nil
	f.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	return f
}

// report logs the features of the socket, with a remedy if some are missing.
func (c *Conn) report(f features) {
	logger := c.logger.With("address", c.LocalAddr().String(), "gso", f.gso, "gro", f.gro,
		"receive_buffer", f.receiveBuffer, "send_buffer", f.sendBuffer)
	var remedies []string
	if f.receiveBuffer < enoughBuffer || f.sendBuffer < enoughBuffer {
		remedies = append(remedies, fmt.Sprintf("set net.core.rmem_max and net.core.wmem_max "+
			"to %d, or run with CAP_NET_ADMIN", bufferSize))
	}
	if !f.gso || !f.gro {
		remedies = append(remedies, "use Linux 5.0 or newer")
	}
	if len(remedies) == 0 {
		logger.Debug("UDP socket")
		return
	}
	logger.Warn("the UDP socket is slower than it could be", "remedy", strings.Join(remedies, "; "))
}

// ReadBatch waits for packets and stores one packet with its control data in
// each of ms. It returns their number. All packets of a batch have the same
// source address. quic-go reads from sockets that have this method by it, in
// one goroutine and with flags of 0.
func (c *Conn) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	for len(c.unread) == 0 {
		if err := c.receive(); err != nil {
			return 0, err
		}
	}
	n := 0
	for ; n < len(ms) && len(c.unread) > 0; n++ {
		m := &ms[n]
		segment := c.unread[:min(c.segmentSize, len(c.unread))]
		c.unread = c.unread[len(segment):]
		// A packet that does not fit is truncated, and QUIC fails to decrypt
		// it.
		m.N = copy(m.Buffers[0], segment)
		m.NN = copy(m.OOB, c.control)
		m.Addr = c.addr
	}
	return n, nil
}

// receive receives the next packet from the kernel, or several packets from one
// address.
func (c *Conn) receive() error {
	n, oobn, _, from, err := c.ReadMsgUDPAddrPort(c.buf, c.oob)
	if err != nil {
		return err
	}
	c.unread, c.segmentSize = c.buf[:n], n
	c.parse(c.oob[:oobn])
	if c.from != from {
		c.from, c.addr = from, net.UDPAddrFromAddrPort(from)
	}
	return nil
}

// parse parses the control data of received packets. It sets segmentSize,
// reports drops, and stores the other messages, which are for QUIC, in control.
func (c *Conn) parse(oob []byte) {
	c.control = c.control[:0]
	for len(oob) >= unix.SizeofCmsghdr {
		// The condition is needed because ParseOneSocketControlMessage would
		// read beyond the end of a shorter slice.
		h, data, next, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return
		}
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			if size := int(int32(binary.NativeEndian.Uint32(data))); size > 0 {
				c.segmentSize = size
			}
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL && len(data) >= 4:
			drops := binary.NativeEndian.Uint32(data)
			if n := drops - c.drops; n > 0 {
				c.dropped(int(n))
			}
			c.drops = drops
		default:
			c.control = append(c.control, oob[:len(oob)-len(next)]...)
		}
		oob = next
	}
}

// IgnoreSendErrors makes later calls of WriteMsgUDP drop a packet, instead of
// failing, if it cannot leave this host because there is no route, address or
// interface, or because the host's firewall refuses it. QUIC would close the
// connection on the first such error, although a host that changes networks
// soon has a route again.
func (c *Conn) IgnoreSendErrors() { c.ignoreSendErrors.Store(true) }

// Unsent returns the unix.Errno for which the last packet did not leave this
// host, or nil if it left.
func (c *Conn) Unsent() error {
	if e := c.unsentErrno.Load(); e != 0 {
		return unix.Errno(e)
	}
	return nil
}

// DisableOffload makes the Conn send and receive packets one by one, so that a
// packet capture on this host shows them as they are on the wire. With offload,
// captures show large packets that the kernel splits later, which programs
// cannot decrypt. DisableOffload must be called before packets are sent or
// received.
func (c *Conn) DisableOffload() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	c.offloadDisabled = true
	return raw.Control(func(fd uintptr) {
		// The call fails on a kernel without GRO, which is fine.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 0)
	})
}

// WriteMsgUDP sends b as one packet, or as several if oob has a segment size.
// The error is EIO if the path does not support that; quic-go then sends
// packets to this peer one by one.
func (c *Conn) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	if c.offloadDisabled && segmented(oob) {
		// Make quic-go send the packets one by one.
		return 0, 0, os.NewSyscallError("sendmsg", unix.EIO)
	}
	n, oobn, err = c.UDPConn.WriteMsgUDP(b, oob, addr)
	if err == nil {
		if c.unsentErrno.Load() != 0 {
			c.unsentErrno.Store(0)
		}
		return n, oobn, nil
	}
	c.noteError(err, addr)
	if e := unsent(err); e != 0 {
		c.unsentErrno.Store(uint32(e))
		if c.ignoreSendErrors.Load() {
			return len(b), len(oob), nil
		}
	}
	return n, oobn, err
}

// segmented reports whether control data asks the kernel to split a message
// into packets (UDP_SEGMENT).
func segmented(oob []byte) bool {
	for len(oob) >= unix.SizeofCmsghdr {
		h, _, next, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return false
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_SEGMENT {
			return true
		}
		oob = next
	}
	return false
}

// unsent returns the errno of err if it is about the current state of the
// host's network, and 0 if it is about the packet or the socket.
func unsent(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		switch e {
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EADDRNOTAVAIL, unix.ENODEV,
			unix.EPERM, unix.EACCES, unix.ENOBUFS:
			return e
		}
	}
	return 0
}

// noteError logs the error of a write to remote if the path does not support
// GSO.
func (c *Conn) noteError(err error, remote *net.UDPAddr) {
	if errors.Is(err, unix.EIO) {
		c.logNoGSO.Do(func() {
			c.logger.Warn("the network path does not support UDP segmentation offload: "+
				"sending packets one by one, which is slower", "remote", remote.String(),
				"remedy", "let the driver compute UDP checksums: "+
					"ethtool -K DEVICE tx-checksum-ip-generic on")
		})
	}
}
