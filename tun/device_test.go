package tun

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestCloseWhileReading(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		for _, up := range []bool{false, true} {
			d := openDevice(t, Config{Offload: offload})
			if up {
				bringUp(t, d)
			}
			name, mtu := d.Name(), d.MTU()
			err := readUntilError(t, d, func() {
				waitForRead(t)
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
			if err != os.ErrClosed {
				t.Errorf("Read ended with %v, want os.ErrClosed", err)
			}
			if _, err := netlink.LinkByName(name); err == nil {
				t.Errorf("%s still exists", name)
			}

			bufs, sizes := buffers(1)
			if _, err := d.Read(bufs, sizes, Headroom); err != os.ErrClosed {
				t.Errorf("Read after Close: %v, want os.ErrClosed", err)
			}
			if n, err := d.Write([][]byte{udpPacket(8), udpPacket(8)}, Headroom); n != 0 ||
				err != os.ErrClosed {
				t.Errorf("Write after Close: %d, %v, want os.ErrClosed", n, err)
			}
			if err := d.SetMTU(1400); err != os.ErrClosed {
				t.Errorf("SetMTU after Close: %v, want os.ErrClosed", err)
			}
			if err := d.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			if d.Name() != name || d.MTU() != mtu {
				t.Errorf("closed device is %s, MTU %d, want %s, %d", d.Name(), d.MTU(), name, mtu)
			}
		}
	})
}

// TestCloseAmidTraffic closes a device while other goroutines use it.
func TestCloseAmidTraffic(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{Offload: offload})
		bringUp(t, d)
		client := dialUDP(t)
		var users sync.WaitGroup
		use := func(f func() error) {
			started := make(chan struct{})
			users.Go(func() {
				err := f()
				close(started)
				for err == nil {
					err = f()
				}
				if err != os.ErrClosed {
					t.Errorf("error %v, want os.ErrClosed", err)
				}
			})
			<-started
		}
		for range 2 {
			bufs, sizes := buffers(d.BatchSize())
			use(func() error {
				// A packet for Read; fails when the device is closed.
				client.Write(make([]byte, 100))
				_, err := d.Write([][]byte{udpPacket(100), udpPacket(100)}, Headroom)
				return err
			})
			use(func() error { _, err := d.Read(bufs, sizes, Headroom); return err })
			use(func() error { d.Name(); return d.SetMTU(1300 + d.MTU()%2) })
		}
		for range 2 {
			users.Go(func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				if n := len(descriptors(t, nodePath)); n != 0 {
					t.Errorf("%d descriptors after Close", n)
				}
			})
		}
		users.Wait()
	})
}

// readUntilError calls f while a goroutine reads and discards packets, and
// returns the error that ended the reading.
func readUntilError(t *testing.T, d *Device, f func()) (err error) {
	var done sync.WaitGroup
	done.Go(func() {
		bufs, sizes := buffers(d.BatchSize())
		for err == nil {
			_, err = d.Read(bufs, sizes, Headroom)
		}
	})
	f()
	done.Wait()
	return err
}

func TestRemovedByOthers(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{Offload: offload})
		bringUp(t, d)
		err := readUntilError(t, d, func() {
			waitForRead(t)
			link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index()}}
			if err := netlink.LinkDel(link); err != nil {
				t.Fatal(err)
			}
		})
		if !errors.Is(err, ErrRemoved) {
			t.Errorf("Read ended with %v, want ErrRemoved", err)
		}
		if n, err := d.Write([][]byte{udpPacket(8)}, Headroom); n != 0 ||
			!errors.Is(err, ErrRemoved) {
			t.Errorf("Write: %d, %v, want ErrRemoved", n, err)
		}
		if err := d.SetMTU(1400); !errors.Is(err, ErrRemoved) {
			t.Errorf("SetMTU: %v, want ErrRemoved", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestSetMTU(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		startMirror(t, d)
		for _, mtu := range []int{1280, 9000, MaxMTU, 576, 1400} {
			if err := d.SetMTU(mtu); err != nil {
				t.Fatal(err)
			}
			link, err := netlink.LinkByIndex(d.Index())
			if err != nil {
				t.Fatal(err)
			}
			if got := link.Attrs().MTU; d.MTU() != mtu || got != mtu {
				t.Errorf("MTU %d, in the kernel %d, want %d", d.MTU(), got, mtu)
			}
			echoTCP(t, host4, peer4, 1<<20)
		}
		for _, mtu := range []int{-1, 0, MinMTU - 1, MaxMTU + 1} {
			if err := d.SetMTU(mtu); !errors.Is(err, ErrInvalid) {
				t.Errorf("SetMTU(%d): %v, want ErrInvalid", mtu, err)
			}
		}
		if d.MTU() != 1400 {
			t.Errorf("MTU %d after failed changes, want 1400", d.MTU())
		}
	})
}

