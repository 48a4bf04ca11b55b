package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

// Packet is a captured packet.
type Packet struct {
	gopacket.Packet
	Outgoing bool // sent by the host
}

// Capture collects the packets of one interface. Offloads apply: between veth
// interfaces one packet may hold many segments.
type Capture struct {
	host   *Host
	iface  string
	filter func(Packet) bool
	link   gopacket.Decoder
	sock   *os.File
	pcap   *os.File
	pcapw  *pcapgo.Writer
	done   chan struct{} // closed at the end of read

	mu      sync.Mutex // guards packets, changed and err
	packets []Packet
	changed chan struct{} // closed at the next packet
	err     error

	closing sync.Once
}

// captureBuffer is the requested size of the socket's queue, in bytes.
const captureBuffer = 16 << 20

// Capture starts to collect the packets of an interface for which filter
// returns true; a nil filter accepts all. The artifact HOST-N-IFACE.pcap
// receives all packets, also those that filter rejects. The capture sees
// packets from the moment Capture returns until Close.
func (h *Host) Capture(iface string, filter func(Packet) bool) (*Capture, error) {
	c := &Capture{host: h, iface: iface, filter: filter, done: make(chan struct{}),
		changed: make(chan struct{})}
	link, err := h.nl.LinkByName(iface)
	if err != nil {
		return nil, fmt.Errorf("lab: capture on %s %s: %w", h.name, iface, err)
	}
	linkType := layers.LinkTypeEthernet
	c.link = layers.LayerTypeEthernet
	if link.Attrs().EncapType == "none" { // a TUN device
		linkType, c.link = layers.LinkTypeRaw, nil
	}
	if c.pcap, err = h.lab.artifact(h, iface, "pcap"); err != nil {
		return nil, err
	}
	c.pcapw = pcapgo.NewWriter(c.pcap)
	err = c.pcapw.WriteFileHeader(1<<18, linkType)
	if err == nil {
		err = h.Do(func() error { return c.open(link.Attrs().Index) })
	}
	if err != nil {
		c.pcap.Close()
		return nil, fmt.Errorf("lab: capture on %s %s: %w", h.name, iface, err)
	}
	go c.read()
	if !h.lab.own(c) {
		return nil, errClosed
	}
	return c, nil
}

// open makes the packet socket.
func (c *Capture) open(index int) error {
	// Protocol 0 receives nothing until the socket is bound.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	c.sock = os.NewFile(uintptr(fd), "capture")
	// Only root outside namespaces may exceed the limit. Close reports losses.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, captureBuffer)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer)
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}); err != nil {
		c.sock.Close()
		return err
	}
	return nil
}

// read collects packets until the socket is closed.
func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.sock.SyscallConn()
	if err != nil {
		c.fail(err)
		return
	}
	buf := make([]byte, 1<<18)
	for {
		var from unix.Sockaddr
		var n int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_TRUNC)
			return rerr != unix.EAGAIN
		})
		switch {
		case err != nil: // drain set a deadline after the last packet
			return
		case errors.Is(rerr, unix.ENETDOWN): // the interface may come up again
		case rerr != nil:
			c.fail(rerr)
			return
		default:
			c.add(buf[:min(n, len(buf))], from)
		}
	}
}

// add decodes and stores one packet.
func (c *Capture) add(b []byte, from unix.Sockaddr) {
	now := time.Now()
	info := gopacket.CaptureInfo{Timestamp: now, CaptureLength: len(b), Length: len(b)}
	if err := c.pcapw.WritePacket(info, b); err != nil {
		c.fail(err)
	}
	decoder := c.link
	if decoder == nil {
		decoder = layers.LayerTypeIPv4
		if len(b) > 0 && b[0]>>4 == 6 {
			decoder = layers.LayerTypeIPv6
		}
	}
	p := Packet{Packet: gopacket.NewPacket(b, decoder, gopacket.Default)} // copies b
	p.Metadata().CaptureInfo = info
	if ll, ok := from.(*unix.SockaddrLinklayer); ok {
		p.Outgoing = ll.Pkttype == unix.PACKET_OUTGOING
	}
	if c.filter != nil && !c.filter(p) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets = append(c.packets, p)
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *Capture) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errors.Join(c.err, fmt.Errorf("lab: capture on %s %s: %w", c.host.name, c.iface, err))
}

// Packets returns the packets collected so far.
func (c *Capture) Packets() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.packets[:len(c.packets):len(c.packets)]
}

// Wait returns the first collected or future packet for which match returns
// true.
func (c *Capture) Wait(ctx context.Context, match func(Packet) bool) (Packet, error) {
	for i := 0; ; {
		c.mu.Lock()
		packets, changed, err := c.packets, c.changed, c.err
		c.mu.Unlock()
		for ; i < len(packets); i++ {
			if match(packets[i]) {
				return packets[i], nil
			}
		}
		if err != nil {
			return Packet{}, err
		}
		select {
		case <-changed:
		case <-c.done:
			if len(c.Packets()) == i {
				return Packet{}, fmt.Errorf("lab: capture on %s %s: closed: %w", c.host.name,
					c.iface, net.ErrClosed)
			}
		case <-ctx.Done():
			return Packet{}, fmt.Errorf("lab: capture on %s %s: none of %d packets: %w",
				c.host.name, c.iface, i, ctx.Err())
		}
	}
}

// Close reads the packets that have arrived and ends the capture. It returns an
// error when packets were lost, so that a test can rely on the absence of a
// packet. It may be called more than once.
func (c *Capture) Close() error {
	c.closing.Do(func() {
		err := c.drain()
		if stats, serr := c.stats(); serr != nil {
			err = errors.Join(err, serr)
		} else if stats.Drops > 0 {
			err = errors.Join(err, fmt.Errorf("%d packets lost: the capture cannot keep up",
				stats.Drops))
		}
		if err = errors.Join(err, c.sock.Close(), c.pcap.Close()); err != nil {
			c.fail(err)
		}
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// drain waits until the reader has read all queued packets, and ends it.
func (c *Capture) drain() error {
	// A deadline in the past would end the reader before the queue is empty.
	for {
		queued, err := c.queued()
		if err != nil {
			return err
		}
		if queued == 0 {
			break
		}
		select {
		case <-c.done: // reading failed
			return nil
		case <-time.After(time.Millisecond):
		}
	}
	if err := c.sock.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	<-c.done
	return nil
}

// queued returns the size of the next packet in the socket's queue.
func (c *Capture) queued() (n int, err error) {
	cerr := c.control(func(fd int) { n, err = unix.IoctlGetInt(fd, unix.TIOCINQ) })
	return n, errors.Join(err, cerr)
}

// stats returns the kernel's counters since the capture began.
func (c *Capture) stats() (s *unix.TpacketStats, err error) {
	cerr := c.control(func(fd int) {
		s, err = unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	})
	return s, errors.Join(err, cerr)
}

func (c *Capture) control(f func(fd int)) error {
	raw, err := c.sock.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}
