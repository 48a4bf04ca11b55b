// Package udpconn is the UDP socket under QUIC. It takes packets from the kernel many at a time (UDP GRO), has large buffers, and
// reports what the kernel dropped for want of room in them. Sending many at a time (UDP GSO) is up to quic-go, which is told by
// EIO when a path does not take it; this is where it is noticed and logged.
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
	// bufferSize is what is asked for of each buffer of the socket, in bytes. It holds what a fast path brings while this process
	// waits for its turn to run.
	bufferSize = 8 << 20
	// enoughBuffer is not worth a word. It is what quic-go asks for.
	enoughBuffer = 7 << 20
	// maxReceive is the most that the kernel hands over at once, in bytes.
	maxReceive = 1 << 16
	// oobSize is room for all control data that comes with it: addresses, ECN, size of segments, drops.
	oobSize = 256
)

// Conn is a UDP socket for a quic.Transport. All methods but ReadBatch may be called concurrently.
type Conn struct {
	*net.UDPConn
	logger  *slog.Logger
	dropped func(packets int)
	noGSO   sync.Once // logs that a path does not take many packets at a time

	single bool          // packets are sent and received one by one
	lossy  atomic.Bool   // what cannot leave is lost, and no error
	refuse atomic.Uint32 // unix.Errno for which the last packet did not leave, 0 if it did

	// What ReadBatch has from the kernel and not yet handed over.
	buf     []byte
	rest    []byte // of buf
	size    int    // of all segments in rest, but that the last may be shorter
	oob     []byte
	control []byte         // what the kernel said of rest, as far as it is for QUIC
	from    netip.AddrPort // where rest came from
	addr    *net.UDPAddr   // the same for QUIC, which keeps it and does not write to it
	drops   uint32         // as the kernel counts
}

// New takes over c: closing the result closes c. Whatever the kernel refuses is done without; only c itself can fail. ReadBatch calls
// dropped with the number of packets that the kernel has dropped since the last call, because the receive buffer was full;
// it learns of them with the next packet that arrives. nil: nobody wants to know.
func New(c *net.UDPConn, logger *slog.Logger, dropped func(packets int)) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var g granted
	if err := raw.Control(func(fd uintptr) { g = setUp(int(fd)) }); err != nil {
		return nil, err
	}
	if dropped == nil {
		dropped = func(int) {}
	}
	conn := &Conn{UDPConn: c, logger: logger, dropped: dropped, buf: make([]byte, maxReceive), oob: make([]byte, oobSize)}
	conn.report(g)
	return conn, nil
}

// granted is what the kernel grants a socket.
type granted struct {
	gso, gro                  bool
	receiveBuffer, sendBuffer int // bytes
}

// setUp asks for all that helps and returns what was granted.
func setUp(fd int) granted {
	var g granted
	for _, b := range []struct {
		force, plain int
		size         *int
	}{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, &g.receiveBuffer}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, &g.sendBuffer}} {
		// Without CAP_NET_ADMIN the limit is net.core.rmem_max and wmem_max.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.force, bufferSize) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.plain, bufferSize)
		}
		size, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, b.plain)
		*b.size = size / 2 // the kernel doubles what is asked for, because it counts its overhead too
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	g.gso = err == nil
	g.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	return g
}

// report logs what was granted, and how to have more.
func (c *Conn) report(g granted) {
	logger := c.logger.With("address", c.LocalAddr().String(), "gso", g.gso, "gro", g.gro, "receive_buffer", g.receiveBuffer, "send_buffer", g.sendBuffer)
	var remedies []string
	if g.receiveBuffer < enoughBuffer || g.sendBuffer < enoughBuffer {
		remedies = append(remedies, fmt.Sprintf("set net.core.rmem_max and net.core.wmem_max to %d, or run with CAP_NET_ADMIN", bufferSize))
	}
	if !g.gso || !g.gro {
		remedies = append(remedies, "use Linux 5.0 or newer")
	}
	if len(remedies) == 0 {
		logger.Debug("UDP socket")
		return
	}
	logger.Warn("the UDP socket is slower than it could be", "remedy", strings.Join(remedies, "; "))
}

