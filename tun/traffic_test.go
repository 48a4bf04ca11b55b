package tun

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// eachFamily runs test for both IP versions on one device.
func eachFamily(t *testing.T, test func(t *testing.T, host, peer netip.Addr)) {
	t.Run("ipv4", func(t *testing.T) { test(t, host4, peer4) })
	t.Run("ipv6", func(t *testing.T) { test(t, host6, peer6) })
}

func TestPing(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		startMirror(t, d)
		eachFamily(t, func(t *testing.T, _, peer netip.Addr) {
			network, request, reply := "ip4:icmp", byte(8), byte(0)
			if peer.Is6() {
				network, request, reply = "ip6:ipv6-icmp", 128, 129
			}
			conn, err := net.DialIP(network, nil, &net.IPAddr{IP: peer.AsSlice()})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			echo := []byte{request, 0, 0, 0, 0x12, 0x34, 0, 1, 'p', 'i', 'n', 'g'}
			if peer.Is4() { // the kernel computes the checksum of ICMPv6
				sum := ^onesSum(echo)
				echo[2], echo[3] = byte(sum>>8), byte(sum)
			}
			if _, err := conn.Write(echo); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 1500)
			for {
				n, _, err := conn.ReadFromIP(buf) // ReadFromIP strips the IP header
				if err != nil {
					t.Fatal(err)
				}
				if buf[0] != reply {
					continue // the mirrored request
				}
				if !bytes.Equal(buf[4:n], echo[4:]) {
					t.Errorf("echo reply %x, want %x", buf[4:n], echo[4:])
				}
				return
			}
		})
	})
}

// onesSum returns the ones' complement sum of b (RFC 1071).
func onesSum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// TestUDP sends many datagrams with one system call (UDP_SEGMENT). If the
// kernel gives them to the device as one packet, Read has to split it.
func TestUDP(t *testing.T) {
	const size, count = 300, 40
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		startMirror(t, d)
		eachFamily(t, func(t *testing.T, host, peer netip.Addr) {
			server, err := net.ListenUDP("udp",
				net.UDPAddrFromAddrPort(netip.AddrPortFrom(host, 0)))
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			port := server.LocalAddr().(*net.UDPAddr).AddrPort().Port()
			client, err := net.DialUDP("udp", nil,
				net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, port)))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server.SetDeadline(time.Now().Add(patience))
			setsockopt(t, client, unix.SOL_UDP, unix.UDP_SEGMENT, size)

			sent := randomBytes(size*count - size/2) // the last datagram is shorter
			if _, err := client.Write(sent); err != nil {
				t.Fatal(err)
			}
			var got []byte
			buf := make([]byte, MaxPacketLen)
			for range count {
				n, from, err := server.ReadFromUDPAddrPort(buf)
				if err != nil {
					t.Fatal(err)
				}
				if n > size || from.Addr().Unmap() != peer {
					t.Errorf("%d bytes from %v, want at most %d from %v", n, from, size, peer)
				}
				got = append(got, buf[:n]...)
			}
			if !bytes.Equal(got, sent) {
				t.Error("received datagrams differ from sent ones")
			}
		})
	})
}

func setsockopt(t *testing.T, conn syscall.Conn, level, option, value int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), level, option, value)
	})
	if err := errors.Join(err, serr); err != nil {
		t.Fatal(err)
	}
}

// TestAllocs checks that Read and Write do not allocate.
func TestAllocs(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		client := dialUDP(t)
		datagram := make([]byte, 1000)
		in, sizes := buffers(d.BatchSize())
		if n := testing.AllocsPerRun(100, func() {
			client.Write(datagram)
			d.Read(in, sizes, Headroom)
		}); n > 0 {
			t.Errorf("%v allocations per Read", n)
		}

		out := make([][]byte, 10)
		for i := range out {
			out[i] = slices.Clip(udpPacket(1000)) // coalescing allocates with -race
		}
		if n := testing.AllocsPerRun(100, func() {
			d.Write(out, Headroom)
		}); n > 0 {
			t.Errorf("%v allocations per Write", n)
		}
	})
}

// TestTCP sends several megabytes through the device and back.
func TestTCP(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		m := startMirror(t, d)
		eachFamily(t, func(t *testing.T, host, peer netip.Addr) { echoTCP(t, host, peer, 8<<20) })

		batch, written := m.maxBatch.Load(), m.written.Load()
		link, err := netlink.LinkByIndex(d.Index())
		if err != nil {
			t.Fatal(err)
		}
		received := link.Attrs().Statistics.RxPackets
		t.Logf("most packets in one Read: %d; %d packets in %d writes", batch, written, received)
		if offload && (batch < 2 || received >= written) {
			t.Error("packets were not segmented or not coalesced")
		}
		if !offload && batch != 1 {
			t.Error("the plain device read more than one packet at once")
		}
		if n := d.Dropped(); n != 0 {
			t.Errorf("Read dropped %d packets", n)
		}
	})
}

// echoTCP sends size bytes to peer, which the mirror makes the host itself, and
// checks that the same bytes come back.
func echoTCP(t *testing.T, host, peer netip.Addr, size int) {
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(host, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	echoed := make(chan error, 1)
	go func() {
		conn, err := listener.AcceptTCP()
		if err == nil {
			defer conn.Close()
			_, err = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
		}
		echoed <- err
	}()

	port := uint16(listener.Addr().(*net.TCPAddr).Port)
	conn, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.AddrPortFrom(peer, port)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	data := randomBytes(size)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- errors.Join(err, conn.CloseWrite())
	}()
	hash := sha256.New()
	n, err := io.Copy(hash, conn)
	if err := errors.Join(err, <-sent, <-echoed); err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(data); int(n) != size || !bytes.Equal(hash.Sum(nil), want[:]) {
		t.Errorf("%d of %d bytes came back, or they differ", n, size)
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// TestBurst checks that a burst fits the queue in front of Read and that
// Overflows counts the packets that do not fit.
func TestBurst(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		client, err := net.DialUDP("udp", nil,
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer4, 9)))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		send := func(n int) {
			for range n {
				if _, err := client.Write(make([]byte, 100)); err != nil {
					t.Fatal(err)
				}
			}
		}
		send(400) // all wait in the queue, because the test does not call Read
		if n := d.Overflows(); n != 0 {
			t.Errorf("%d of 400 packets were dropped, want 0", n)
		}
		send(400)
		if n := d.Overflows(); n < 100 {
			t.Errorf("%d of 800 packets were counted as dropped, want at least 100", n)
		}
	})
}
