package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// step implements one Read of a scripted device.
type step func(bufs [][]byte, sizes []int, offset int) (int, error)

// scripted is a wireguard-go device that executes one step for each Read.
type scripted struct {
	wgtun.Device
	steps []step
}

func (s *scripted) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	next := s.steps[0]
	s.steps = s.steps[1:]
	return next(bufs, sizes, offset)
}

// fails returns a step that reads n packets of one byte and returns err.
func fails(n int, err error) step {
	return func(_ [][]byte, sizes []int, _ int) (int, error) {
		for i := range n {
			sizes[i] = 1
		}
		return n, err
	}
}

// TestReadBadPackets checks that Read counts bad packets and continues with the
// next one.
func TestReadBadPackets(t *testing.T) {
	for name, bad := range map[string]step{
		"too many segments": fails(0, wgtun.ErrTooManySegments),
		"malformed":         fails(0, errors.New("tcp header len is invalid: 4")),
		"short":             fails(0, io.ErrShortBuffer),
		"unknown to kernel": fails(0, &fs.PathError{Op: "read", Path: nodePath, Err: unix.EINVAL}),
		"out of range": func(bufs [][]byte, _ []int, offset int) (int, error) {
			_ = bufs[0][offset : cap(bufs[0])+1]
			return 1, nil
		},
		"truncated": func(bufs [][]byte, sizes []int, offset int) (int, error) {
			sizes[0], sizes[1] = 1, len(bufs[1])-offset+1
			return 2, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := &Device{backend: newOffload(&scripted{steps: []step{bad, bad, fails(1, nil)}})}
			bufs, sizes := buffers(2)
			if n, err := d.Read(bufs, sizes, Headroom); n != 1 || err != nil || d.Dropped() != 2 {
				t.Errorf("%d packets, error %v, %d dropped; want 1, none, 2", n, err, d.Dropped())
			}
		})
	}
}

// TestReadKeepsGoodSegments checks that Read returns the first segments of a
// packet that has too many.
func TestReadKeepsGoodSegments(t *testing.T) {
	d := &Device{backend: newOffload(&scripted{steps: []step{fails(3, wgtun.ErrTooManySegments)}})}
	bufs, sizes := buffers(4)
	if n, err := d.Read(bufs, sizes, Headroom); n != 3 || err != nil || d.Dropped() != 1 {
		t.Errorf("%d packets, error %v, %d dropped; want 3, none, 1", n, err, d.Dropped())
	}
}

func TestReadFails(t *testing.T) {
	for _, want := range []error{
		io.EOF, os.ErrClosed,
		&fs.PathError{Op: "read", Path: nodePath, Err: unix.EIO},
		&fs.PathError{Op: "read", Path: nodePath, Err: errors.New("not pollable")},
	} {
		t.Run(want.Error(), func(t *testing.T) {
			o := newOffload(&scripted{steps: []step{fails(0, want)}})
			bufs, sizes := buffers(1)
			if _, err := o.read(bufs, sizes, Headroom); err != want {
				t.Errorf("error %v, want %v", err, want)
			}
		})
	}
}

// TestReadAfterRemoval checks that Read returns ErrRemoved for a removed device
// even if the descriptor's error is less specific.
func TestReadAfterRemoval(t *testing.T) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	const loopback, nonexistent = 1, 1 << 30
	cause := errors.New("not pollable")
	for index, want := range map[int]error{loopback: cause, nonexistent: ErrRemoved} {
		t.Run(fmt.Sprint("device ", index), func(t *testing.T) {
			dev := &scripted{steps: []step{fails(0,
				&fs.PathError{Op: "read", Path: nodePath, Err: cause})}}
			d := &Device{backend: newOffload(dev), nl: nl, index: index}
			bufs, sizes := buffers(1)
			if _, err := d.Read(bufs, sizes, Headroom); !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
		})
	}
}

func TestLeaves(t *testing.T) {
	a, b, c := errors.New("a"), errors.New("b"), errors.New("c")
	joined := errors.Join(errors.Join(errors.Join(nil, a), b), c)
	if n, first := leaves(joined); n != 3 || first != a {
		t.Errorf("%d errors, first %v; want 3, a", n, first)
	}
	if n, first := leaves(b); n != 1 || first != b {
		t.Errorf("%d errors, first %v; want 1, b", n, first)
	}
}

