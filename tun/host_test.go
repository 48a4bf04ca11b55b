package tun

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var (
	host4, peer4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	host6, peer6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
)

// eachBackend runs test with the offload device and with the plain one.
func eachBackend(t *testing.T, test func(t *testing.T, offload bool)) {
	for name, offload := range map[string]bool{"offload": true, "plain": false} {
		t.Run(name, func(t *testing.T) { test(t, offload) })
	}
}

// needTUN skips the test on a kernel that has no TUN devices, and finds
// goroutines and descriptors that outlive it.
func needTUN(t *testing.T) {
	t.Helper()
	fd, err := openNode()
	if err := openError("test", err); err != nil && errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	unix.Close(fd)
	ignore := goleak.IgnoreCurrent()
	nodes, sockets := len(descriptors(t, nodePath)), len(descriptors(t, "socket:"))
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		nodes, sockets := len(descriptors(t, nodePath))-nodes, len(descriptors(t, "socket:"))-sockets
		if nodes != 0 || sockets != 0 {
			t.Errorf("%d devices and %d sockets leaked", nodes, sockets)
		}
	})
}

// descriptors returns the process's open files whose path starts with prefix.
func descriptors(t *testing.T, prefix string) (fds []int) {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, _ := os.Readlink(filepath.Join(dir, e.Name())); strings.HasPrefix(target, prefix) {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
	}
	return fds
}

// openDevice opens a device that is closed when the test ends.
func openDevice(t *testing.T, cfg Config) *Device {
	t.Helper()
	needTUN(t)
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if d.Offload() != cfg.Offload {
		t.Skip("this kernel has no TUN offload")
	}
	return d
}

// bringUp does what package routing does for programs.
func bringUp(t *testing.T, d *Device) {
	t.Helper()
	link, err := netlink.LinkByIndex(d.Index())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{host4, host6} {
		bits := a.BitLen() - 4
		err := netlink.AddrAdd(link, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())},
			Flags: unix.IFA_F_NODAD,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []netlink.Link{link, &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo"}}} {
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	// The kernel makes a new IPv6 address its own in the background.
	waitFor(t, "local address", func() bool {
		routes, err := netlink.RouteGet(host6.AsSlice())
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
	})
}

// mirror answers for the other end of a device. It sends each packet back
// with its addresses exchanged: the host sees its own packets come from
// peer4 or peer6. So whatever the host connects to there, it connects to
// itself, and packets of all protocols make the way through the device.
type mirror struct {
	maxBatch atomic.Int64 // most packets seen in one Read
	written  atomic.Uint64
}

// startMirror reads d until it is closed, which the end of the test does.
func startMirror(t *testing.T, d *Device) *mirror {
	m := new(mirror)
	var done sync.WaitGroup
	done.Go(func() {
		bufs, sizes := buffers(d.BatchSize())
		out := make([][]byte, 0, len(bufs))
		for {
			n, err := d.Read(bufs, sizes, Headroom)
			if err != nil {
				if err != os.ErrClosed {
					t.Errorf("mirror: %v", err)
				}
				return
			}
			m.maxBatch.Store(max(m.maxBatch.Load(), int64(n)))
			out = out[:0]
			for i := range n {
				b := bufs[i][:Headroom+sizes[i]]
				if swapAddrs(b[Headroom:]) {
					out = append(out, b)
				}
			}
			n, err = d.Write(out, Headroom)
			if err != nil && err != os.ErrClosed {
				t.Errorf("mirror: %v", err)
			}
			m.written.Add(uint64(n))
		}
	})
	t.Cleanup(func() {
		d.Close()
		done.Wait()
	})
	return m
}

// swapAddrs exchanges the addresses of a unicast packet. Checksums hold.
func swapAddrs(p []byte) bool {
	at, n := 12, 4
	if p[0]>>4 == 6 {
		at, n = 8, 16
	}
	src, dst := p[at:at+n], p[at+n:at+2*n]
	if a, _ := netip.AddrFromSlice(dst); a != peer4 && a != peer6 {
		return false
	}
	for i := range src {
		src[i], dst[i] = dst[i], src[i]
	}
	return true
}

// buffers returns n buffers for Read and Write with Headroom, and sizes.
func buffers(n int) ([][]byte, []int) {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, Headroom+MaxPacketLen)
	}
	return bufs, make([]int, n)
}

// onThread runs f on an operating system thread of its own that ends with it,
// so that f may change what belongs to the thread.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock
		f()
	}()
	<-done
}

// waitForRead returns when a goroutine waits for packets in Device.Read.
func waitForRead(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	waitFor(t, "reader", func() bool {
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			header, stack, _ := strings.Cut(g, "\n")
			if strings.Contains(header, "[IO wait") && strings.Contains(stack, "tun.(*Device).Read") {
				return true
			}
		}
		return false
	})
}

// patience is how long tests wait for what must happen.
const patience = 20 * time.Second

func waitFor(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}