// TestRename renames a device and gives its old name to a second device.
func TestRename(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{Name: "masque0", MTU: 1400, Offload: offload})
		link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index()}}
		if err := netlink.LinkSetName(link, "renamed0"); err != nil {
			t.Fatal(err)
		}
		other := openDevice(t, Config{Name: "masque0", MTU: 1400, Offload: offload})
		if err := d.SetMTU(1300); err != nil {
			t.Fatal(err)
		}
		if d.Name() != "renamed0" || d.MTU() != 1300 || other.MTU() != 1400 {
			t.Errorf("renamed device is %s with MTU %d, other device has MTU %d; want renamed0, 1300, 1400", d.Name(), d.MTU(), other.MTU())
		}
	})
}

func TestInvalidArguments(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{Offload: offload})
		for name, call := range map[string]func() (int, error){
			"no buffers":    func() (int, error) { return d.Read(nil, nil, 0) },
			"too few sizes": func() (int, error) { return d.Read([][]byte{{0}}, nil, 0) },
			"offset past end": func() (int, error) {
				return d.Read([][]byte{make([]byte, 8)}, []int{0}, 8)
			},
			"negative offset": func() (int, error) {
				return d.Read([][]byte{make([]byte, 8)}, []int{0}, -1)
			},
			"no headroom": func() (int, error) {
				return d.Write([][]byte{udpPacket(8)}, Headroom-1)
			},
		} {
			t.Run(name, func(t *testing.T) {
				if n, err := call(); n != 0 || !errors.Is(err, ErrInvalid) {
					t.Errorf("got %d, %v, want ErrInvalid", n, err)
				}
			})
		}
	})
}

// TestReadLongPacket reads with buffers shorter than the MTU.
func TestReadLongPacket(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		client := dialUDP(t)
		for _, size := range []int{1000, 200 - 28 + 1, 200 - 28} {
			if _, err := client.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
		}
		bufs, sizes := sized(d.BatchSize(), 200), make([]int, d.BatchSize())
		for {
			n, err := d.Read(bufs, sizes, Headroom)
			if err != nil {
				t.Fatal(err)
			}
			if bufs[0][Headroom] == 0x45 {
				if n != 1 || sizes[0] != 200 || d.Dropped() != 2 {
					t.Errorf("%d packets, the first of %d bytes, %d dropped; want 1, 200, 2", n,
						sizes[0], d.Dropped())
				}
				return
			}
		}
	})
}

func TestWriteWhileDown(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{Offload: offload})
		for range 2 {
			n, err := d.Write([][]byte{udpPacket(100), udpPacket(100), udpPacket(100)}, Headroom)
			if n != 0 || !errors.Is(err, syscall.EIO) {
				t.Errorf("%d packets written, error %v, want 0 and EIO", n, err)
			}
		}
		bringUp(t, d)
		if n, err := d.Write([][]byte{udpPacket(100)}, Headroom); n != 1 || err != nil {
			t.Errorf("%d packets written, error %v, after the device came up; want 1, none", n, err)
		}
	})
}

