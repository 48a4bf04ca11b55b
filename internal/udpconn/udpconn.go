// Package udpconn is the UDP socket under QUIC. It takes packets from the kernel many at a time (UDP GRO), has large buffers, and
// counts what the kernel dropped for want of room in them. Sending many at a time (UDP GSO) is up to quic-go, which is told by
// EIO when a path does not take it; this is where it is noticed and logged.
package udpconn

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

const (
	// bufferSize is what is asked for of each buffer of the socket, in bytes. It holds what a fast path brings while this process
	// waits for its turn to run.
	bufferSize = 8 << 20
	// maxReceive is the most that the kernel hands over at once, in bytes.
	maxReceive = 1 << 16
)

// Conn is a UDP socket for a quic.Transport. All methods but ReadBatch may be called concurrently.
type Conn struct {
	*net.UDPConn
	logger *slog.Logger
	gro    bool
	plain  *ipv4.PacketConn // reads when gro is false; it does not care for the version of IP
	noGSO  sync.Once

	dropped atomic.Uint32 // as the kernel counts

	// What ReadBatch has from the kernel and not yet handed over.
	buf     []byte
	rest    []byte // of buf
	size    int    // of all segments in rest, but that the last may be shorter
	oob     []byte
	control []byte         // what the kernel said of rest, as far as it is for QUIC
	from    netip.AddrPort // where rest came from
	addr    *net.UDPAddr   // the same for QUIC, which keeps it and does not write to it
}

// Features is what the kernel grants a socket.
type Features struct {
	GSO, GRO bool
	// ReceiveBuffer and SendBuffer are in bytes, as the kernel counts them: with its own overhead.
	ReceiveBuffer, SendBuffer int
}

// New takes over c: closing the result closes c. Whatever the kernel refuses is done without; only c itself can fail.
func New(c *net.UDPConn, logger *slog.Logger) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	conn := &Conn{UDPConn: c, logger: logger, plain: ipv4.NewPacketConn(c)}
	var f Features
	if err := raw.Control(func(fd uintptr) { f = setUp(int(fd)) }); err != nil {
		return nil, err
	}
	if f.GRO {
		conn.gro, conn.buf, conn.oob = true, make([]byte, maxReceive), make([]byte, 256)
	}
	conn.report(f)
	return conn, nil
}

// setUp asks for all that helps and returns what was granted.
func setUp(fd int) Features {
	for _, o := range []struct{ force, plain int }{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		// Without CAP_NET_ADMIN the limit is net.core.rmem_max and wmem_max.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.force, bufferSize) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.plain, bufferSize)
		}
	}
	var f Features
	f.ReceiveBuffer, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	f.SendBuffer, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	f.GSO = err == nil
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	f.GRO = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	return f
}

// report logs what was granted, and how to have more.
func (c *Conn) report(f Features) {
	level, remedies := slog.LevelDebug, []string(nil)
	if f.ReceiveBuffer < bufferSize || f.SendBuffer < bufferSize {
		level = slog.LevelWarn
		remedies = append(remedies, "raise net.core.rmem_max and net.core.wmem_max, or run with CAP_NET_ADMIN")
	}
	if !f.GSO || !f.GRO {
		level = slog.LevelWarn
		remedies = append(remedies, "use Linux 5.0 or newer")
	}
	attrs := []any{"address", c.LocalAddr().String(), "gso", f.GSO, "gro", f.GRO, "receive_buffer", f.ReceiveBuffer, "send_buffer", f.SendBuffer}
	if len(remedies) > 0 {
		attrs = append(attrs, "for_more_speed", strings.Join(remedies, "; "))
	}
	c.logger.Log(context.Background(), level, "UDP socket", attrs...)
}

// ReadBatch waits for packets and fills ms, each with one packet and its control data, until ms is full or there is no packet
// at hand. The packets of one batch come from one address. quic-go reads from sockets that have this method with it, from one
// goroutine.
func (c *Conn) ReadBatch(ms []ipv4.Message, flags int) (int, error) {
	if !c.gro {
		return c.plain.ReadBatch(ms, flags)
	}
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

// receive takes the next packets from the kernel.
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
	for len(oob) > 0 {
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
			c.dropped.Store(binary.NativeEndian.Uint32(data))
		default:
			c.control = append(c.control, oob[:len(oob)-len(rest)]...)
		}
		oob = rest
	}
}

// Dropped returns how many packets the kernel has dropped so far because the receive buffer was full. It may lag behind until the
// next packet comes.
func (c *Conn) Dropped() uint64 { return uint64(c.dropped.Load()) }

// WriteMsgUDP sends b, several packets in one when oob says so. It logs the first time that a path does not take that: quic-go
// then sends packets to that peer one by one.
func (c *Conn) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	n, oobn, err = c.UDPConn.WriteMsgUDP(b, oob, addr)
	if errors.Is(err, syscall.EIO) {
		c.noGSO.Do(func() {
			c.logger.Warn("the way out does not take UDP packets many at a time: sending them one by one, which is slower", "remote", addr.String(),
				"remedy", "look for a driver that computes UDP checksums: ethtool -K DEVICE tx-checksum-ip-generic on")
		})
	}
	return n, oobn, err
}