// ReadBatch waits for packets and fills ms, each with one packet and its control data, until ms is full or there is no packet
// at hand. The packets of one batch come from one address. quic-go reads from sockets that have this method with it, from one
// goroutine, and with flags of 0.
func (c *Conn) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	for len(c.rest) == 0 {
		if err := c.receive(); err != nil {
			return 0, err
		}
	}
	n := 0
	for ; n < len(ms) && len(c.rest) > 0; n++ {
		m := &ms[n]
		segment := c.rest[:min(c.size, len(c.rest))]
		c.rest = c.rest[len(segment):]
		m.N = copy(m.Buffers[0], segment) // what does not fit is cut, and fails to decrypt
		m.NN = copy(m.OOB, c.control)
		m.Addr = c.addr
	}
	return n, nil
}

// receive takes the next packets from the kernel: one, or a run of them from one address.
func (c *Conn) receive() error {
	n, oobn, _, from, err := c.ReadMsgUDPAddrPort(c.buf, c.oob)
	if err != nil {
		return err
	}
	c.rest, c.size = c.buf[:n], n
	c.parse(c.oob[:oobn])
	if c.from != from {
		c.from, c.addr = from, net.UDPAddrFromAddrPort(from)
	}
	return nil
}

// parse reads the control data that came with rest and keeps what is for QUIC of it.
func (c *Conn) parse(oob []byte) {
	c.control = c.control[:0]
	for len(oob) >= unix.SizeofCmsghdr { // less is not a header, and ParseOneSocketControlMessage would read beyond it
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return
		}
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			if size := int(int32(binary.NativeEndian.Uint32(data))); size > 0 {
				c.size = size
			}
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL && len(data) >= 4:
			drops := binary.NativeEndian.Uint32(data)
			if n := drops - c.drops; n > 0 {
				c.dropped(int(n))
			}
			c.drops = drops
		default:
			c.control = append(c.control, oob[:len(oob)-len(rest)]...)
		}
		oob = rest
	}
}

// LoseUnsent has packets from now on be lost, without an error, that this host does not let out: for want of a route, an address or
// an interface, or because its firewall forbids it. QUIC would end the connection on the first such error, although a host that
// changes networks has a route again a moment later.
func (c *Conn) LoseUnsent() { c.lossy.Store(true) }

// Unsent returns the unix.Errno for which the last packet did not leave this host, nil if it did.
func (c *Conn) Unsent() error {
	if e := c.refuse.Load(); e != 0 {
		return unix.Errno(e)
	}
	return nil
}

// DisableOffload has packets be sent and received one by one, so that a capture
// on this host sees each of them as it is on the wire: with offload it sees what
// the kernel splits later, and no program decrypts that. It is called before
// anything is sent or received.
func (c *Conn) DisableOffload() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	c.single = true
	return raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 0) // a kernel without it has nothing to turn off
	})
}

// WriteMsgUDP sends b, several packets in one when oob says so. It logs the first time that a path does not take that: quic-go
// then sends packets to that peer one by one.
func (c *Conn) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	if c.single && segmented(oob) {
		return 0, 0, os.NewSyscallError("sendmsg", unix.EIO) // as of a path that does not take it: quic-go sends them one by one then
	}
	n, oobn, err = c.UDPConn.WriteMsgUDP(b, oob, addr)
	if err == nil {
		if c.refuse.Load() != 0 {
			c.refuse.Store(0)
		}
		return n, oobn, nil
	}
	c.failed(err, addr)
	if e := unsent(err); e != 0 {
		c.refuse.Store(uint32(e))
		if c.lossy.Load() {
			return len(b), len(oob), nil
		}
	}
	return n, oobn, err
}

// segmented reports whether control data asks the kernel to split a message into
// packets (UDP_SEGMENT).
func segmented(oob []byte) bool {
	for len(oob) >= unix.SizeofCmsghdr {
		h, _, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return false
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_SEGMENT {
			return true
		}
		oob = rest
	}
	return false
}

// unsent returns what err says of the host's network as it is now, 0 if it is about the packet or the socket.
func unsent(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		switch e {
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EADDRNOTAVAIL, unix.ENODEV, unix.EPERM, unix.EACCES, unix.ENOBUFS:
			return e
		}
	}
	return 0
}

// failed looks at what a write to remote failed with.
func (c *Conn) failed(err error, remote *net.UDPAddr) {
	if errors.Is(err, unix.EIO) {
		c.noGSO.Do(func() {
			c.logger.Warn("the way out does not take UDP packets many at a time: sending them one by one, which is slower", "remote", remote.String(),
				"remedy", "look for a driver that computes UDP checksums: ethtool -K DEVICE tx-checksum-ip-generic on")
		})
	}
}