// TestReadBadSuperPackets sends large packets that the kernel's own TCP would
// not send, each followed by a valid packet.
func TestReadBadSuperPackets(t *testing.T) {
	const mtu = 1400
	d := openDevice(t, Config{MTU: mtu, Offload: true})
	bringUp(t, d)
	raw := packetSocket(t, d)

	good := tcpPacket(7)
	bad := map[string]struct {
		segment int      // bytes of data in each segment; 0: no segmentation
		packet  []byte   // sent to the device
		bufs    [][]byte // given to Read
		want    int      // segments that arrive
	}{
		"too many segments": {100, tcpPacket(40000), sized(d.BatchSize(), MaxPacketLen),
			d.BatchSize() - 1},
		"too many for few buffers":     {1000, tcpPacket(40000), sized(3, MaxPacketLen), 2},
		"too many for one buffer":      {1000, tcpPacket(40000), sized(1, MaxPacketLen), 0},
		"segments longer than buffers": {9000, tcpPacket(40000), sized(d.BatchSize(), mtu), 0},
		"segments longer than length": {9000, tcpPacket(40000),
			withSpare(sized(d.BatchSize(), mtu)), 0},
	}
	for name, bad := range bad {
		t.Run(name, func(t *testing.T) {
			before := d.Dropped()
			send(t, raw, bad.packet, bad.segment)
			send(t, raw, good, 0)
			sizes := make([]int, len(bad.bufs))
			for got := 0; ; {
				n, err := d.Read(bad.bufs, sizes, Headroom)
				if err != nil {
					t.Fatal(err)
				}
				if isTestTCP(bad.bufs[0][Headroom:][:sizes[0]], len(good)) {
					if n != 1 || got != bad.want {
						t.Errorf("%d packets, then %d; want %d, then 1", got, n, bad.want)
					}
					break
				}
				for i := range n {
					if isTestTCP(bad.bufs[i][Headroom:][:sizes[i]], 40+bad.segment) {
						got++
					}
				}
			}
			if n := d.Dropped() - before; n != 1 {
				t.Errorf("%d dropped, want 1", n)
			}
		})
	}
}

// sized returns n buffers with Headroom and room for packets of size bytes.
func sized(n, size int) [][]byte {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, Headroom+size)
	}
	return bufs
}

// withSpare replaces bufs by buffers with capacity beyond their length.
func withSpare(bufs [][]byte) [][]byte {
	for i, b := range bufs {
		bufs[i] = make([]byte, len(b), 2*MaxPacketLen)
	}
	return bufs
}

// packetSocket returns a packet socket that sends packets with virtio headers
// out of d.
func packetSocket(t *testing.T, d *Device) int {
	t.Helper()
	proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_IP))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: d.Index()}))
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// send sends one TCP packet. Unless segment is 0, the reader has to split it
// into segments with that many bytes of data.
func send(t *testing.T, fd int, packet []byte, segment int) {
	t.Helper()
	hdr := make([]byte, 10) // struct virtio_net_hdr
	if segment > 0 {
		hdr[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
		hdr[1] = unix.VIRTIO_NET_HDR_GSO_TCPV4
		// header length, segment size, checksum start, checksum offset
		for i, v := range []int{40, segment, 20, 16} {
			binary.NativeEndian.PutUint16(hdr[2+2*i:], uint16(v))
		}
	}
	if _, err := unix.Write(fd, append(hdr, packet...)); err != nil {
		t.Fatal(fmt.Errorf("packet of %d bytes, segments of %d: %w", len(packet), segment, err))
	}
}

// tcpPacket returns a TCP packet from host4 to peer4 with n bytes of data.
func tcpPacket(n int) []byte {
	ip := make([]byte, 40+n)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], host4.AsSlice())
	copy(ip[16:], peer4.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:20]))
	binary.BigEndian.PutUint16(ip[20:], testPort)
	binary.BigEndian.PutUint16(ip[22:], testPort)
	ip[32], ip[33] = 5<<4, 0x10 // header length, ACK
	return ip
}

// isTestTCP reports whether b is a packet from tcpPacket, or a segment of one,
// that is length bytes long.
func isTestTCP(b []byte, length int) bool {
	return len(b) == length && b[0] == 0x45 && b[9] == unix.IPPROTO_TCP
}