// TestWriteBadPackets mixes valid packets with buffers that hold no valid
// packet. There are more packets than are coalesced at once.
func TestWriteBadPackets(t *testing.T) {
	bad := map[string]struct {
		packet func() []byte
		want   error
	}{
		"empty":       {func() []byte { return make([]byte, Headroom) }, ErrInvalid},
		"no headroom": {func() []byte { return make([]byte, Headroom-8) }, ErrInvalid},
		"nil":         {func() []byte { return nil }, ErrInvalid},
		"overlong": {func() []byte {
			return make([]byte, Headroom+MaxPacketLen+1)
		}, ErrInvalid},
		"no IP version": {func() []byte { return make([]byte, Headroom+40) }, syscall.EINVAL},
	}
	eachBackend(t, func(t *testing.T, offload bool) {
		d := openDevice(t, Config{MTU: 1400, Offload: offload})
		bringUp(t, d)
		server := listenUDP(t)
		for name, bad := range bad {
			t.Run(name, func(t *testing.T) {
				var bufs [][]byte
				want := 0
				for i := range 2*maxCoalesce + 9 {
					if i%10 == 3 {
						bufs = append(bufs, bad.packet())
					} else {
						bufs = append(bufs, udpPacket(i+1))
						want++
					}
				}
				before := slices.Clone(bufs)
				n, err := d.Write(bufs, Headroom)
				if n != want || !errors.Is(err, bad.want) {
					t.Errorf("%d packets written, error %v, want %d and %v", n, err, want, bad.want)
				}
				for i := range bufs {
					if len(bufs[i]) != len(before[i]) || cap(bufs[i]) != cap(before[i]) {
						t.Fatalf("Write changed buffer %d", i)
					}
				}
				for i := range bufs {
					if i%10 != 3 {
						if got := receiveUDP(t, server); got != i+1 {
							t.Fatalf("received %d bytes, want %d", got, i+1)
						}
					}
				}
			})
		}
	})
}

// TestWriteCoalesces writes many packets of one flow in buffers with and
// without spare capacity, and in one array.
func TestWriteCoalesces(t *testing.T) {
	const count, size = 2*maxCoalesce + 5, MaxPacketLen / maxCoalesce * 5 / 4
	array := make([]byte, 0, count*(Headroom+MaxPacketLen))
	layouts := map[string]func(p []byte) []byte{
		"spare capacity": func(p []byte) []byte {
			return append(make([]byte, 0, Headroom+MaxPacketLen), p...)
		},
		"more capacity than a packet": func(p []byte) []byte {
			return append(make([]byte, 0, 4*MaxPacketLen), p...)
		},
		"no spare capacity": func(p []byte) []byte { return p[:len(p):len(p)] },
		"one array": func(p []byte) []byte {
			start := len(array)
			array = append(array, p...)
			return array[start:len(array):len(array)]
		},
	}
	eachBackend(t, func(t *testing.T, isOffload bool) {
		d := openDevice(t, Config{MTU: 9000, Offload: isOffload})
		bringUp(t, d)
		server := listenUDP(t)
		for name, layout := range layouts {
			t.Run(name, func(t *testing.T) {
				array = array[:0]
				bufs := make([][]byte, count)
				for i := range bufs {
					bufs[i] = layout(udpPacket(size))
				}
				if n, err := d.Write(bufs, Headroom); n != count || err != nil {
					t.Errorf("%d packets written, error %v, want %d", n, err, count)
				}
				if o, ok := d.backend.(*offload); ok &&
					slices.ContainsFunc(o.batch[:maxCoalesce], func(b []byte) bool {
						return b != nil
					}) {
					t.Error("Write retains buffers")
				}
				for range count {
					if got := receiveUDP(t, server); got != size {
						t.Fatalf("received %d bytes, want %d", got, size)
					}
				}
			})
		}
	})
}

const testPort = 5000

func listenUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	server, err := net.ListenUDP("udp",
		net.UDPAddrFromAddrPort(netip.AddrPortFrom(host4, testPort)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	server.SetDeadline(time.Now().Add(patience))
	// The default of net.core.rmem_max, which needs no privileges.
	setsockopt(t, server, unix.SOL_SOCKET, unix.SO_RCVBUF, 212992)
	return server
}

// dialUDP returns a socket whose datagrams leave the host through a device.
func dialUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	client, err := net.DialUDP("udp", nil,
		net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer4, testPort)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func receiveUDP(t *testing.T, server *net.UDPConn) int {
	t.Helper()
	n, err := server.Read(make([]byte, MaxPacketLen))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// udpPacket returns Headroom bytes followed by a packet from peer4 to testPort
// on host4 with n bytes of data.
func udpPacket(n int) []byte {
	b := make([]byte, Headroom+28+n, Headroom+MaxPacketLen)
	ip := b[Headroom:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], peer4.AsSlice())
	copy(ip[16:], host4.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:20]))
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp[0:], testPort)
	binary.BigEndian.PutUint16(udp[2:], testPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	pseudo := append(ip[12:20:20], 0, unix.IPPROTO_UDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], ^onesSum(append(pseudo, udp...)))
	return b
}
